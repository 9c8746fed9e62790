"""Prepared tokens: what is held out, reuse, the same bytes for any number of workers, every damage named."""

import dataclasses
import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minillm.data import shards, store, text, tokenise, writing
from minillm.data.config import DataConfig
from minillm.data.shards import describe, prepare
from minillm.data.store import open_prepared, verify
from minillm.data.workers import Workers
from minillm.files import locked
from minillm.tokenizer import ByteTokenizer, TokenizerConfig, train_tokenizer

BYTES = ByteTokenizer()
ROOT = Path(__file__).parent.parent
WORDS = "the cat sat on a mat und die Katze saß da 猫坐在垫子上。 🙂 x\t2 don't".split(" ")


def setup(tmp_path, content, name="corpus.txt", **settings) -> DataConfig:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(**{"path": str(path), "cache_dir": str(tmp_path / "cache"), **settings})


def texts_of(tokens: store.TokenStore, tokenizer=BYTES) -> list[str]:
    """The documents of a split, each checked to begin with bos and end with eos."""
    found = []
    for number in range(tokens.n_documents):
        ids = tokens.document(number).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.bos_id not in ids[1:]
        assert tokenizer.eos_id not in ids[:-1]
        found.append(tokenizer.decode(ids))
    return found


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def random_line(dice: random.Random) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(dice.randrange(5, 30)))


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_documents_come_back_with_their_sources(tmp_path):
    config = setup(tmp_path, "one\n\ntwo three\n四四四四\n", document="line", val="0.25")
    prepared = prepare(config, BYTES)
    assert texts_of(prepared.train) == ["one", "two three"]
    assert texts_of(prepared.val) == ["四四四四"]
    assert [prepared.train.source(i) for i in range(2)] == [f"{config.path}:1", f"{config.path}:3"]
    assert prepared.val.source(0) == f"{config.path}:4"
    assert prepared.train.document_offsets.tolist() == [0, 5, 16]
    assert (prepared.train.n_tokens, prepared.train.n_bytes, prepared.train.n_chars) == (16, 12, 12)
    assert (prepared.val.n_tokens, prepared.val.n_bytes, prepared.val.n_chars) == (14, 12, 4)
    assert prepared.info["skipped"]["blank_documents"] == 1


def test_shards_are_plain_npy_files(tmp_path):
    prepared = prepare(setup(tmp_path, "abc"), BYTES)
    shard = np.load(prepared.directory / "train-00000.npy", mmap_mode="r")
    assert isinstance(shard, np.memmap)
    assert shard.dtype == np.uint16
    assert np.load(prepared.directory / "train-offsets.npy").dtype == np.int64
    assert np.load(prepared.directory / "train-sources.npy", allow_pickle=False)["line"].tolist() == [1]


class WideTokenizer(ByteTokenizer):
    """Bytes with ids far apart, for what needs more than 16 bits."""

    step = 1000

    def __init__(self):
        super().__init__()
        self.vocab_size = 300_000

    def encode_arrays(self, texts):
        return [ids * self.step for ids in super().encode_arrays(texts)]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    prepared = prepare(setup(tmp_path, "abc", val="0"), WideTokenizer())
    assert prepared.train.tokens(1, 4).tolist() == [id * 1000 for id in BYTES.encode("abc")]
    assert prepared.train.tokens(0, 5).dtype == np.uint32
    assert prepared.val is None


