"""Conversations from the rows of files: what was said in each, checked.

formats.py says in which fields of a row it is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm.data.chat_templates import FOLLOWS, Message, Role
from minillm.data.formats import Layout, recognised
from minillm.data.json_rows import named

A_TOOL = '{"type": "function", "function": {"name": "F", ...}}'
A_CALL = '{"name": "F", "arguments": {...}}'


class Conversation(NamedTuple):
    """What was said in a row of a file; of plain text, which nobody said, `messages` is empty."""

    messages: list[Message]
    text: str = ""


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
