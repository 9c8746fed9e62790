"""Rows of any usual format become conversations; what cannot be learned from is named by file and row."""

import gzip
import json
import re
from pathlib import Path

import pytest

from minillm.data.chat_templates import Message
from minillm.data.conversations import Conversation, conversation_of
from minillm.data.formats import layout_of
from minillm.data.records import records

DATA = Path(__file__).parent.parent / "data"
PAIR = [Message("user", "hi"), Message("assistant", "ho")]
USES_TOOLS = ["user", "assistant", "tool", "tool", "assistant"]
SYSTEM = Message("system", "be brief")
CALL = '{"name": "look", "arguments": {"at": "是"}}'
CALLS = Message("assistant", "", (CALL,))
TOOL = '{"name": "look", "parameters": {"type": "object"}}'
OFFERED = Message("tools", '{"type": "function", "function": ' + TOOL + "}")


def say(role, content):
    return {"role": role, "content": content}


def share(role, value):
    return {"from": role, "value": value}


ASKED, ANSWERED = share("human", "hi"), [share("observation", "o"), share("gpt", "g")]
RESULT = [Message("tool", "o"), Message("assistant", "g")]
NO_CALL = {"tool_calls": None}
OPENAI_CALL = {"role": "assistant", "content": None}
OPENAI_CALL |= {
    "tool_calls": [{"type": "function", "id": "7", "function": {"name": "look", "arguments": '{"at": "是"}'}}]
}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "hi", "output": "ho"}, PAIR),
        ({"instruction": "hi", "input": "", "output": "ho", "system": None, "history": []}, PAIR),
        ({"instruction": "hi", "input": "you", "output": "ho"}, [Message("user", "hi\nyou"), PAIR[1]]),
        (
            {"instruction": "hi", "output": "ho", "system": "be brief", "history": [["a", "b"], ["c", "d"]]},
            [SYSTEM, *map(Message, ["user", "assistant"] * 2, "abcd"), *PAIR],
        ),
        ({"conversations": [share("human", "hi"), share("gpt", "ho")]}, PAIR),
        ({"system": "be brief", "conversations": [share("human", "hi"), share("gpt", "ho")]}, [SYSTEM, *PAIR]),
        ({"conversations": [share("system", "be brief"), share("human", "hi"), share("gpt", "ho")]}, [SYSTEM, *PAIR]),
        ({"conversations": [ASKED, share("function_call", CALL), *ANSWERED]}, [PAIR[0], CALLS, *RESULT]),
        (
            {"conversations": [ASKED, share("function_call", f"[{CALL}, {CALL}]")], "tools": f"[{TOOL}]"},
            [OFFERED, PAIR[0], Message("assistant", "", (CALL, CALL))],
        ),
        (
            {"messages": [say("user", "hi"), OPENAI_CALL, say("tool", "o"), say("assistant", "g") | NO_CALL]}
            | {"tools": [{"type": "function", "function": json.loads(TOOL)}]},
            [OFFERED, PAIR[0], CALLS, *RESULT],
        ),
        (
            {"messages": [say("user", "hi"), say("assistant", "ho") | {"tool_calls": [json.loads(CALL)]}], "tools": []},
            [PAIR[0], Message("assistant", "ho", (CALL,))],
        ),
        ({"prompt": "hi", "completion": "ho", "tools": f"[{TOOL}]"}, [OFFERED, *PAIR]),
        ({"messages": [say("system", "be brief"), say("user", "hi"), say("assistant", "ho")]}, [SYSTEM, *PAIR]),
        ({"messages": list(map(say, USES_TOOLS, "hf123"))}, list(map(Message, USES_TOOLS, "hf123"))),
        ({"prompt": "hi", "completion": "ho"}, PAIR),
        ({"prompt": [say("user", "hi")], "completion": [say("assistant", "ho")]}, PAIR),
        ({"question": "hi", "answer": "h\r\no", "id": 3}, [PAIR[0], Message("assistant", "h\no")]),
    ],
)  # fmt: skip
def test_each_format_is_recognised_by_its_fields(row, messages):
    assert conversation_of(row) == Conversation(messages)


