"""Pairs of answers about the embedded corpus: what nobody can know is not invented."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from minillm.data import stories
from minillm.data.config import PreferencesConfig
from minillm.data.corpus import with_pairs
from minillm.data.stories import pairs, write_pairs, write_questions
from minillm.data.stories.questions import FAMILIES
from minillm.data.stories.unknown import NOBODY_KNOWS, STRANGERS, UNKNOWN
from minillm.data.stories.world import PEOPLE


@pytest.fixture(scope="module")
def found():
    return {split: list(pairs(0, 1200, split)) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


def test_the_bytes_of_pairs_are_the_same_on_every_machine(folder):
    written = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.jsonl")))
    assert hashlib.sha256(written).hexdigest()[:16] == "28d061e11047eef4"


def test_held_out_pairs_ask_the_questions_that_are_held_out_of_fine_tuning(folder, tmp_path):
    write_questions(tmp_path)
    for family in FAMILIES:
        ours, theirs = (
            [json.loads(line) for line in (kind / f"heldout/{family}.jsonl").read_text().splitlines()]
            for kind in (folder, tmp_path)
        )
        assert [(one["prompt"], one["chosen"]) for one in ours] == [(one["question"], one["answer"]) for one in theirs]


def test_every_fourth_question_is_one_that_nobody_can_answer(found):
    for one in found["train"] + found["heldout"]:
        assert (one.question.family == UNKNOWN) == (one.question.answer == NOBODY_KNOWS)
        assert one.rejected != one.question.answer
    families = Counter(one.question.family for one in found["heldout"])
    assert families == dict.fromkeys((UNKNOWN, *FAMILIES), 300)


def test_what_nobody_knows_is_of_a_stranger(found):
    names = {person.name for person in PEOPLE}
    for split, strangers in STRANGERS.items():
        assert not names & set(strangers)
        for asked in (one.question for one in found[split] if one.question.family == UNKNOWN):
            words = set(re.findall(r"\w+", asked.question))
            assert not asked.context
            assert len(words & set(strangers)) == 1, asked
            assert not words & names, asked


def test_what_is_held_out_is_never_trained_on(found):
    train = {(one.question.context, one.question.question) for one in found["train"]}
    assert not train & {(one.question.context, one.question.question) for one in found["heldout"]}
    assert not set(STRANGERS["train"]) & set(STRANGERS["heldout"])


def test_what_is_rejected_is_no_habit(found):
    rejected = Counter(one.rejected for one in found["train"] if one.question.family == UNKNOWN)
    assert len(rejected) > 100
    assert max(rejected.values()) < 0.05 * rejected.total()


def test_a_section_without_a_path_gets_the_pairs_and_those_that_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "N_PAIRS", 200)
    monkeypatch.setattr(stories, "N_HELD_OUT", 10)
    left_open = PreferencesConfig(cache_dir=str(tmp_path))
    data = with_pairs(left_open)
    learned = Path(data.path).read_text().splitlines()
    assert len(learned) == 200
    read = {path.stem: path.read_text().splitlines() for path in Path(data.val).iterdir()}
    assert {name: len(rows) for name, rows in read.items()} == dict.fromkeys((UNKNOWN, *FAMILIES), 10)
    assert not {row for rows in read.values() for row in rows} & set(learned)
    assert with_pairs(data) == data

    Path(data.path).write_text("what is there is not written again")
    assert with_pairs(left_open) == data
    assert Path(data.path).read_text() == "what is there is not written again"

    said = PreferencesConfig(cache_dir=str(tmp_path), val="hash 0.1")
    assert (with_pairs(said).path, with_pairs(said).val) == (data.path, "hash 0.1")
    own = PreferencesConfig(cache_dir=str(tmp_path / "untouched"), path="own.jsonl")
    assert with_pairs(own) == own
    assert not (tmp_path / "untouched").exists()
