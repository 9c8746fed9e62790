"""From what stands in a file or on the command line to the value of a field: the type it has, in its range."""

import difflib
import json
import math
import operator
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from minillm.config.fields import Field, describe

COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def checked(field: Field, value: Any) -> Any:
    """The value as the field's type, in its range. Raises ValueError saying what was given and what is accepted."""
    try:
        value = convert(value, field.type)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"is {value!r}{nearest_choice(value, field.type)}; {describe(field.type)} is expected"
        ) from None
    if value is not None and not within(value, field.range):
        raise ValueError(f"is {value}; it must be {field.range}")
    return value


def within(value: float, value_range: str) -> bool:
    """Whether a number is in a range such as "> 0, <= 1" ("" is any)."""
    comparisons = [comparison.split() for comparison in value_range.split(",") if value_range]
    return all(COMPARISONS[sign](value, float(bound)) for sign, bound in comparisons)


def nearest_choice(value: Any, type_: Any) -> str:
    """ " (did you mean …?)" for the likeliest of the words that a field takes; nothing where none is near."""
    choices = [str(choice) for choice in typing.get_args(type_) if typing.get_origin(type_) is Literal]
    close = difflib.get_close_matches(str(value).lower(), choices, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def convert(value: Any, type_: Any) -> Any:
    """A value from a file or a word from the command line as the type; ValueError or TypeError when it is none."""
    origin, args = typing.get_origin(type_), typing.get_args(type_)
    if origin in (types.UnionType, typing.Union):
        return convert_union(value, args)
    if origin is Literal:
        if value not in args:
            raise ValueError
        return value
    if origin in (list, tuple):
        items = split_list(value) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise TypeError
        kinds = args if origin is tuple and ... not in args else [args[0]] * len(items)
        if len(items) != len(kinds):
            raise ValueError
        return origin(convert(item, kind) for item, kind in zip(items, kinds))
    if origin is dict:
        pairs = split_pairs(value) if isinstance(value, str) else dict(value)
        return {convert(key, args[0]): convert(item, args[1]) for key, item in pairs.items()}
    if type_ is bool:
        return value if isinstance(value, bool) else WORDS[lowered(value)]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if type_ is str:
        return str(value)
    if type_ is int:
        if isinstance(value, str):
            value = int(value) if re.fullmatch(r"[+-]?[\d_]+", value) else float(value)
        if int(value) != value:
            raise ValueError
        return int(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def convert_union(value: Any, types_: Sequence[Any]) -> Any:
    """The first member type that takes the value; the word none stands for None.

    A word is tried as a `list` before text where it has a comma or bracket. A `tuple` may hold texts with both, so that
    there only a list in JSON is several.
    """
    if type(None) in types_ and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    members = [t for t in types_ if t is not type(None)]
    word = value if isinstance(value, str) else ""
    many = isinstance(value, (list, tuple)) or json_list(word) is not None
    first = {list: many or "," in word or word.startswith("["), tuple: many}
    order = {origin: -1 if is_first else 1 for origin, is_first in first.items()}
    for member in sorted(members, key=lambda t: order.get(typing.get_origin(t), 0)):
        try:
            return convert(value, member)
        except (ValueError, TypeError, KeyError):
            continue
    raise ValueError


def lowered(value: Any) -> str:
    if not isinstance(value, (str, int)) or str(value).lower() not in WORDS:
        raise ValueError
    return str(value).lower()


def split_list(text: str) -> list[str]:
    """'a, b' or '[a, "b"]' -> ['a', 'b']; '' and '[]' -> []; a list in JSON as it is."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    return json_list(text) or [item.strip().strip("'\"") for item in inner.split(",") if item.strip()]


def json_list(text: str) -> list | None:
    """The list that a text is in JSON, if it is one."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, list) else None


def split_pairs(text: str) -> dict[str, str]:
    """'a:1, b:2' or '{"a": 1, "b": 2}' -> {'a': '1', 'b': '2'}. Raises ValueError where a pair is none."""
    items = split_list(text.strip().removeprefix("{").removesuffix("}"))
    pairs = [item.split(":") for item in items]
    return {key.strip().strip("'\""): value.strip() for key, value in pairs}
