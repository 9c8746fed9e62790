"""The rule for words, and that a hash depends on the words alone."""

import itertools

import numpy as np
import pytest

from minillm.data.clean import words
from minillm.data.clean.words import ngram_hashes, span_hashes, word_hashes

CORPUS = [
    "The hen ran home; the hen slept.",
    "",
    "母鸡跑回家了，她很高兴。",
    " \t\n",
    "Ηλιος ΗΛΙΟΣ",
    "a" * 100,
    "x1 y2",
    "ok\ud800ok",
]


def rows(ragged: words.Ragged) -> list[list[int]]:
    return [ragged.values[a:b].tolist() for a, b in itertools.pairwise(ragged.offsets.tolist())]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The hen, ran HOME!", "the hen ran home"),
        ("  the\n\nhen\tran home  ", "the hen ran home"),
        ("the-hen (ran) «home»…", "the hen ran home"),
        ("the hen 🐔 ran home", "the hen ran home"),
        ("母鸡跑回家", "母 鸡，跑回 家。"),
        ("ไก่", "ไ ก ่"),
        ("ガーデン・パーティー", "ガーデン パーティー"),
        ("ÉCOLE Straße ЖИЗНЬ", "école straße жизнь"),
    ],
)
def test_case_space_and_punctuation_make_no_difference(one, other):
    assert rows(word_hashes([one])) == rows(word_hashes([other])) != [[]]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The hen's 12 eggs", 5),
        ("母鸡 laid 3个", 5),
        ("암탉이 집으로", 2),  # Korean puts spaces between words
        ("मुर्गी घर", 2),  # vowel signs and viramas stand inside words
        ("cafe\u0301 naïve", 2),  # an accent of its own, too
        ("ニワトリ", 4),
        ("𠀀𠀁", 2),
        ("…!?, ,", 0),
    ],
)
def test_words_are_runs_of_letters_marks_and_digits_or_letters_of_scripts_without_spaces(text, count):
    assert [len(row) for row in rows(word_hashes([text]))] == [count]


def test_different_words_have_different_hashes():
    letters = "ab01母鸡é"
    texts = ["".join(some) for n in (1, 2, 3, 4) for some in itertools.product(letters, repeat=n)]
    texts = [text for text in texts if "母" not in text and "鸡" not in text] + ["母", "鸡"]
    assert len(np.unique(word_hashes(texts).values)) == len(texts) == 5 + 25 + 125 + 625 + 2


def test_hashes_do_not_depend_on_the_batch(monkeypatch):
    together = word_hashes(CORPUS)
    assert rows(together) == [row for text in CORPUS for row in rows(word_hashes([text]))]
    assert together.offsets[[0, -1]].tolist() == [0, len(together.values)]
    text = " ".join(CORPUS[0:1] * 50) + CORPUS[2] * 30
    texts = [*CORPUS[:5], text, *CORPUS]
    whole = word_hashes(texts), ngram_hashes(word_hashes(texts), 5)
    monkeypatch.setattr(words, "BATCH", 50)  # long texts are cut, between words
    cut = word_hashes(texts), ngram_hashes(word_hashes(texts), 5)
    assert rows(cut[0])[5] == rows(whole[0])[5]
    assert rows(cut[1])[5] == rows(whole[1])[5]
    assert len(words.cut(text)) > 10
    assert "".join(words.cut(text)) == text


def test_ngrams_are_the_runs_of_n_words():
    texts = ["a b c d a b c", "a b c", "b c", "", "c b"]
    grams = rows(ngram_hashes(word_hashes(texts), 3))
    assert [len(row) for row in grams] == [5, 1, 1, 0, 1]
    assert grams[0][0] == grams[0][4] == grams[1][0]
    assert len(set(grams[0])) == 4
    assert grams[2][0] != grams[4][0]


def test_spans_are_hashed_by_their_values_in_order():
    values = np.random.default_rng(0).integers(0, 2**63, 100).astype(np.uint64)
    starts, ends = np.arange(0, 90), np.arange(0, 90) + np.arange(90) % 9 + 1
    for hash_, a, b in zip(span_hashes(values, starts, ends).tolist(), starts, ends):
        assert hash_ == by_horner(values[a:b].tolist())


def by_horner(values: list[int]) -> int:
    total = 0
    for value in reversed(values):
        total = (total * words.BASE + value) % 2**64
    return int(words.mix64(np.array([total], np.uint64))[0])


def test_hashes_are_the_same_on_every_machine():
    assert word_hashes(["hen 鸡"]).values.tolist() == [by_horner([ord(c) for c in "hen"]), by_horner([ord("鸡")])]
