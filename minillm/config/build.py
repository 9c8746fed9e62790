"""From layers to a config, with everything that is wrong in one report."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from minillm.config.fields import fields_of, nearest
from minillm.config.layers import ConfigError, Layer
from minillm.config.values import checked

C = TypeVar("C")


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
