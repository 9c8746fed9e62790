"""Each rule keeps what is at its threshold and drops what is past it; Chinese is judged as Chinese."""

import dataclasses
import json
import random

import pytest

from minillm.data.clean.config import ALL_RULES, FAMILIES, CleanConfig
from minillm.data.clean.filters import (
    LINE_RULES,
    MEASURES,
    Page,
    first_failed,
    line_rules,
    ngram_shares,
    thresholds,
    without_lines,
    words_of,
)

CHINESE = (
    "那只母鸡每天清晨在山坡上下一个蛋，孩子们沿着小路走来，把它放进篮子里带回村庄。"
    "老人坐在门口晒太阳，看见他们便笑着招手，问今日收获如何。"
)


def words(n, start=0):
    """n different words of four letters."""
    letters = "abcdefghijklmnopqrst"
    return [f"{letters[i // 400 % 20]}{letters[i // 20 % 20]}{letters[i % 20]}x" for i in range(start, start + n)]


def lines(n, change=lambda line: line, changed=0):
    """n different lines, the first few of which are changed."""
    rows = [" ".join(words(5, 5 * i)) for i in range(n)]
    return "\n".join([*map(change, rows[:changed]), *rows[changed:]])


def repeated_run(n, total, copies=2):
    """`total` words of which n-grams of n words are repeated: the first n stand `copies` times."""
    run = words(n)
    rest = words(total - copies * n, 1000)
    return " ".join([*run, *rest, *(run * (copies - 1))])


# rule, threshold, a text whose value is exactly that, and one whose value is just beyond
AT_THRESHOLD = [
    ("max_broken", 0.1, "a�bcdefghi", "a�bcdef�hi"),
    ("max_broken", 0.2, "cafÃ© with", "cafÃ© bar"),
    ("min_words", 3, "one two three", "one two"),
    ("max_words", 3, "one two three", "one two three four"),
    ("min_words", 4, "母鸡，下蛋。", "母鸡，下。"),
    ("min_word_length", 3, "abc abcd ab", "abc abc ab"),
    ("max_word_length", 3, "abc abcd ab", "abc abcd abc"),
    ("max_hashes", 0.5, "#one two", "#one #two"),
    ("max_ellipses", 0.5, "one... two", "one... two…"),
    ("max_bullet_lines", 0.5, "• one\ntwo", "• one\n- two"),
    ("max_ellipsis_lines", 0.5, "one...\ntwo", "one...\ntwo…"),
    ("min_alphabetic_words", 0.5, "a1 22", "a1 22 33"),
    ("min_stop_words", 2, "The hen of ours", "The hen, the hen"),
    ("max_repeated_lines", 0.5, "a\na\nb\nb", "a\na\na\na"),
    ("max_repeated_paragraphs", 0.5, "a\n\na\n\nb\n\nb", "a\n\na\n\na\n\na"),
    ("max_repeated_line_chars", 0.25, "abcd\nabcd\nabcdefgh", "abcd\nabcd\nabcdefg"),
    ("max_repeated_paragraph_chars", 0.25, "abcd\n\nabcd\n\nabcdefgh", "abcd\n\nabcd\n\nabcdefg"),
    ("max_top_2_gram", 0.4, repeated_run(2, 10), repeated_run(2, 9)),
    ("max_top_3_gram", 0.3, repeated_run(3, 20), repeated_run(3, 19)),
    ("max_top_4_gram", 0.4, repeated_run(4, 20), repeated_run(4, 19)),
    *((f"max_repeated_{n}_gram", 0.25, repeated_run(n, 4 * n), repeated_run(n, 4 * n - 1)) for n in range(5, 11)),
    ("max_lorem_ipsum", 1, "Lorem ipsum dolor", "Lorem ipsum, lorem ipsum"),
    ("max_curly_brackets", 2, "a {b}", "a {b} {"),
    ("min_sentences", 2, 'He came. "I came!"', "He came. I came"),
    ("min_sentences", 2, "他来了。我走了！", "他来了，我走了。"),
]


