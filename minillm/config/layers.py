"""The layers of a configuration: a preset, a file, the command line, as values by the dotted names of their fields."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.config.fields import fields_of
from minillm.config.values import WORDS


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
