"""Rows of any usual format become preferences; what cannot be learned from is named by file and row."""

import json
import re
from pathlib import Path

import pytest

from minillm.data.chat_templates import Message
from minillm.data.formats import layout_of, read_columns
from minillm.data.preference_store import answers_in
from minillm.data.preferences import PREFERENCES, PreferencePair, preference_of
from minillm.data.records import records

DATA = Path(__file__).parent.parent / "data"
USER = Message("user", "hi")
GOOD, BAD = [Message("assistant", "ho")], [Message("assistant", "no")]
SYSTEM = Message("system", "be brief")
PLAIN = PreferencePair([USER], GOOD, BAD)
WITH_SYSTEM = PreferencePair([SYSTEM, USER], GOOD, BAD)
BEFORE = [Message("user", "a"), Message("assistant", "b")]
TWO_LINES = PreferencePair([Message("user", "h\ni")], GOOD, BAD)
CHAT = PreferencePair([*BEFORE, USER], GOOD, BAD)


def say(role, content):
    return {"role": role, "content": content}


def share(role, value):
    return {"from": role, "value": value}


ASKED, SHARED = say("user", "hi"), share("human", "hi")
CHOSEN, REJECTED = say("assistant", "ho"), say("assistant", "no")
TALK = [say("user", "a"), say("assistant", "b"), ASKED]


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, PLAIN),
        ({"prompt": "hi", "chosen": "ho", "rejected": "no", "system": "be brief"}, WITH_SYSTEM),
        ({"question": "hi", "chosen": "ho", "rejected": "no"}, PLAIN),
        ({"prompt": [ASKED], "chosen": [CHOSEN], "rejected": [REJECTED]}, PLAIN),
        ({"prompt": [say("system", "be brief"), ASKED], "chosen": CHOSEN, "rejected": "no"}, WITH_SYSTEM),
        ({"instruction": "h", "input": "i", "chosen": "ho", "rejected": "no"}, TWO_LINES),
        ({"instruction": "hi", "history": [["a", "b"]], "chosen": "ho", "rejected": "no"}, CHAT),
        ({"conversations": [SHARED], "chosen": share("gpt", "ho"), "rejected": share("gpt", "no")}, PLAIN),
        ({"conversations": [SHARED], "system": "be brief", "chosen": "ho", "rejected": "no"}, WITH_SYSTEM),
        ({"messages": TALK, "chosen": CHOSEN, "rejected": REJECTED}, CHAT),
        ({"chosen": [*TALK, CHOSEN], "rejected": [*TALK, REJECTED]}, CHAT),
        ({"prompt": "hi", "chosen": [*TALK, CHOSEN], "rejected": [*TALK, REJECTED]}, CHAT),
        ({"system": "be brief", "chosen": [ASKED, CHOSEN], "rejected": [ASKED, REJECTED]}, WITH_SYSTEM),
        ({"prompt": "hi", "completion": "ho", "label": True}, PLAIN._replace(rejected=[])),
        ({"prompt": "hi", "completion": "no", "label": "False"}, PLAIN._replace(chosen=[])),
        ({"messages": [*TALK, REJECTED], "label": 0}, CHAT._replace(chosen=[])),
        ({"conversations": [SHARED, share("gpt", "ho")], "label": True}, PLAIN._replace(rejected=[])),
        ({"instruction": "hi", "input": "", "output": "ho", "label": True}, PLAIN._replace(rejected=[])),
    ],
)  # fmt: skip
def test_each_format_is_recognised_by_its_fields(row, preference):
    assert preference_of(row) == preference


