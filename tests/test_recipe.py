"""What a run that goes on keeps of the earlier one, and what it reads of its own."""

import json

import pytest

import train
from minillm.config import Layer
from minillm.eval.answers import Answered
from minillm.recipe import earlier
from minillm.recipe.answering import predictions, read_answers, sum_up, write_answers
from minillm.recipe.dpo import sum_up_preferences
from minillm.run import RunDirectory

MODEL = {"dim": 64, "n_heads": 4, "ffn_dim": 128, "vocab_multiple": 64}
RANKS = ("dp_replicate", "dp_shard", "tp")


def kept(path, world_size, was, **given):
    """The numbers of ranks that a run keeps which was another number of ranks."""
    (path / "config.json").write_text(json.dumps({"parallel": was, "model": MODEL}))
    given = Layer("command line", {f"parallel.{name}": value for name, value in given.items()})
    (found,) = earlier(train.Config, path, [given], world_size)
    assert found.values["model.dim"] == 64
    return [found.values.get(f"parallel.{name}") for name in RANKS]


@pytest.mark.parametrize(
    ("world_size", "numbers"),
    [
        (16, [2, 4, 2]),
        (8, [None, 4, 2]),  # copies first: no rank has more to hold
        (32, [None, 4, 2]),
        (4, [None, None, 2]),
        (2, [None, None, 2]),
        (3, [None, None, None]),
        (1, [None, None, None]),
    ],
)
def test_numbers_of_ranks_are_kept_as_far_as_they_make_a_layout(tmp_path, world_size, numbers):
    was = {"strategy": "hsdp", "dp_replicate": 2, "dp_shard": 4, "tp": 2}
    assert kept(tmp_path, world_size, was) == numbers


def test_what_was_left_open_fits_and_what_is_given_now_stays(tmp_path):
    was = {"strategy": "fsdp", "dp_replicate": None, "dp_shard": 4, "tp": 1}
    assert kept(tmp_path, 2, was) == [None, None, 1]
    assert kept(tmp_path, 8, was, dp_shard=3) == [None, 4, 1], "refused, as for a new run"
    assert kept(tmp_path, 8, was, dp_shard="none") == [None, 4, 1], "below what is given"
    assert kept(tmp_path, 8, was, strategy="hsdp") == [None, 4, 1]
    assert kept(tmp_path, 8, was, strategy="ddp") == [None, None, 1]


def test_another_mistake_is_left_to_be_told_with_the_others(tmp_path):
    was = {"strategy": "fsdp", "dp_replicate": None, "dp_shard": 4, "tp": 1}
    assert kept(tmp_path, 2, was, timeout="soon") == [None, 4, 1]


def test_answers_are_read_as_they_were_written(tmp_path):
    """Also where they hold what else ends a line."""
    answered = [Answered("file", "one\u2028two\x85?", "a\nb\r\n", "\x0c\u2029"), Answered("file", "é", "", " ")]
    write_answers(predictions(RunDirectory(tmp_path), "after"), answered)
    assert read_answers(RunDirectory(tmp_path), "after") == answered
    assert read_answers(RunDirectory(tmp_path), "before") == []


@pytest.mark.parametrize("same", [True, False], ids=["the same questions", "other questions"])
def test_answers_are_compared_with_those_to_the_same_questions_alone(tmp_path, same):
    """A run may go on with another number of them: then nothing from before is to be compared with."""
    run = RunDirectory(tmp_path)
    later = [Answered("file", question, "yes", "yes") for question in "abcd"]
    earlier = [one._replace(answer="no") for one in (later if same else later[::2])]
    for when, answered in (("before", earlier), ("after", later)):
        write_answers(predictions(run, when), answered)
    metrics = ["exact_match"]
    found = sum_up_preferences(run, metrics, sum_up(run, metrics, {"finished": True}))
    assert found["exact_match"]["after"] == 1
    assert found["exact_match"].get("before") == (0 if same else None)
    assert found.get("win_rate") == (1 if same else None)
    assert ("answer_length" in found) == same
