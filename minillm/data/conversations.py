"""Conversations from the rows of files, in any of the usual formats, each recognised by its fields.

A format says in which field each part of a conversation is:

    prompt (and query, which continues it), response, system, history     one question and its answer
    messages, system                                                      a list of what was said in turn
    text                                                                  no conversation: all of it is learned

`data.columns` names the fields of any other file, and so does a dataset_info.json beside it, as LLaMA-Factory reads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillm.config import nearest
from minillm.data.chat_templates import FOLLOWS, Message, Role
from minillm.data.json_rows import named
from minillm.files import read_json


class Formats(NamedTuple):
    """How rows of a kind may be written."""

    what: str  # such a row is
    usual: Mapping[str, Mapping[str, str]]  # the fields of the parts in each format, the first that fits counting
    sufficient: Sequence[set[str]]  # parts, of which one set has to be there
    needed: str  # the same in words

    @property
    def parts(self) -> list[str]:
        """All that a row may have."""
        return list(dict.fromkeys(part for columns in self.usual.values() for part in columns))

    def enough(self, columns: Mapping[str, str]) -> set[str]:
        """The parts without which a row with these columns is none; empty where the columns are too few."""
        return next((parts for parts in self.sufficient if parts <= set(columns)), set())


CONVERSATIONS = Formats(
    "a conversation",
    {
        "alpaca": {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
            "tools": "tools",
        },
        "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
        "openai": {"messages": "messages", "tools": "tools"},
        "prompt and completion": {"prompt": "prompt", "response": "completion", "system": "system", "tools": "tools"},
        "question and answer": {"prompt": "question", "response": "answer", "system": "system"},
        "text": {"text": "text"},
    },
    ({"prompt", "response"}, {"messages"}, {"text"}),
    "prompt and response, messages, or text",
)
Side = Role | Literal["call"]  # call: the assistant, what it says being calls of tools
# What each role is called: by us and OpenAI, by ShareGPT, and by LLaMA-Factory.
ROLES: dict[str, Side] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
INFO = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt", "openai")  # of an entry there
INFO_PARTS = {"kto_tag": "label"}  # parts that have another name there
# The tags of a dataset_info.json that name a role, or the field of a message.
ROLE_TAGS: dict[str, Side] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "function_tag": "call",
    "observation_tag": "tool",
    "system_tag": "system",
}
FIELD_TAGS = ("role_tag", "content_tag")
A_TOOL = '{"type": "function", "function": {"name": "F", ...}}'
A_CALL = '{"name": "F", "arguments": {...}}'


class Conversation(NamedTuple):
    """What was said in a row of a file; of plain text, which nobody said, `messages` is empty."""

    messages: list[Message]
    text: str = ""


class Layout(NamedTuple):
    """Where the parts of a conversation are in the rows of a file."""

    name: str
    columns: Mapping[str, str]  # part -> field
    roles: Mapping[str, Side] = ROLES
    role_fields: Sequence[str] = ROLE_FIELDS
    content_fields: Sequence[str] = CONTENT_FIELDS


# --- which format -----------------------------------------------------------------------------------------------------


def read_columns(pairs: Sequence[str], formats: Formats = CONVERSATIONS) -> dict[str, str]:
    """`data.columns`, a PART=FIELD each, as a dict. Raises ValueError where a pair is none or parts are missing."""
    columns = {}
    for pair in pairs:
        part, equals, field = pair.partition("=")
        if not equals or not field:
            raise ValueError(f"columns: {pair!r} is no PART=FIELD")
        if part not in formats.parts:
            parts = ", ".join(formats.parts)
            raise ValueError(f"columns: {part} is no part of {formats.what}{nearest(part, formats.parts)} ({parts})")
        columns[part] = field
    if columns and not formats.enough(columns):
        raise ValueError(f"columns: {', '.join(columns)} are given; {formats.needed} are needed")
    return columns


def layout_of(file: str | Path, columns: Mapping[str, str], formats: Formats = CONVERSATIONS) -> Layout | None:
    """The layout that a file has by the configuration, or a dataset_info.json beside it; None: its rows tell."""
    if columns:
        return Layout("data.columns", columns)
    info = Path(file).parent / INFO
    if not info.is_file():
        return None
    entries = {name: entry for name, entry in read_json(info).items() if isinstance(entry, dict)}
    layouts = [
        info_layout(f"{info}: {name}", entry, formats)
        for name, entry in entries.items()
        if entry.get("file_name") == Path(file).name and (entry.get("columns") or entry.get("tags"))
    ]
    if len({json.dumps(layout[1:], default=dict) for layout in layouts}) > 1:
        raise ValueError(f"{info}: describes {Path(file).name} in several ways; say which by data.columns")
    return layouts[0] if layouts else None


def info_layout(name: str, entry: Mapping[str, Any], formats: Formats) -> Layout:
    """The layout that an entry of a dataset_info.json describes."""
    given = {INFO_PARTS.get(part, part): field for part, field in info_names(name, entry, "columns").items()}
    columns = {part: field for part, field in given.items() if part in formats.parts}
    if not columns:
        formatting = entry.get("formatting", "alpaca")
        if formatting not in FORMATTINGS:
            raise ValueError(f"{name}: formatting {formatting!r} is not known; {', '.join(FORMATTINGS)} is expected")
        columns = next((formats.usual[usual] for usual in formats.usual if usual.startswith(formatting)), {})
    if not formats.enough(columns):
        raise ValueError(f"{name}: its columns are not enough for {formats.what}; {formats.needed} are needed")
    tags = info_names(name, entry, "tags")
    roles = ROLES | {tags[tag]: role for tag, role in ROLE_TAGS.items() if tag in tags}
    role_fields, content_fields = ((tags[tag],) if tag in tags else None for tag in FIELD_TAGS)
    return Layout(name, columns, roles, role_fields or ROLE_FIELDS, content_fields or CONTENT_FIELDS)


def info_names(name: str, entry: Mapping[str, Any], which: str) -> Mapping[str, str]:
    """The columns or tags of an entry. Raises ValueError where they are no names."""
    found = entry.get(which) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: {which} is {named(found)}; an object with names is expected")
    # LLaMA-Factory's own files write null for what is not there.
    names = {part: value for part, value in found.items() if value is not None}
    for part, value in names.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: {which}.{part} is {named(value)}; a name is expected")
    return names


def recognised(row: Mapping[str, Any], formats: Formats = CONVERSATIONS) -> Layout:
    """The layout of a row by its fields. Raises ValueError with the fields that were found."""
    for name, columns in formats.usual.items():
        if all(columns[part] in row for part in formats.enough(columns)):
            return Layout(name, columns)
    known = "; ".join(f"{name}: {', '.join(columns.values())}" for name, columns in formats.usual.items())
    found = ", ".join(map(str, row)) or "no fields"
    raise ValueError(f"the format is not known (found: {found}); name the fields in data.columns, or use {known}")


# --- from a row to a conversation -------------------------------------------------------------------------------------


def conversation_of(row: object, layout: Layout | None = None) -> Conversation:
    """What was said in a row. Raises ValueError, without the place of the row, where that cannot be learned from."""
    row = checked_row(row)
    layout = layout or recognised(row)
    columns = layout.columns
    if "text" in columns:
        text = text_of(row, columns["text"])
        if not text.strip():
            raise ValueError(f'field "{columns["text"]}" is empty')
        return Conversation([], text)
    messages = [*asked_messages(row, layout)]
    if "response" in columns and "messages" not in columns:
        messages += said_messages(row, "response", "assistant", layout)
    check_order(messages)
    check_answers(messages)
    return Conversation([*described_tools(row, columns.get("tools")), *messages])


def checked_row(row: object) -> Mapping[str, Any]:
    """A row with fields. Raises ValueError for any other."""
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {named(row)}; an object with fields is expected")
    return row


def asked_messages(row: Mapping[str, Any], layout: Layout) -> Iterator[Message]:
    """What the system and the user say: the messages of a row, but for those of its response."""
    columns = layout.columns
    if system := optional_text(row, columns.get("system")):
        yield Message("system", system)
    if "messages" in columns:
        yield from said_messages(row, "messages", None, layout)
        return
    history = row.get(columns.get("history", "")) or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise ValueError(f'field "{columns["history"]}": a list of [question, answer] is expected')
    for number, turn in enumerate(history):
        for role, said in zip(("user", "assistant"), turn):
            yield Message(role, checked_text(said, f'field "{columns["history"]}", turn {number}'))
    if isinstance(row.get(columns["prompt"]), (list, Mapping)):
        yield from said_messages(row, "prompt", "user", layout)
        return
    said = text_of(row, columns["prompt"]), optional_text(row, columns.get("query"))
    yield Message("user", "\n".join(filter(None, said)))


def said_messages(row: Mapping[str, Any], part: str, by: Role | None, layout: Layout) -> Iterator[Message]:
    """The messages of a part: a list of them, one by itself, or a text, which is said `by` that role."""
    field = layout.columns[part]
    found = row.get(field)
    if by is not None and not isinstance(found, (list, Mapping)):
        yield Message(by, text_of(row, field))
        return
    found = [found] if by is not None and isinstance(found, Mapping) else found
    if not isinstance(found, list):
        raise ValueError(f'field "{field}" is {named(found)}; a list of messages is expected')
    for number, message in enumerate(found):
        place = f'field "{field}", message {number}'
        if not isinstance(message, Mapping):
            raise ValueError(f"{place} is {named(message)}; an object with {layout.role_fields[0]} is expected")
        role_field = next((name for name in layout.role_fields if name in message), None)
        content_field = next((name for name in layout.content_fields if name in message), None)
        if content_field is None and message.get("tool_calls"):
            content_field = layout.content_fields[0]
        if role_field is None or content_field is None:
            expected = " and ".join("/".join(names) for names in (layout.role_fields, layout.content_fields))
            raise ValueError(f"{place}: {expected} are expected (found: {', '.join(map(str, message)) or 'no fields'})")
        role = layout.roles.get(str(message[role_field]))
        if role is None:
            raise ValueError(f"{place}: {role_field} {message[role_field]!r} is none of {', '.join(layout.roles)}")
        said, listed = message.get(content_field), json_of(message.get("tool_calls"))
        if listed and role != "assistant":
            raise ValueError(f"{place}: {role} cannot call a tool, only the assistant can")
        if role == "call":
            yield Message("assistant", "", calls_of(json_of(said), f"{place}: {content_field}"))
        else:
            content = "" if said is None and listed else checked_text(said, f"{place}: {content_field}")
            yield Message(role, content, calls_of(listed, f"{place}: tool_calls") if listed else ())


def calls_of(found: object, place: str) -> tuple[str, ...]:
    """Calls of tools as models write them; given as OpenAI does, with arguments that are JSON, or as objects alone."""
    calls = found if isinstance(found, list) else [found]
    texts = []
    for call in calls:
        call = call.get("function", call) if isinstance(call, Mapping) else {}
        name, arguments = call.get("name"), json_of(call.get("arguments", {}))
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError(f"{place}: a call {A_CALL} is expected")
        texts.append(checked_text(as_json({"name": name, "arguments": arguments}), place))
    if not texts:
        raise ValueError(f"{place}: a call {A_CALL} is expected")
    return tuple(texts)


def described_tools(row: Mapping[str, Any], field: str | None) -> list[Message]:
    """The message that says which tools there are; none where the row has none."""
    found = json_of(row.get(field) or [])
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise ValueError(f'field "{field}": a list of tools is expected, [{A_TOOL}]')
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]
    text = "\n".join(map(as_json, tools))
    return [Message("tools", checked_text(text, f'field "{field}"'))] if tools else []


def json_of(value: object) -> object:
    """What a text that is JSON stands for; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def as_json(value: object) -> str:
    """On one line, as Jinja's tojson writes it for chat templates."""
    return json.dumps(value, ensure_ascii=False)


