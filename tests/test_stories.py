"""The embedded corpus is the same everywhere, and its questions have one right answer each."""

import hashlib
import json
from collections import Counter

import pytest

from minillm.data.stories import questions, stories, write_stories
from minillm.data.stories.questions import FAMILIES
from minillm.data.stories.world import facts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    write_stories(path)
    return path


@pytest.fixture(scope="module")
def texts(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def asked():
    return {split: list(questions(0, 1200, split)) for split in ("train", "heldout")}


def test_the_bytes_are_the_same_on_every_machine(corpus):
    """When the stories are changed on purpose, give the cached file a new number too: STORIES in data/corpus.py."""
    assert (
        hashlib.sha256(corpus.read_bytes()).hexdigest()
        == "fe741d2bede11917355b6fe9d1b65e8b661fc7e22bfa84fc382ee63d9bcfa2d0"
    )


def test_another_seed_tells_other_stories():
    first, second = (next(stories(seed, 1)) for seed in (0, 1))
    assert first != second


def test_there_are_twenty_thousand_distinct_english_stories_and_a_few_chinese(corpus, texts):
    chinese = [text for text in texts if any("\u4e00" <= character <= "\u9fff" for character in text)]
    assert len(set(texts)) == len(texts)
    assert len(texts) - len(chinese) >= 20_000
    assert 0 < len(chinese) <= len(texts) / 10
    assert 5e6 <= corpus.stat().st_size <= 10e6


def test_every_sentence_begins_with_a_capital_and_ends(texts):
    english = [text for text in texts if text.isascii()]
    assert all(text.lstrip('"')[0].isupper() for text in english)
    assert all(text.rstrip('"')[-1] in ".!?" for text in english)


def test_every_fact_of_the_world_is_told_often(texts):
    joined = " ".join(texts)
    assert min(joined.count(value) for _, _, value in facts()) >= 100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_many_answers_and_no_majority_to_guess(asked, family):
    answers = Counter(question.answer for question in asked["heldout"] if question.family == family)
    assert len(answers) >= 20
    assert max(answers.values()) <= 0.2 * sum(answers.values())


def test_held_out_questions_and_their_stories_are_never_trained_on(texts, asked):
    train = {(question.context, question.question) for question in asked["train"]}
    assert not train & {(question.context, question.question) for question in asked["heldout"]}
    corpus = "\n".join(texts)
    assert not [q for q in asked["heldout"] if (q.context or q.question) in corpus]


def test_a_question_asked_twice_has_the_same_answer(asked):
    answers = {}
    for question in [*asked["train"], *asked["heldout"]]:
        assert answers.setdefault((question.context, question.question), question.answer) == question.answer


def test_the_answer_to_a_reading_question_stands_in_the_story(asked):
    missing = [
        q for q in asked["heldout"] if q.family == "reading" and q.answer.split()[-1].lower() not in q.context.lower()
    ]
    assert not missing


def test_questions_repeat_under_a_seed():
    assert list(questions(3, 20)) == list(questions(3, 20))
    assert list(questions(3, 20)) != list(questions(4, 20))