def test_what_two_conversations_share_is_the_prompt_up_to_the_answer_that_differs():
    calls = [say("user", "hi"), say("assistant", "f"), say("tool", "1")]
    found = preference_of({"chosen": [*calls, CHOSEN], "rejected": [*calls, REJECTED]})
    assert found.prompt == [Message(**message) for message in calls]
    found = preference_of({"chosen": [ASKED, CHOSEN, *TALK, CHOSEN], "rejected": [ASKED, REJECTED, *TALK[:2]]})
    assert (found.prompt, len(found.chosen), len(found.rejected)) == ([USER], 5, 3)
    found = preference_of({"chosen": [ASKED, CHOSEN], "rejected": [ASKED, CHOSEN]})
    assert found == PreferencePair([USER], GOOD, GOOD)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("hi", "the row is text; an object with fields is expected"),
        ({"title": "a"}, "the format is not known (found: title); name the fields in data.columns, or use prompt and"),
        ({"prompt": "hi", "chosen": "ho"}, 'field "rejected" is missing (found: prompt, chosen)'),
        ({"prompt": "hi", "rejected": "ho"}, 'field "chosen" is missing (found: prompt, rejected)'),
        ({"prompt": "hi", "chosen": None, "rejected": "ho"}, 'field "chosen" is null; text is expected'),
        ({"prompt": "hi", "chosen": "ho", "rejected": 5}, 'field "rejected" is a number; text is expected'),
        ({"prompt": 5, "chosen": "ho", "rejected": "no"}, 'field "prompt" is a number; text is expected'),
        ({"chosen": "ho", "rejected": "no"}, 'field "chosen" begins with an answer; what is asked is missing'),
        ({"prompt": "hi", "chosen": [], "rejected": "no"}, 'field "chosen": the last message is of user; an assistant'),
        ({"prompt": "hi", "chosen": [ASKED, CHOSEN], "rejected": "no"}, 'field "chosen" is a whole conversation, and'),
        ({"messages": [*TALK, CHOSEN], "chosen": "ho", "rejected": "no"}, 'message 4: assistant after assistant'),
        ({"messages": [], "chosen": "ho", "rejected": "no"}, "message 0: assistant at the beginning; roles are out of"),
        ({"prompt": "hi", "chosen": [say("boss", "x")], "rejected": "n"}, "role 'boss' is none of system, developer"),
        ({"chosen": [ASKED, CHOSEN], "rejected": TALK[:2]}, "message 0 differs, and is no answer; chosen and"),
        ({"prompt": "hi", "chosen": "a\0", "rejected": "no"}, 'field "chosen": a NUL character in the text'),
        ({"instruction": "x", "history": [["a", " "]], "chosen": "h", "rejected": "n"}, "message 1: the answer is"),
        ({"prompt": "hi", "completion": "ho", "label": "good"}, "is 'good'; true or false is expected"),
        ({"messages": TALK, "label": True}, "the last message is of user; an assistant turn is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_named(row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        preference_of(row)


# --- other names ------------------------------------------------------------------------------------------------------


def test_columns_name_the_fields_of_any_file():
    layout = layout_of("any", read_columns(["prompt=ask", "chosen=good", "rejected=bad"], PREFERENCES), PREFERENCES)
    assert preference_of({"ask": "hi", "good": "ho", "bad": "no", "chosen": "x", "rejected": "y"}, layout) == PLAIN
    with pytest.raises(ValueError, match=r'field "bad" is missing \(found: ask, good\)'):
        preference_of({"ask": "hi", "good": "ho"}, layout)
    layout = layout_of("any", read_columns(["messages=talk", "label=fine"], PREFERENCES), PREFERENCES)
    assert preference_of({"talk": [ASKED, CHOSEN], "fine": True}, layout) == PLAIN._replace(rejected=[])
    with pytest.raises(ValueError, match=r'field "fine" is missing \(found: talk\)'):
        preference_of({"talk": [ASKED, CHOSEN]}, layout)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["chose=a", "rejected=b"], "chose is no part of a preference; did you mean chosen?"),
        (
            ["prompt=a", "chosen=b"],
            "prompt, chosen are given; chosen and rejected, with or without",
        ),
    ],
)
def test_columns_that_say_nothing_are_refused(pairs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_columns(pairs, PREFERENCES)


def test_a_dataset_info_beside_a_file_says_how_it_is_read(tmp_path):
    ranking = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "U", "assistant_tag": "A"}
    info = {
        "pairs": {"file_name": "a.json", "ranking": True, "columns": ranking},
        "labels": {
            "file_name": "b.json", "formatting": "sharegpt", "columns": {"messages": "talk", "kto_tag": "fine"},
            "tags": tags,
        },
        "half": {"file_name": "c.json", "columns": {"prompt": "x", "response": "y"}},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    layout = layout_of(tmp_path / "a.json", {}, PREFERENCES)
    assert preference_of({"ask": "hi", "good": "ho", "bad": "no"}, layout) == PLAIN
    talk = [{"who": "U", "said": "hi"}, {"who": "A", "said": "no"}]
    layout = layout_of(tmp_path / "b.json", {}, PREFERENCES)
    assert preference_of({"talk": talk, "fine": False}, layout) == PLAIN._replace(chosen=[])
    with pytest.raises(ValueError, match="half: its columns are not enough for a preference; chosen and rejected"):
        layout_of(tmp_path / "c.json", {}, PREFERENCES)


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_first_row_says_what_a_file_holds(tmp_path):
    rows = {
        "pairs": {"prompt": "hi", "chosen": 5, "rejected": "no"},
        "half": {"prompt": "hi", "chosen": "ho"},
        "labels": {"prompt": "hi", "completion": "ho", "label": True},
        "answers": {"prompt": "hi", "completion": "ho"},
        "numbers": 5,
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    found = {name: answers_in(tmp_path / f"{name}.jsonl", {}) for name in rows}
    assert found == {"pairs": "pairs", "half": "pairs", "labels": "labels", "answers": None, "numbers": None}
    assert answers_in(tmp_path / "answers.jsonl", {"messages": "talk", "label": "fine"}) == "labels"


def test_an_entry_of_a_dataset_info_that_names_no_fields_leaves_it_to_the_first_row(tmp_path):
    talk = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    pair = {"chosen": "", "rejected": ""}
    rows = {"said.json": talk, "liked.json": talk | {"label": True}, "better.json": talk | pair}
    info = {name: {"file_name": name, "formatting": "sharegpt", "tags": {"role_tag": "from"}} for name in rows}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps([row]))
    assert [answers_in(tmp_path / name, {}) for name in rows] == [None, None, "pairs"]


def test_the_example_files_are_preferences():
    names = {
        "pairs": ["pairs.jsonl", "pairs_sharegpt.json", "pairs_messages.jsonl", "critic.jsonl"],
        "labels": ["labels.jsonl", "labels_messages.jsonl"],
    }
    for name, answers in ((name, answers) for answers, each in names.items() for name in each):
        assert answers_in(DATA / name, {}) == answers
        layout = layout_of(DATA / name, {}, PREFERENCES)
        found = [preference_of(row, layout) for _, row in records(DATA / name)]
        assert len(found) >= 2
        assert {one.paired for one in found} == {answers == "pairs"}
    assert not any(answers_in(DATA / name, {}) for name in ("alpaca.json", "messages.jsonl", "tutor.jsonl"))


@pytest.mark.parametrize("name", ["dpo_en", "dpo_zh", "kto_en"])
def test_real_preferences_are_read(real_data, name):
    path = real_data / f"{name}.json"
    assert answers_in(path, {}) == ("pairs" if name.startswith("dpo") else "labels")
    found = [preference_of(row) for _, row in records(path)]
    assert len(found) >= 299
    assert {one.paired for one in found} == {name.startswith("dpo")}
    assert all(one.prompt[-1].role == "user" for one in found)
