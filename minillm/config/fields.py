"""The fields of a config, and what is said of one: its type in words, its default, the nearest to a name."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Field(NamedTuple):
    """One field of a config: its dotted name, type, line of help, range ("> 0, <= 1" or ""), default."""

    name: str
    type: Any
    help: str
    range: str
    default: Any


def fields_of(config_class: type, prefix: str = "") -> Iterator[Field]:
    """Every field of a config, those of its sections included, in order of declaration."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        hint, notes = hints[field.name], ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *notes = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            yield from fields_of(hint, f"{prefix}{field.name}.")
        else:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            help_line, value_range = (*notes, "", "")[:2]
            yield Field(prefix + field.name, hint, help_line, value_range, default)


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """ "; did you mean …?" for the likeliest name, or the fields of the section, or its sections."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    by_last_part = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    if close or by_last_part:
        return f"; did you mean {(by_last_part or close)[0]}?"
    siblings = [other for other in names if other.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"; there are {', '.join(siblings)}" if siblings else "; --help lists the fields"


def describe(type_: Any) -> str:
    """A type in words: `int | None` -> "a whole number or none"."""
    origin, args = typing.get_origin(type_), typing.get_args(type_)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if member is type(None) else describe(member) for member in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args)) if len(args) > 1 else str(args[0])
    if origin in (list, tuple):
        return f"a list of {describe(args[0]).removeprefix('a ')}s"
    if origin is dict:
        return " and ".join(describe(member) for member in args) + ", as KEY:VALUE,..."
    return TYPE_NAMES[type_]


def help_text(config_class: type, usage: str) -> str:
    """What --help prints: the usage, then every field with its type, default, range and line of help."""
    lines, section = [usage.strip(), ""], None
    for field in fields_of(config_class):
        head = field.name.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", f"[{head}]"] if head else [""]
        default = "required" if field.default is dataclasses.MISSING else f"default {shown(field.default)}"
        notes = "; ".join(filter(None, [describe(field.type), default, field.range and f"must be {field.range}"]))
        lines += [f"  --{field.name}", f"      {field.help} ({notes})"]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A default as a person would type it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "[]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
