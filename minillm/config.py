"""Configuration: dataclass sections, filled from layers, checked in one report.

A section is a frozen dataclass that stands beside the code it configures. Its fields carry their own help and range:

    lr: Annotated[float, "peak learning rate", "> 0"] = 1e-3

A config is a dataclass whose fields are sections (a script: `--section.field VALUE`) or plain values (a verb of the
command line: `--field VALUE`). A layer is a mapping from the dotted names of fields to values, with the place they
came from; later layers win. Nothing here knows any particular section.
"""

import dataclasses
import difflib
import json
import math
import operator
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

C = TypeVar("C")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(ValueError):
    """Every problem of a configuration, one a line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        heading = f"{len(self.problems)} problems in the configuration:\n  " if len(self.problems) > 1 else ""
        super().__init__(heading + "\n  ".join(self.problems))


class Layer(NamedTuple):
    """Values for some fields, by dotted name, where they came from, and what could not be read there."""

    origin: str
    values: Mapping[str, Any]
    problems: tuple[str, ...] = ()


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


# --- layers -----------------------------------------------------------------------------------------------------------


def file_layer(path: str | Path) -> Layer:
    """The layer of a .toml file, or of the config.json that a run saved."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        nested = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(nested, dict):
            raise ConfigError([f"{path}: sections with fields are expected, found a {type(nested).__name__}"])
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a valid config file: {error}"]) from None
    return Layer(str(path), flatten(nested))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain form of a config: what config.json holds and `file_layer` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def arguments(config_class: type, argv: Sequence[str]) -> tuple[list[str], Layer]:
    """Split a command line into its positional words and the layer of its `--name value` options.

    A boolean option may stand alone (`--train.compile`), `--name=value` is the same as `--name value`, and an option
    given several times counts as the last. An option without a value is a problem of the layer, which `build` reports.
    """
    switches = {field.name for field in fields_of(config_class) if field.type is bool}
    positional, values, problems = [], {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            if word.startswith("-"):
                problems.append(f"{word}: an option begins with --")
            continue
        name, equals, value = word[2:].partition("=")
        if equals:
            values[name] = value
        elif name in switches and (not words or words[0].lower() not in WORDS):
            values[name] = True
        elif words and not words[0].startswith("--"):
            values[name] = words.pop(0)
        else:
            problems.append(f"--{name}: a value is missing")
    return positional, Layer("command line", values, tuple(problems))


def lookup(layers: Sequence[Layer], name: str, default: Any = None) -> Any:
    """The value that the layers give to a field, before any check."""
    return next((layer.values[name] for layer in reversed(layers) if name in layer.values), default)


# --- from layers to a config ------------------------------------------------------------------------------------------


def build(config_class: type[C], layers: Sequence[Layer]) -> C:
    """Make a config from its defaults and the layers over them.

    Raises ConfigError with every problem found: unknown field, wrong type, out of range, impossible combination.
    """
    fields = {field.name: field for field in fields_of(config_class)}
    values: dict[str, Any] = {}
    problems = [problem for layer in layers for problem in layer.problems]
    failed: set[str] = set()
    for layer in layers:
        for name, value in layer.values.items():
            if name not in fields:
                problems.append(f"{layer.origin}: {name} is not a field{nearest(name, fields)}")
                continue
            try:
                values[name] = checked(fields[name], value)
            except ValueError as error:
                problems.append(f"{layer.origin}: {name} {error}")
                failed.add(name)
    config = construct(config_class, "", values, problems, failed)
    if problems:
        raise ConfigError(problems)
    return config


def construct(config_class: type, prefix: str, values: Mapping[str, Any], problems: list[str], failed: set[str]) -> Any:
    """Build a section, or a config of sections; what its `__post_init__` objects to joins the problems.

    A field or section that already failed has its default here, so that the combinations of the others are still
    checked; an objection that names one that failed is not repeated.
    """
    hints = typing.get_type_hints(config_class)
    given: dict[str, Any] = {}
    complete = True
    local = {name.removeprefix(prefix) for name in failed}
    for field in dataclasses.fields(config_class):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            section = construct(hints[field.name], f"{name}.", values, problems, failed)
            if section is not None:
                given[field.name] = section
            else:
                local.add(field.name)
                complete &= field.default_factory is not dataclasses.MISSING
        elif name in values:
            given[field.name] = values[name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            complete = False
            if name not in failed:
                problems.append(f"{name} is missing")
    if not complete:
        return None
    try:
        return config_class(**given)
    except ValueError as error:
        lines = [line for line in str(error).splitlines() if not local & named(line)]
        problems.extend(prefix + line for line in lines)
        return None


def named(line: str) -> set[str]:
    """What an objection may be naming: each word of it, and of `section.field` the section too."""
    words = set(re.findall(r"[\w.]+", line))
    return words | {word.partition(".")[0] for word in words}


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """ "; did you mean …?" for the likeliest name, or the fields of the section, or its sections."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    by_last_part = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    if close or by_last_part:
        return f"; did you mean {(by_last_part or close)[0]}?"
    siblings = [other for other in names if other.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"; the fields there are {', '.join(siblings)}" if siblings else "; --help lists the fields"


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


# --- help -------------------------------------------------------------------------------------------------------------


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