def test_tokens_read_across_shards(tmp_path):
    config = setup(tmp_path, "".join(random_line(random.Random(0)) + "\n" for _ in range(20)), val="0.4")
    whole = prepare(config, BYTES).train
    tokens = whole.tokens(0, whole.n_tokens)
    split = prepare(config, BYTES, shard_tokens=50).train
    assert len(split.shards) == -(-split.n_tokens // 50)
    for start, stop in ((0, split.n_tokens), (0, 50), (49, 51), (10, 160), (100, 100), (split.n_tokens,) * 2):
        assert split.tokens(start, stop).tolist() == tokens[start:stop].tolist()
    assert np.shares_memory(split.tokens(10, 40), split.shards[0])
    with pytest.raises(IndexError):
        split.tokens(0, split.n_tokens + 1)


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_every_tokenizer_gives_the_text_back(tmp_path, kind):
    content = "\n".join(random_line(random.Random(n)) for n in range(300))
    tokenizer = train_tokenizer([content], TokenizerConfig(kind=kind, vocab_size=600 if kind == "bpe" else None))
    prepared = prepare(setup(tmp_path, content, val="0.1"), tokenizer)
    assert "".join(texts_of(prepared.train, tokenizer) + texts_of(prepared.val, tokenizer)) == content


# --- what is held out -------------------------------------------------------------------------------------------------


def test_the_tail_of_a_single_document_is_cut_at_a_character(tmp_path):
    content = "".join(random_line(random.Random(n)) + "\n" for n in range(50))
    for fraction in (0.1, 0.05, 0.5):
        prepared = prepare(setup(tmp_path, content, val=str(fraction)), BYTES)
        n = int(len(content) * (1 - fraction))
        assert texts_of(prepared.train) == [content[:n]]
        assert texts_of(prepared.val) == [content[n:]]
        assert prepared.val.source(0) == f"{tmp_path / 'corpus.txt'}:{1 + content[:n].count(chr(10))}"


def test_the_usual_split_of_tinyshakespeare(real_data, tmp_path):
    content = (real_data / "tinyshakespeare.txt").read_text()
    tokenizer = train_tokenizer([content], TokenizerConfig(kind="char"))
    config = DataConfig(path=str(real_data / "tinyshakespeare.txt"), val="0.1", cache_dir=str(tmp_path))
    prepared = prepare(config, tokenizer)
    n = int(0.9 * len(content))
    assert texts_of(prepared.train, tokenizer) == [content[:n]]
    assert texts_of(prepared.val, tokenizer) == [content[n:]]
    assert (prepared.train.n_tokens, prepared.val.n_tokens) == (1_003_854 + 2, 111_540 + 2)


def test_the_tail_of_many_documents_is_whole_documents(tmp_path):
    content = "".join(random_line(random.Random(n)) + "\n" for n in range(500))
    prepared = prepare(setup(tmp_path, content, document="line", val="0.2"), BYTES)
    assert texts_of(prepared.train) + texts_of(prepared.val) == content.splitlines()
    n_chars = prepared.train.n_chars + prepared.val.n_chars
    assert 0.18 < prepared.val.n_chars / n_chars < 0.201


def expected_tail(found: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The tail split, written down in the plainest way."""
    total = sum(map(len, found))
    cut, at = int(total * (1 - fraction)), 0
    for number, document in enumerate(found):
        if at + len(document) >= cut:
            if at + len(document) - cut <= tokenise.ROUNDING * (total - cut):
                return found[: number + 1], found[number + 1 :]
            inside = cut - at
            return [*found[:number], document[:inside]], [document[inside:], *found[number + 1 :]]
        at += len(document)
    raise AssertionError


def test_blocks_and_pieces_of_any_size_make_the_same_split(tmp_path, monkeypatch):
    dice = random.Random(0)
    for trial in range(40):
        found = [random_line(dice) for _ in range(dice.choice([1, 2, 5, 20]))]
        settings = dice.choice([{"document": "line"}, {"document": "file"}, {"document": "blank"}])
        joined = {"line": "\n", "file": "\n", "blank": "\n\n"}[settings["document"]].join(found)
        documents = [joined] if settings["document"] == "file" else found
        fraction = dice.choice([0.05, 0.3, 0.9])
        monkeypatch.setattr(text, "BLOCK", dice.choice([16, 40, 100]))
        monkeypatch.setattr(text, "PIECE", dice.choice([8, 16, 2**14]))
        folder = tmp_path / str(trial)
        prepared = prepare(setup(folder, joined, val=str(fraction), **settings), BYTES, progress=False)
        assert (texts_of(prepared.train), texts_of(prepared.val)) == expected_tail(documents, fraction), (trial, found)
        offsets = np.concatenate([prepared.train.document_offsets, prepared.val.document_offsets])
        assert len(offsets) == prepared.train.n_documents + prepared.val.n_documents + 2


def test_held_out_by_hash_stays_held_out_when_the_corpus_grows(tmp_path):
    lines = [random_line(random.Random(n)) for n in range(400)] + ["long " * 5000 + "first", "long " * 5000 + "other"]
    random.Random(1).shuffle(lines)
    small = prepare(setup(tmp_path, "\n".join(lines[:200]), document="line", val="hash 0.2"), BYTES)
    large = prepare(setup(tmp_path, "\n".join(reversed(lines)), document="line", val="hash 0.2"), BYTES)
    assert 20 <= small.val.n_documents <= 60
    assert set(texts_of(small.val)) <= set(texts_of(large.val))
    assert set(texts_of(small.train)) <= set(texts_of(large.train))
    assert sorted(texts_of(large.train) + texts_of(large.val)) == sorted(lines)


def test_a_document_over_several_blocks_is_on_one_side_of_a_hash_split(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 5000)
    lines = [f"{n} " + random_line(random.Random(n)) * dice for n, dice in enumerate([1, 300, 2, 400] * 10)]
    prepared = prepare(setup(tmp_path, "\n".join(lines), document="line", val="hash 0.5"), BYTES)
    train, val = texts_of(prepared.train), texts_of(prepared.val)
    assert [line for line in lines if line in set(train)] == train
    assert [line for line in lines if line not in set(train)] == val


def test_held_out_files_are_not_trained_on(tmp_path):
    for name in ("a.txt", "sub/b.txt", "held_out.txt"):
        setup(tmp_path / "corpus", f"text of {name}", name)
    config = DataConfig(
        path=str(tmp_path / "corpus"),
        val=str(tmp_path / "corpus" / "sub" / ".." / "held_out.txt"),
        cache_dir=str(tmp_path / "cache"),
    )
    prepared = prepare(config, BYTES)
    assert texts_of(prepared.train) == ["text of a.txt", "text of sub/b.txt"]
    assert texts_of(prepared.val) == ["text of held_out.txt"]


def test_a_line_of_10_mb_is_prepared_exactly(tmp_path):
    line = "A line without an end, 没有换行, " * 275_000
    prepared = prepare(setup(tmp_path, f"short\n{line}\nlast\n", document="line", val="0.3"), BYTES)
    cut = int((len(line) + 9) * 0.7) - 5

    def whole(tokens, number):
        return (tokens.document(number)[1:-1] - BYTES.first).astype(np.uint8).tobytes().decode()

    assert [whole(prepared.train, number) for number in range(2)] == ["short", line[:cut]]
    assert [whole(prepared.val, number) for number in range(2)] == [line[cut:], "last"]
    assert prepared.train.n_bytes + prepared.val.n_bytes == len(line.encode()) + 9 > 10**7


def test_nothing_is_held_out_where_val_is_0(tmp_path):
    for val in ("0", "none", "0.0"):
        prepared = prepare(setup(tmp_path, "abc", val=val), BYTES)
        assert prepared.val is None
        assert texts_of(prepared.train) == ["abc"]


@pytest.mark.parametrize("val", ["1.5", "-0.1", "hash 2", "hash many", "1"])
def test_a_fraction_that_is_none_is_refused_with_the_config(val):
    with pytest.raises(ValueError, match=r"^val: .*(fraction)"):
        DataConfig(val=val)


def test_a_split_that_leaves_nothing_to_one_side_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.val: 0\.999 of 3 characters leaves one side of the split empty"):
        prepare(setup(tmp_path, "abc", val="0.999"), BYTES)
    with pytest.raises(ValueError, match=r"data\.val: hash 0\.001 of 1 documents leaves none for val"):
        prepare(setup(tmp_path, "abc", val="hash 0.001"), BYTES)
    with pytest.raises(ValueError, match=r"data\.val: nowhere: no such file or folder; a fraction, 'hash F', a path"):
        prepare(setup(tmp_path, "abc", val="nowhere"), BYTES)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


# --- made once --------------------------------------------------------------------------------------------------------


def made(config: DataConfig, tokenizer=BYTES) -> tuple[Path, int]:
    directory = prepare(config, tokenizer).directory
    return directory, (directory / "index.json").stat().st_mtime_ns


def test_what_is_prepared_is_reused_while_nothing_changes(tmp_path):
    config = setup(tmp_path, "one two three", document="line")
    first = made(config)
    assert made(config) == first
    os.utime(config.path, ns=(1, 1))
    assert made(config) == first, "a touched file has the same content"
    assert made(DataConfig(path=[config.path], document="line", cache_dir=config.cache_dir, workers=2)) == first
    found = {first[0]}
    found.add(made(setup(tmp_path, "one two three", document="file"))[0])
    found.add(made(setup(tmp_path, "one two three", document="line", val="0.2"))[0])
    found.add(made(config, train_tokenizer(["one two three"], TokenizerConfig(kind="char")))[0])
    found.add(made(setup(tmp_path, "one two thred", document="line"))[0])
    assert len(found) == 5


def test_files_too_large_to_hash_are_known_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "HASHED_CORPUS", 5)
    config = setup(tmp_path, "one two three")
    first = made(config)
    assert made(config) == first
    os.utime(config.path, ns=(1, 1))
    assert made(config)[0] != first[0]


def test_a_file_changed_since_it_was_prepared_is_named(tmp_path):
    config = setup(tmp_path, "one two three")
    prepared = prepare(config, BYTES)
    assert shards.changed_files(prepared.info) == []
    setup(tmp_path, "one two thred")
    assert shards.changed_files(prepared.info) == [config.path]
    assert "(changed since, or gone)" in describe(prepared)
    Path(config.path).unlink()
    assert shards.changed_files(prepared.info) == [config.path]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    config = setup(tmp_path, "one two three")
    count = tokenise.count

    def count_then_change(reading):
        counts = count(reading)
        Path(config.path).write_text("one two thred")
        return counts

    monkeypatch.setattr(tokenise, "count", count_then_change)
    with pytest.raises(ValueError, match=r"corpus\.txt changed while being read"):
        prepare(config, BYTES)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


def test_a_folder_of_prepared_tokens_can_be_the_path(tmp_path):
    prepared = prepare(setup(tmp_path, "one two three"), BYTES)
    for path in (str(prepared.directory), [str(prepared.directory)]):
        again = prepare(DataConfig(path=path, cache_dir=str(tmp_path / "other")), BYTES)
        assert again.directory == prepared.directory
    assert not (tmp_path / "other").exists()


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 2**15)
    dice = random.Random(0)
    lines = [random_line(dice) for _ in range(2000)]
    folder = tmp_path / "corpus"
    setup(folder, "\n".join(lines), "a.txt")
    setup(folder, "".join(json.dumps({"text": line * 3}) + "\n" for line in lines), "b.jsonl")
    setup(folder, gzip.compress(json.dumps(lines).encode()), "c.json.gz")
    for val, counts in (("0.1", (1, 3)), ("hash 0.3", (1, 2))):
        found = []
        for workers in counts:
            config = DataConfig(path=str(folder), val=val, cache_dir=str(tmp_path / f"{workers}"), workers=workers)
            found.append(contents(prepare(config, BYTES, shard_tokens=50_000).directory))
        assert len(found[0]) > 15
        assert found[0] == found[1]


# Imports the package without its __init__, which needs torch: these tests start processes that must be quick.
LIGHT = f"""
import sys, types
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
package = sys.modules["minillm"] = types.ModuleType("minillm")
package.__path__ = [{str(ROOT / "minillm")!r}]
"""
SCRIPT = """
import logging, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
from minillm.data.config import DataConfig
from minillm.data.shards import prepare
from test_shards import SlowTokenizer
logging.basicConfig(level="INFO")
prepare(DataConfig(path={path!r}, cache_dir={cache!r}, workers={workers}), SlowTokenizer())
"""  # no `if __name__ == "__main__"`: workers do not run the script again


class SlowTokenizer(ByteTokenizer):
    def encode_arrays(self, texts):
        time.sleep(0.2)
        return super().encode_arrays(texts)


def start_script(tmp_path, megabytes, workers) -> subprocess.Popen:
    config = setup(tmp_path, "some words in a line\n" * (megabytes * 50_000))
    script = tmp_path / "script.py"
    script.write_text(LIGHT + SCRIPT.format(path=config.path, cache=config.cache_dir, workers=workers))
    return subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_two_processes_at_once_prepare_once(tmp_path):
    started = [start_script(tmp_path, 2, workers=1) for _ in range(2)]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert sum("tokens to train on" in said for said in errors) == 1


def test_a_script_without_a_guard_can_use_workers(tmp_path):
    process = start_script(tmp_path, 2, workers=2)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert errors.count("tokens to train on") == 1
    assert len(list((tmp_path / "cache").glob("corpus*/index.json"))) == 1


def test_who_waits_for_the_lock_finds_what_was_prepared(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "minillm")
    config = setup(tmp_path, "one two three")
    directory = made(config)[0]
    elsewhere = shutil.move(directory, tmp_path / "elsewhere")
    waits = []

    def lock_that_another_holds(path, wait=False):
        if not wait:
            return locked(path)
        waits.append(path)
        shutil.move(elsewhere, directory)  # what the other process does meanwhile
        return locked(path.with_suffix(".other"))

    monkeypatch.setattr(shards, "locked", lock_that_another_holds)
    with locked(directory.with_name(f"{directory.name}.lock")):
        prepared = prepare(config, BYTES)
    assert prepared.directory == directory
    assert len(waits) == 1
    assert "another process is preparing it; waiting" in caplog.text


# --- no text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", "\ufeff"), ("a.jsonl", '{"text": ""}\n')])
def test_an_empty_file_is_refused_by_name(tmp_path, name, content):
    with pytest.raises(ValueError, match=rf"data\.path: no text in .*{name}: the corpus is empty"):
        prepare(setup(tmp_path, content, name), BYTES)


def test_an_empty_corpus_is_refused(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.json"):
        setup(tmp_path / "corpus", "", name)
    with pytest.raises(ValueError, match=r"no text in .*a\.txt, .*b\.jsonl, .*c\.json: the corpus is empty"):
        prepare(DataConfig(path=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache")), BYTES)
    with pytest.raises(ValueError, match=r"data\.path: no path given"):
        prepare(DataConfig(cache_dir=str(tmp_path / "cache")), BYTES)
    with pytest.raises(ValueError, match=r"data\.path: no text besides that of data\.val: the corpus is empty"):
        prepare(setup(tmp_path, "abc", val=str(tmp_path / "corpus.txt")), BYTES)
    with pytest.raises(ValueError, match=r"data\.val: no text in .*a\.txt: the corpus is empty"):
        prepare(setup(tmp_path, "abc", val=str(tmp_path / "corpus" / "a.txt")), BYTES)


def test_an_empty_file_among_others_is_skipped_and_named(tmp_path, caplog):
    caplog.set_level("INFO", "minillm")
    setup(tmp_path / "corpus", "text", "a.txt")
    setup(tmp_path / "corpus", "", "empty.txt")
    setup(tmp_path / "corpus", "\n\n", "blank.txt")
    config = DataConfig(path=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    prepared = prepare(config, BYTES)
    line = f"skipped 2 files without text: {tmp_path}/corpus/blank.txt, {tmp_path}/corpus/empty.txt"
    assert line in caplog.text
    assert line in describe(prepared)


def test_broken_input_is_named_and_leaves_nothing(tmp_path):
    for workers in (1, 2):
        config = setup(tmp_path, '"fine"\n{"title": "x"}\n', "a.jsonl", workers=workers)
        with pytest.raises(ValueError, match=r'a\.jsonl:2: field "text" is missing \(found: title\)'):
            prepare(config, BYTES)
        assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


def test_the_first_of_several_errors_is_named_whatever_the_number_of_workers(tmp_path):
    rows = ['"text"\n' * 300_000, '{"broken\n', '"text"\n' * 300_000]
    folder = tmp_path / "corpus"
    setup(folder, "".join(rows), "a.jsonl")
    setup(folder, b"not packed", "b.txt.gz")
    for workers in (1, 2):
        config = DataConfig(path=str(folder), cache_dir=str(tmp_path / "cache"), workers=workers)
        with pytest.raises(ValueError, match=r"a\.jsonl:300001: not valid JSON"):
            prepare(config, BYTES)


def test_what_the_tokenizer_refuses_is_named_by_line(tmp_path):
    tokenizer = train_tokenizer(["abc\n"], TokenizerConfig(kind="char"))
    with pytest.raises(ValueError, match=r"corpus\.txt:3: .*'d'"):
        prepare(setup(tmp_path, "abc\ncba\nabd\n", document="line"), tokenizer)


class BrokenTokenizer(ByteTokenizer):
    """Gives an id that is not in its vocabulary for an x."""

    def encode_arrays(self, texts):
        return [np.where(ids == 136, self.vocab_size, ids) for ids in super().encode_arrays(texts)]


def test_ids_beyond_the_vocabulary_are_refused_while_preparing(tmp_path):
    assert BYTES.encode("x") == [136]
    with pytest.raises(ValueError, match=rf"corpus\.txt:2: token id {BYTES.vocab_size} is beyond the vocabulary"):
        prepare(setup(tmp_path, "abc\nxyz\n", document="line"), BrokenTokenizer())


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    content = "".join(random_line(random.Random(n)) + "\n" for n in range(2000))
    return prepare(setup(tmp_path, content, document="line", val="0.1"), BYTES, shard_tokens=50_000)


def error_of(directory, function=open_prepared) -> str:
    with pytest.raises(ValueError, match=str(directory)) as caught:
        function(directory)
    return str(caught.value)


@pytest.mark.parametrize("name", ["train-00001.npy", "train-offsets.npy", "val-sources.npy"])
def test_a_truncated_file_is_refused_by_name(prepared, name):
    path = prepared.directory / name
    size = path.stat().st_size
    os.truncate(path, size - 10)
    advice = f"delete {prepared.directory} to have it prepared again"
    expected = f"{path}: the file is truncated: {size - 10:,} bytes, expected {size:,}; {advice}"
    assert error_of(prepared.directory) == error_of(prepared.directory, verify) == expected


def test_a_missing_file_is_refused_by_name(prepared):
    (prepared.directory / "train-00001.npy").unlink()
    assert error_of(prepared.directory).startswith(f"{prepared.directory}/train-00001.npy: the file is missing")


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["train-00001.npy", "train-offsets.npy", "val-sources.npy"])
def test_a_file_changed_since_it_was_prepared_is_refused(prepared, name, monkeypatch):
    path = prepared.directory / name
    flip(path, -1000 if name == "train-00001.npy" else -8)
    assert f"{path}: changed since it was prepared: sha256 " in error_of(prepared.directory)
    monkeypatch.setattr(store, "SMALL", 0)
    assert f"{path}: changed since it was prepared: sha256 " in error_of(prepared.directory, verify)


def test_a_damaged_header_is_refused(prepared):
    path = prepared.directory / "train-00000.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'<u2'", b"'<i2'"))
    assert error_of(prepared.directory).startswith(f"{path}: the header is damaged: (50000,) of int16, expected")
    path.write_bytes(b"garbage!" + content[8:])
    assert error_of(prepared.directory).startswith(f"{path}: the header is damaged: ")


def test_a_changed_index_is_refused(prepared):
    path = prepared.directory / "index.json"
    path.write_text(path.read_text().replace('"n_documents": ', '"n_documents": 1'))
    assert error_of(prepared.directory).startswith(f"{path}: changed since it was written")
    path.write_text("{}")
    assert error_of(prepared.directory).startswith(f"{path}: format None, expected 'minillm tokens 1'")
    path.write_text("{")
    assert error_of(prepared.directory).startswith(f"{path}:1: not valid JSON")


@pytest.mark.parametrize("small", [2**26, 0])
def test_ids_beyond_the_vocabulary_are_refused_with_shard_and_position(prepared, monkeypatch, small):
    monkeypatch.setattr(store, "SMALL", small)
    path = prepared.directory / "train-00001.npy"
    shard = np.load(path, mmap_mode="r+")
    shard[30_000:] = BYTES.vocab_size + 7
    shard.flush()
    message = f"token id {BYTES.vocab_size + 7} is beyond the vocabulary of {BYTES.vocab_size}"
    assert f"{path}: position 30000: {message}" in error_of(prepared.directory, verify)
    opened = error_of(prepared.directory)
    assert opened.startswith(f"{path}: position 3")
    assert message in opened


def test_another_tokenizer_is_refused_with_both_hashes(prepared):
    other = train_tokenizer(["abc"], TokenizerConfig(kind="char"))
    for function in (
        lambda directory: open_prepared(directory, other.hash),
        lambda directory: prepare(DataConfig(path=str(directory)), other),
    ):
        error = error_of(prepared.directory, function)
        assert "prepared with another tokenizer" in error
        assert BYTES.hash in error
        assert other.hash in error


@pytest.mark.parametrize("index", ['["a text"]', '[{"text": "a text"}]', '"a text', ""])
def test_a_folder_with_an_index_of_its_own_is_text(tmp_path, index):
    config = setup(tmp_path, "one", name="corpus/a.txt")
    (tmp_path / "corpus" / "index.json").write_text(index)
    assert not store.is_prepared(tmp_path / "corpus")
    config = dataclasses.replace(config, path=str(tmp_path / "corpus"), val="0")
    if index == '"a text':
        with pytest.raises(ValueError, match=r"index\.json:1: a list"):
            prepare(config, BYTES)
    else:
        assert texts_of(prepare(config, BYTES).train) == ["one", *["a text"] * bool(index)]


def test_a_damaged_index_is_still_known_for_that_of_tokens(prepared):
    path = prepared.directory / "index.json"
    path.write_text(path.read_text()[:-20])
    assert store.is_prepared(prepared.directory)
    with pytest.raises(ValueError, match=r"index\.json:\d+: not valid JSON"):
        prepare(DataConfig(path=str(prepared.directory)), BYTES)


def test_a_folder_that_is_not_prepared_is_refused(tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere")
    assert error_of(tmp_path).startswith(f"{tmp_path}: no prepared tokens there (no index.json)")


def test_what_is_whole_passes_verification(prepared):
    verify(prepared.directory)
    assert open_prepared(prepared.directory, BYTES.hash).info == prepared.info


def test_damaged_tokens_are_not_silently_replaced(tmp_path):
    config = setup(tmp_path, "one two three")
    directory = prepare(config, BYTES).directory
    flip(directory / "train-00000.npy", -1)
    with pytest.raises(ValueError, match=rf"changed since it was prepared.*delete {directory}"):
        prepare(config, BYTES)


# --- accidents --------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    config = setup(tmp_path, "one two three")
    append = writing.GrowingArray.append

    def no_space(self, array):
        if self.path.name == "train-00000.npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, array)

    monkeypatch.setattr(writing.GrowingArray, "append", no_space)
    with pytest.raises(ValueError, match="the disk is full"):
        prepare(config, BYTES)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


def children(pid) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def running(pid) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see the workers")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_program(tmp_path, end):
    process = start_script(tmp_path, 100, workers=2)
    cache = tmp_path / "cache"
    try:
        wait_for(lambda: any(cache.glob(".*.partial/tokens/train-00000.npy")))
        workers = children(process.pid)
        assert len(workers) == 2
        os.killpg(process.pid, end)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    wait_for(lambda: not any(map(running, workers)))
    if end == signal.SIGINT:
        assert errors.count("Traceback") == 1, "only the program itself may say that it was interrupted"
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert not any(path.is_dir() for path in cache.iterdir())


def killed_by_the_system(task):
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_worker_that_dies_is_reported():
    with Workers(2) as workers, pytest.raises(ValueError, match=r"killed by signal 9; perhaps memory ran out"):
        list(workers.map(killed_by_the_system, range(10)))


def double(task):
    if task is None:
        raise TypeError("not a number")
    return task * 2


def test_workers_keep_the_order_and_pass_errors_on():
    with Workers(3) as workers:
        assert list(workers.map(double, range(50))) == [2 * task for task in range(50)]
        assert list(workers.map(str, range(5))) == list("01234")
        results = workers.map(double, [1, None, 3])
        assert next(results) == 2
        with pytest.raises(RuntimeError, match="TypeError: not a number"):
            next(results)


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_says_what_there_is(prepared, tmp_path):
    said = describe(prepared)
    train, val = prepared.train, prepared.val
    for store_ in (train, val):
        columns = [f"{n:,}" for n in (store_.n_documents, store_.n_tokens, store_.n_bytes)]
        row = next(line for line in said.splitlines() if line.startswith(store_.split))
        assert row.split()[1:] == [*columns, f"{store_.n_bytes / store_.n_tokens:.2f}"]
    assert BYTES.hash in said
    assert f"{tmp_path / 'corpus.txt'}" in said
    assert "document line, text_field text, val 0.1" in said
    assert "verified" not in said
    assert "verified" in describe(prepared, verify=True)
    flip(prepared.directory / "train-00000.npy", -1)
    with pytest.raises(ValueError, match="changed since it was prepared"):
        describe(prepared, verify=True)