def check_order(messages: Sequence[Message]) -> None:
    """Raises ValueError where somebody speaks out of turn, or nobody answers last."""
    before: Role | None = None
    for number, (role, *_) in enumerate(messages):
        if before not in FOLLOWS[role]:
            after = f"after {before}" if before else "at the beginning"
            raise ValueError(
                f"message {number}: {role} {after}; roles are out of order (user and assistant take turns)"
            )
        before = role
    if before != "assistant":
        raise ValueError(f"the last message is of {before or 'nobody'}; an assistant turn is missing")


def check_answers(messages: Sequence[Message]) -> None:
    """Raises ValueError where nothing is answered."""
    for number, message in enumerate(messages):
        if message.role == "assistant" and says_nothing(message):
            raise ValueError(f"message {number}: the answer is empty")


def says_nothing(message: Message) -> bool:
    """Whether a message is empty."""
    return not message.content.strip() and not message.calls


def missing(row: Mapping[str, Any], field: str) -> str:
    """What to say of a row without a field."""
    return f'field "{field}" is missing (found: {", ".join(map(str, row)) or "no fields"})'


def text_of(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(missing(row, field))
    return checked_text(row[field], f'field "{field}"')


def optional_text(row: Mapping[str, Any], field: str | None) -> str:
    """The text of a field; "" where there is none."""
    return "" if row.get(field) is None else text_of(row, field)


def checked_text(value: object, place: str) -> str:
    """A text as it is encoded: CRLF as LF. Raises ValueError for what is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{place} is {named(value)}; text is expected")
    if "\0" in value:
        raise ValueError(f"{place}: a NUL character in the text; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half a character, \\u{ord(value[error.start]):04x}, in the text") from None
    return value.replace("\r\n", "\n")
