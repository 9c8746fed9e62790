"""In which fields of a row its parts are: the usual formats, each recognised by its fields, and others.

A format of conversations says in which field each part of one is:

    prompt (and query, which continues it), response, system, history, tools    one question and its answer
    messages, system, tools                                                     a list of what was said in turn
    text                                                                        no conversation: all of it is learned

`data.columns` names the fields of any other file, and so does a dataset_info.json beside it, as LLaMA-Factory reads.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillm.config import nearest
from minillm.data.chat_templates import Role
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