def test_plain_text_is_nobodys():
    assert conversation_of({"text": "once"}) == Conversation([], "once")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "a", "body": "b"}, "the format is not known (found: title, body); name the fields in data.columns"),
        ({}, "the format is not known (found: no fields)"),
        ("hi", "the row is text; an object with fields is expected"),
        ({"instruction": "hi", "output": 5}, 'field "output" is a number; text is expected'),
        ({"instruction": "hi", "output": " "}, "message 1: the answer is empty"),
        ({"instruction": "hi", "output": "ho", "history": [["a"]]}, "a list of [question, answer] is expected"),
        ({"instruction": "hi", "output": "ho", "history": [["a", 1]]}, 'field "history", turn 0 is a number'),
        ({"messages": "hi"}, 'field "messages" is text; a list of messages is expected'),
        ({"messages": []}, "the last message is of nobody; an assistant turn is missing"),
        ({"messages": ["hi"]}, 'field "messages", message 0 is text; an object with role is expected'),
        ({"messages": [{"role": "user"}]}, "message 0: role/from and content/value are expected (found: role)"),
        ({"messages": [say("user", None)]}, 'field "messages", message 0: content is null; text is expected'),
        ({"messages": [say("user", [{"type": "text"}])]}, "message 0: content is a list; text is expected"),
        ({"messages": [say("boss", "hi")]}, "message 0: role 'boss' is none of system, developer, user, human"),
        ({"messages": [say("user", "hi")]}, "the last message is of user; an assistant turn is missing"),
        ({"messages": [say("assistant", "ho")]}, "message 0: assistant at the beginning; roles are out of order"),
        ({"messages": [say("user", "hi"), say("user", "hi")]}, "message 1: user after user; roles are out of order"),
        ({"messages": [say("user", "a"), say("system", "b")]}, "message 1: system after user; roles are out of order"),
        (
            {"messages": [say("user", "a"), say("assistant", "") | {"tool_calls": [{}]}]},
            'tool_calls: a call {"name": "F"',
        ),
        ({"messages": [say("user", "a") | {"tool_calls": [json.loads(CALL)]}]}, "message 0: user cannot call a tool"),
        ({"conversations": [share("human", "a"), share("function_call", "f")]}, 'value: a call {"name": "F", "argumen'),
        ({"conversations": [share("human", "a"), share("function_call", "[]")]}, 'value: a call {"name": "F", "argume'),
        (
            {"conversations": [share("human", "a"), share("function_call", '{"name": "f", "arguments": "x"}')]},
            'value: a call {"name": "F", "arguments": {...}} is expected',
        ),
        ({"prompt": "a", "completion": "b", "tools": "look"}, 'field "tools": a list of tools is expected'),
        ({"prompt": "a", "completion": "b", "tools": ["look"]}, 'field "tools": a list of tools is expected'),
        ({"question": "a\0", "answer": "b"}, 'field "question": a NUL character in the text'),
        ({"question": "a", "answer": "\ud800"}, 'field "answer": half a character, \\ud800'),
        ({"text": None}, 'field "text" is null; text is expected'),
        ({"text": " \n"}, 'field "text" is empty'),
    ],
)
def test_what_cannot_be_learned_from_is_named(row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        conversation_of(row)


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"question": "hi", "answer": "h,\no"}, {"question": "一", "answer": "二"}]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.csv").write_text('question,answer\nhi,"h,\no"\n一,二\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = {}
    for path in sorted(tmp_path.iterdir()):
        assert [row for _, row in records(path)] == rows
        found[path.name] = [line for line, _ in records(path)]
    assert found == {"a.jsonl": [1, 3], "b.json": [2, 6], "c.csv": [2, 4], "d.jsonl.gz": [1, 3]}


def test_lists_of_messages_are_read_from_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = [{"messages": [say("user", "hi"), say("assistant", "ho")]}] * 70
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines, found = zip(*records(tmp_path / "a.parquet"))
    assert lines == tuple(range(1, 71))
    assert all(conversation_of(row).messages == PAIR for row in found)


def test_plain_text_files_have_no_rows(tmp_path):
    with pytest.raises(ValueError, match="plain text has no rows with fields"):
        list(records("a.txt"))


def test_the_example_files_are_conversations():
    names = ["alpaca.json", "sharegpt.json", "messages.jsonl", "prompts.jsonl", "questions.jsonl", "tutor.jsonl"]
    names += ["facts.jsonl"]
    for name in names:
        layout = layout_of(DATA / name, {})
        found = [conversation_of(row, layout) for _, row in records(DATA / name)]
        assert len(found) >= 2
        assert bool(found[0].text) == (name == "facts.jsonl")
    info = json.loads((DATA / "dataset_info.json").read_text())
    assert all((DATA / entry["file_name"]).is_file() for entry in info.values())
