"""What `minillm tokenizer eval` counts is what the texts and the ids are."""

import numpy as np
import pytest

from minillm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, TokenizerConfig, train_tokenizer
from minillm.tokenizer import eval as module
from minillm.tokenizer.eval import Sums, Text, measure, report

ENGLISH = "the hen saw 17 red barns and ran home\n" * 30
CHINESE = "小猫在河边看见了三条鱼。"
TEXTS = [
    Text(ENGLISH, "a.txt", 1),
    Text(CHINESE, "b.jsonl", 1),
    Text("the 猫 hen 鱼 12", "b.jsonl", 2),
    Text("12 + 3", "b.jsonl", 3),
    Text("猫猫 hen hen", "b.jsonl", 4),
    Text("猫a", "b.jsonl", 5),
]


class Shouting(ByteTokenizer):
    """Loses lower case, and cannot write digits."""

    def encode_arrays(self, texts):
        found = super().encode_arrays([text.upper() for text in texts])
        return [np.where((ids >= 16 + ord("0")) & (ids <= 16 + ord("9")), 0, ids) for ids in found]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_tokenizer([ENGLISH], TokenizerConfig(vocab_size=320))


def test_sums_are_those_of_the_texts_and_their_ids(bpe):
    [found] = measure([bpe], iter(TEXTS))
    ids = [id for text in TEXTS for id in bpe.encode(text.text)]
    assert found.total == Sums(
        texts=6,
        n_bytes=sum(len(text.text.encode()) for text in TEXTS),
        characters=sum(len(text.text) for text in TEXTS),
        words=sum(len(text.text.split()) for text in TEXTS),
        tokens=len(ids),
        parts=sum(bpe.token_bytes(id)[:1] >= b"\x80" for id in ids),
        unknown=0,
        lost=0,
    )
    assert found.total.parts == 3 * sum(not c.isascii() for text in TEXTS for c in text.text)
    assert set(np.flatnonzero(found.used)) == set(ids)
    assert found.seconds > 0


def test_files_and_scripts_each_add_up_to_the_whole(bpe):
    [found] = measure([bpe], TEXTS)
    assert {name: sums.texts for name, sums in found.by_file.items()} == {"a.txt": 1, "b.jsonl": 5}
    assert {name: sums.texts for name, sums in found.by_script.items()} == {
        **{"Latin": 3, "Han": 1, "no letters": 1, "mixed": 1},
    }
    for groups in (found.by_file, found.by_script):
        total = Sums()
        for sums in groups.values():
            total.add(sums)
        assert total == found.total


def test_what_does_not_come_back_is_counted_and_named_by_line():
    [found] = measure([Shouting()], TEXTS)
    assert found.total.lost == 5  # all but the Chinese one
    assert found.total.unknown == 2 * 30 + 2 + 3
    assert found.losses[0] == "a.txt:1: character 0: 'the hen saw ' comes back as 'THE HEN SAW '"
    assert found.losses[1].startswith("b.jsonl:2: character 0: ")
    many = [Text("abc", "c.jsonl", line) for line in range(1, 100)]
    assert len(measure([Shouting()], many)[0].losses) == module.LOSSES_SHOWN
    said = report([found])
    assert "5 of 6 texts do NOT come back" in said
    assert "b.jsonl:2" in said
    assert "exact" in report(measure([ByteTokenizer()], TEXTS)).splitlines()[4]


def test_two_tokenizers_see_the_same_texts_and_are_set_beside_each_other(bpe):
    both = measure([bpe, ByteTokenizer()], iter(TEXTS))
    alone = measure([bpe], TEXTS) + measure([ByteTokenizer()], TEXTS)
    for measured, expected in zip(both, alone):
        assert (measured.total, measured.by_file, measured.by_script) == (
            expected.total,
            expected.by_file,
            expected.by_script,
        )
    row = next(line for line in report(both).splitlines()[::-1] if line.startswith("a.txt"))
    ours, theirs = len(bpe.encode(ENGLISH)), len(ENGLISH)
    assert row.split() == ["a.txt", f"{theirs / ours:.2f}", "1.00", f"{ours / theirs:.2f}"]


def test_texts_are_read_a_batch_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 100)
    waiting, most = 0, 0

    class Counting(ByteTokenizer):
        def encode_arrays(self, texts):
            nonlocal waiting, most
            most, waiting = max(most, waiting), 0
            return super().encode_arrays(texts)

    def texts():
        nonlocal waiting
        for line in range(1000):
            waiting += 1
            yield Text("twenty characters ..", "a.jsonl", line)

    [found] = measure([Counting()], texts())
    assert found.total.tokens == 20_000
    assert most == 5


def test_a_text_that_cannot_be_encoded_is_named_by_file_and_line():
    with pytest.raises(ValueError, match=r"^b\.jsonl:1: character 0 is '小'"):
        measure([CharTokenizer(ENGLISH)], TEXTS)


def test_no_text_at_all_is_a_table_of_nothing():
    assert "0 tokens" in report(measure([ByteTokenizer()], []))