@pytest.mark.parametrize(("rule", "limit", "at", "beyond"), AT_THRESHOLD)
def test_a_rule_keeps_what_is_at_its_threshold_and_drops_what_is_beyond(rule, limit, at, beyond):
    config = CleanConfig(rules=[rule], **{rule: limit})
    assert list(thresholds(config)) == [rule]
    assert MEASURES[rule](Page(at, config)) == pytest.approx(limit)
    assert first_failed(Page(at, config), {rule: MEASURES[rule](Page(at, config))}) is None
    assert first_failed(Page(beyond, config), thresholds(config))[0] == rule
    off = dataclasses.replace(config, **{rule: None})
    assert first_failed(Page(beyond, off), thresholds(off)) is None


def test_every_rule_has_a_measure_and_a_family():
    assert MEASURES.keys() | LINE_RULES.keys() == ALL_RULES
    covered = {row[0] for row in AT_THRESHOLD} | set(LINE_RULES)
    assert covered == ALL_RULES - {"min_script_share"}


def test_the_thresholds_are_those_of_the_papers():
    """Gopher: Rae et al. 2021, section A.1.1 and table A1. C4: Raffel et al. 2020, section 2.2."""
    gopher = dict(zip(FAMILIES["gopher"], (50, 100_000, 3, 10, 0.1, 0.1, 0.9, 0.3, 0.8, 2)))
    shares = (0.3, 0.3, 0.2, 0.2, 0.2, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    repetition = dict(zip(FAMILIES["repetition"], shares))
    assert thresholds(CleanConfig(rules=["gopher", "repetition"])) == gopher | repetition
    c4 = {"max_lorem_ipsum": 0, "max_curly_brackets": 0, "min_sentences": 5}
    assert thresholds(CleanConfig(rules=["c4"])) == c4


@pytest.mark.parametrize(
    ("scripts", "kept"), [(["Latin"], False), (["Han"], True), (["Latin", "Han"], True), ([], True)]
)
def test_the_share_of_scripts_counts_letters(scripts, kept):
    page = Page("母鸡下蛋了 ok 12345!", CleanConfig(scripts=scripts))  # five letters and two
    failed = first_failed(
        page, thresholds(page.config) | {"min_words": 0, "min_alphabetic_words": 0, "min_stop_words": 0}
    )
    assert (failed is None) == kept
    if not kept:
        assert failed == ("min_script_share", pytest.approx(2 / 7))


def test_chinese_passes_the_rules_made_for_english():
    """Its words are characters: neither their length nor missing English words count, and punctuation is none."""
    page = Page(CHINESE, CleanConfig())
    assert first_failed(page, thresholds(page.config)) is None
    assert words_of("母鸡，下 two蛋。") == ["母", "鸡", "下", "two", "蛋"]
    assert MEASURES["min_stop_words"](page) is MEASURES["max_word_length"](page) is None


def test_repetition_of_chinese_is_measured_in_pairs_of_characters():
    text = "一二三四五六七八九十" + "天地玄黄宇宙洪荒日月盈昃辰宿列张" + "一二三四五六七八九十"
    page = Page(text, CleanConfig())
    assert page.ngrams[5] == pytest.approx(10 / 36)
    assert page.ngrams[6] == 0


def slow_ngram_shares(page_words):
    """The same by its definition: every n-gram is looked at."""
    total, shares = sum(map(len, page_words)), {}
    for n in range(2, 11):
        grams = [tuple(page_words[i : i + n]) for i in range(len(page_words) - n + 1)]
        counts = {gram: grams.count(gram) for gram in grams}
        if n <= 4:
            most = max(counts.values(), default=0)
            sizes = [most * sum(map(len, gram)) for gram, count in counts.items() if count == most]
            shares[n] = min(1, max(sizes) / total) if most > 1 else 0
        else:
            again = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
            shares[n] = sum(len(page_words[i]) for i in again) / total
    return shares


def test_ngram_shares_are_those_of_their_definition():
    draw = random.Random(0)
    for _ in range(200):
        some = draw.choices(["a", "bb", "ccc", "d", "ee"], k=draw.randrange(1, 60))
        assert ngram_shares(some) == pytest.approx(slow_ngram_shares(some))
    assert set(ngram_shares([]).values()) == {0.0}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("A hen laid an egg.", None),
        ('"Did a hen come?"', None),
        ("那只母鸡下了一个蛋。", None),
        ("“那只母鸡下了一个蛋。”", None),
        ("A hen laid an egg", "line_end"),
        ("A hen laid an egg...", "line_end"),
        ("Two words.", "line_min_words"),
        ("Please enable JavaScript to read on.", "line_phrases"),
        ("By reading on you accept our Privacy Policy.", "line_phrases"),
        (f"A line with {'x' * 1001} inside.", "line_max_word_length"),
    ],
)
def test_a_line_is_removed_by_the_first_rule_that_it_fails(line, rule):
    config = CleanConfig(rules=["c4"])
    text = f"The first line stays here.\n\n{line}\nThe last line stays too."
    cleaned, removed = without_lines(text, line_rules(config), config)
    assert dict(removed) == ({rule: 1} if rule else {})
    assert cleaned == (text.replace(line + "\n", "") if rule else text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": ["gofer"]}, "rules: 'gofer' is no rule; did you mean gopher?"),
        ({"rules": ["max_top2_gram"]}, "did you mean max_top_2_gram?"),
        ({"min_sentences": 3}, "min_sentences: its rule is not in use; add min_sentences or its family, c4"),
        ({"line_end": False}, "line_end: its rule is not in use"),
        ({"scripts": ["Lattin"]}, "did you mean Latin?"),
        ({"rules": ["gopher"], "scripts": ["Latin"]}, "scripts: their rule is not in use; add min_script_share"),
        ({"privacy": ["mail"]}, "did you mean email?"),
        ({"rules": ["c4"], "stop_words": ["le", "la"]}, "stop_words: their rule is not in use; add min_stop_words"),
        ({"stop_words": ["le", "La"]}, "stop_words: 'La' is not in lower case, so it would never be found"),
        ({"rules": ["c4"], "line_phrases": ["Menu"]}, "line_phrases: 'Menu' is not in lower case"),
        ({"stop_words": ["le"]}, "min_stop_words: is 2, and clean.stop_words has 1; no text would be kept"),
        ({"min_words": 9, "max_words": 8}, "min_words: is 9 and max_words 8; no text would be kept"),
        ({"min_word_length": 11}, "min_word_length: is 11 and max_word_length 10; no text would be kept"),
        ({"against_field": "question"}, "against_field: is for test files; name them in clean.against"),
        ({"against_share": 0.5}, "against_share: is for test files; name them in clean.against"),
        ({"privacy": [], "placeholder": "X"}, "placeholder: nothing is replaced where clean.privacy is []"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match="is") as error:
        CleanConfig(**settings)
    assert message in str(error.value)


def test_real_web_text_mostly_passes(real_data):
    """C4 has been filtered before: few of its documents fail Gopher's rules, but for the shortest."""
    texts = [json.loads(line)["text"] for line in (real_data / "c4.jsonl").open()]
    config = CleanConfig()
    failed = [first_failed(Page(text, config), thresholds(config)) for text in texts]
    assert 0.8 < failed.count(None) / len(texts) < 0.95
    assert sum(rule is not None and rule[0] == "min_words" for rule in failed) > 10
    damaged = [text for text, rule in zip(texts, failed) if rule and rule[0] == "max_broken"]
    assert damaged
    assert all("�" in text for text in damaged)
