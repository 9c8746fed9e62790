"""Messages to workers: what arrives is what was sent, and only what is known can be sent."""

import dataclasses
import math
from functools import partial
from multiprocessing.connection import Pipe
from threading import Thread
from typing import NamedTuple

import numpy as np
import pytest

from minillm.data import wire
from minillm.data.config import DataConfig
from minillm.data.text import Block
from minillm.data.workers import Workers
from minillm.tokenizer import ByteTokenizer, CharTokenizer


class Row(NamedTuple):
    text: str
    numbers: np.ndarray


def there_and_back(value: object) -> object:
    ours, theirs = Pipe()
    sender = Thread(target=lambda: wire.send(ours, wire.pack(value)))  # a pipe holds less than a large message
    sender.start()
    found = wire.unpack(wire.receive(theirs))
    sender.join()
    return found


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**70,
        -0.1,
        math.inf,
        "",
        "x" * 10_000,
        "lone \ud800 surrogate",
        "\ud83d\ude00",  # halves of a pair that, side by side, must not become one character
        b"",
        bytes(range(256)) * 500,
        [],
        [1, 2, True],
        [1, None, "three", 4.5],
        ["one", "", "zwei", "三", "\ud83d", "\ude00"],
        [b"one", b"", b"three" * 1000],
        (),
        (1, (2, [3, (4,)])),
        {},
        {"a": 1, 2: [b"x"], (3, 4): {"deep": None}},
        ["made", "builtins:str", []],  # lists of what looks like our own spelling
        ["tuple", ["a"]],
        np.dtype("<u2"),
        DataConfig(path=["a", "b"], workers=2),
        Block("file", b"raw" * 1000, ([1, 2], ["one", "two"]), 1, 0, True, False, 3000),
        partial(max, 1, key=abs),
        dataclasses.replace,
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0][:40],
)
def test_what_arrives_is_what_was_sent(value):
    found = there_and_back(value)
    assert type(found) is type(value)
    if isinstance(value, partial):
        assert (found.func, found.args, found.keywords) == (value.func, value.args, value.keywords)
    else:
        assert found == value
        assert repr(found) == repr(value)  # True is not 1, and a Block is no tuple


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1000, dtype=np.int32).reshape(10, 100)[:, ::3],
        np.zeros((0, 5), np.uint16),
        np.array(3.5),
        np.array([True, False]),
        np.zeros(3, [("hash", "<u8"), ("line", "<u4")]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_arrive_as_they_were(array):
    found = there_and_back(Row("x", array))
    assert type(found) is Row
    assert found.numbers.dtype == array.dtype
    assert found.numbers.shape == array.shape
    assert found.numbers.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), ByteTokenizer(["<s>", "</s>", "<pad>"]), CharTokenizer("abc é")]
)
def test_tokenizers_arrive_as_they_were(tokenizer):
    found = there_and_back(tokenizer)
    assert type(found) is type(tokenizer)
    assert found.hash == tokenizer.hash
    assert found.encode("a é") == tokenizer.encode("a é") if tokenizer.kind == "char" else True


class Unknown:
    pass


def test_what_cannot_be_sent_is_said():
    for value in (Unknown(), [Unknown()], {"a": {1}}, np.array([None])):
        with pytest.raises(ValueError, match="cannot be sent to a worker process: give it a method `arguments`"):
            wire.pack(value)
    with Workers(2) as workers, pytest.raises(ValueError, match="a Unknown cannot be sent"):
        list(workers.map(str, [Unknown()]))
