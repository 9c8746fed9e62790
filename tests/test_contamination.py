"""A document is contaminated exactly where it holds a run of words of a test."""

import random
import re

import pytest

from minillm.data.clean import contamination
from minillm.data.clean.contamination import Contamination, contaminated, index_tests

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def by_brute_force(texts, tests, n, min_words, share):
    """Sets of tuples of words, every document against every test."""

    def grams(text, size):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    found = []
    for i, text in enumerate(texts):
        best = None
        for place, test in tests:
            length = len(re.findall(r"\w+", test))
            if length < min_words:
                continue
            size = min(n, length)
            common = len(grams(test, size) & grams(text, size)) / len(grams(test, size))
            if common > 0 and common >= share and (best is None or common > best.share):
                best = Contamination(i, place, common)
        found += [best] if best else []
    return found


@pytest.mark.parametrize(
    ("n", "min_words", "share"), [(13, 8, 0.0), (5, 3, 0.0), (5, 3, 0.3), (4, 6, 0.5), (3, 1, 1.0)]
)
def test_the_same_documents_and_tests_are_found_as_by_brute_force(n, min_words, share, monkeypatch):
    rng = random.Random(0)

    def words(count):
        return [rng.choice(LETTERS) for _ in range(count)]

    tests = [(f"test.jsonl:{i}", " ".join(words(rng.randrange(1, 25)))) for i in range(60)]
    texts = []
    for _ in range(80):
        pieces = words(rng.randrange(0, 40))
        for _ in range(rng.randrange(3)):  # parts of tests, written otherwise
            part = rng.choice(tests)[1].split()
            start = rng.randrange(len(part))
            pieces[len(pieces) // 2 : len(pieces) // 2] = part[start : start + rng.randrange(1, 25)]
        texts.append(rng.choice([" ", ", ", "\n- "]).join(pieces).upper())
    expected = by_brute_force(texts, tests, n, min_words, share)
    assert 3 < len(expected) < 80
    assert contaminated(texts, index_tests(tests, n, min_words), share) == expected
    monkeypatch.setattr(contamination, "TESTS", 7)
    monkeypatch.setattr("minillm.data.clean.words.BATCH", 200)
    assert contaminated(texts, index_tests(tests, n, min_words), share) == expected


def test_a_short_test_is_looked_for_whole_and_a_shorter_one_is_left_out():
    tests = [
        ("quiz.txt:1", "What is the name of the hen next door?"),
        ("quiz.txt:2", "Who ran home?"),
        ("quiz.txt:3", "..."),
    ]
    index = index_tests(tests)
    assert index.skipped == ["quiz.txt:2", "quiz.txt:3"]
    texts = ["So what is the name of the hen next door", "what is the name of the hen", "Who ran home?", ""]
    assert contaminated(texts, index) == [Contamination(0, "quiz.txt:1", 1.0)]


def test_chinese_tests_are_found_by_characters():
    index = index_tests([("题.jsonl:1", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。")])
    texts = ["他念道：处处闻啼鸟，夜来风雨声，花落知多。", "处处闻啼鸟，夜来风雨。"]
    assert [(found.document, found.test) for found in contaminated(texts, index)] == [(0, "题.jsonl:1")]


def test_without_tests_nothing_is_contaminated():
    assert contaminated(["a text"], index_tests([])) == []
    assert contaminated([], index_tests([("t:1", "a text")], min_words=1)) == []


def test_impossible_settings_are_refused():
    for settings in ({"n": 0}, {"min_words": 0}):
        with pytest.raises(ValueError, match="both must be 1 or more"):
            index_tests([], **settings)
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        contaminated([], index_tests([]), share=1.5)
