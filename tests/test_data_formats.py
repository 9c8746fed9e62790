"""A file says in which fields of its rows what is, by data.columns or by a dataset_info.json beside it."""

import json
import re

import pytest

from minillm.data.chat_templates import Message
from minillm.data.conversations import conversation_of
from minillm.data.formats import layout_of, read_columns

PAIR = [Message("user", "hi"), Message("assistant", "ho")]
SYSTEM = Message("system", "be brief")
CALL = '{"name": "look", "arguments": {}}'
TOOL = '{"type": "function", "function": {"name": "look"}}'


def test_columns_name_the_fields_of_any_file():
    layout = layout_of("any.jsonl", read_columns(["prompt=ask", "response=reply", "system=tone"]))
    row = {"ask": "hi", "reply": "ho", "tone": "be brief", "instruction": "x", "output": "y"}
    assert conversation_of(row, layout).messages == [SYSTEM, *PAIR]
    with pytest.raises(ValueError, match=r'field "reply" is missing \(found: ask\)'):
        conversation_of({"ask": "hi"}, layout)
    layout = layout_of("any.jsonl", read_columns(["messages=talk"]))
    assert (
        conversation_of({"talk": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, layout).messages
        == PAIR
    )


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["prompt"], "'prompt' is no PART=FIELD"),
        (["promt=a", "response=b"], "promt is no part of a conversation; did you mean prompt?"),
        (["prompt=a"], "prompt are given; prompt and response, messages, or text are needed"),
    ],
)
def test_columns_that_say_nothing_are_refused(pairs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_columns(pairs)


def test_a_dataset_info_beside_a_file_says_how_it_is_read(tmp_path):
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "U", "assistant_tag": "A", "observation_tag": "O"}
    tags |= {"function_tag": "F"}
    columns = {"messages": "talk", "system": "tone", "tools": "offer"}
    info = {
        "alpaca_like": {"file_name": "a.json", "columns": {"prompt": "ask", "response": "reply"}},
        "talk": {"file_name": "b.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "elsewhere": {"hf_hub_url": "somebody/something"},
        "twice": {"file_name": "c.json", "columns": {"prompt": "x", "response": "y"}},
        "again": {"file_name": "c.json", "columns": {"prompt": "y", "response": "x"}},
        "half": {"file_name": "d.json", "columns": {"prompt": "x"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert conversation_of({"ask": "hi", "reply": "ho"}, layout_of(tmp_path / "a.json", {})).messages == PAIR
    talk = [{"who": "U", "said": "hi"}, {"who": "A", "said": "x"}, {"who": "O", "said": "y"}, {"who": "A", "said": "z"}]
    found = conversation_of({"talk": talk, "tone": "be brief"}, layout_of(tmp_path / "b.json", {}))
    assert found.messages == [SYSTEM, PAIR[0], *map(Message, ["assistant", "tool", "assistant"], "xyz")]
    found = conversation_of(
        {"talk": [*talk[:1], {"who": "F", "said": CALL}], "offer": TOOL.join("[]")}, layout_of(tmp_path / "b.json", {})
    )
    assert found.messages == [Message("tools", TOOL), PAIR[0], Message("assistant", "", (CALL,))]
    assert layout_of(tmp_path / "z.json", {}) is None
    with pytest.raises(ValueError, match=r"describes c\.json in several ways; say which by data.columns"):
        layout_of(tmp_path / "c.json", {})
    with pytest.raises(ValueError, match="half: its columns are not enough for a conversation; prompt and response"):
        layout_of(tmp_path / "d.json", {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"columns": ["ask", "reply"]}, "talk: columns is a list; an object with names is expected"),
        ({"columns": {"prompt": ["ask"], "response": "reply"}}, "talk: columns.prompt is a list; a name is expected"),
        ({"columns": {"messages": "talk"}, "tags": ["who"]}, "talk: tags is a list; an object with names is expected"),
        ({"columns": {"messages": "talk"}, "tags": {"user_tag": 1}}, "talk: tags.user_tag is a number; a name is exp"),
        ({"formatting": "vicuna", "tags": {"role_tag": "who"}}, "talk: formatting 'vicuna' is not known; alpaca"),
        ({"formatting": ["openai"], "tags": {"role_tag": "who"}}, "formatting ['openai'] is not known; alpaca"),
    ],
    ids=str,
)
def test_an_entry_of_a_dataset_info_that_cannot_be_read_is_named(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"talk": {"file_name": "a.json", **entry}}))
    with pytest.raises(ValueError, match=re.escape(message)):
        layout_of(tmp_path / "a.json", {})
