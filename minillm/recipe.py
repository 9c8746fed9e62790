"""How a script's configuration comes about: preset < file < command line, or what an earlier run had below them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm import checkpoint
from minillm.config import ConfigError, Layer, arguments, file_layer, lookup, nearest
from minillm.load import find_checkpoint
from minillm.model.presets import PRESETS, preset_fields
from minillm.run import RunConfig, RunDirectory

LIMITS = ("train.max_steps", "train.max_tokens", "train.max_epochs")


def read_layers(config_class: type, argv: Sequence[str]) -> list[Layer]:
    """The layers that the user gave: the preset they named, the file, the command line."""
    files, line = arguments(config_class, argv)
    if len(files) > 1:
        raise ConfigError([f"one config file is expected, not {len(files)}: {', '.join(files)}"])
    given = [*map(file_layer, files), line]
    return [*preset_layer(given), *given]


def preset_layer(layers: Sequence[Layer]) -> list[Layer]:
    """The fields of the model preset that the layers name, if they do; its vocabulary is the tokenizer's business."""
    name = lookup(layers, "model.preset")
    if is_none(name) or not isinstance(name, str):  # what is no text is reported with the other mistakes
        return []
    if name not in PRESETS:
        problem = f"model.preset: {name!r} is not known{nearest(str(name), PRESETS)} ({', '.join(PRESETS)})"
        return [Layer(f"preset {name}", {}, (problem,))]
    fields = preset_fields(name)
    return [Layer(f"preset {name}", {f"model.{key}": fields[key] for key in fields if key != "vocab_size"})]


def is_none(value: Any) -> bool:
    """Whether a value not checked yet stands for none."""
    return value is None or str(value).lower() in ("none", "null")


def without_limits(values: dict[str, Any], given: list[Layer]) -> dict[str, Any]:
    """Where the user says when to stop, no other layer does."""
    said = any(lookup(given, limit) is not None for limit in LIMITS)
    return {name: value for name, value in values.items() if not (said and name in LIMITS)}


def earlier_run(given: list[Layer]) -> Path | None:
    """The directory of the run to be continued, or begun again where it has no checkpoint yet; None for a new one."""
    resume = str(lookup(given, "run.resume", "never"))
    if resume == "never":
        return None
    path = Path(resume)
    places = [Path(str(lookup(given, "run.dir", RunConfig.dir)))] if resume == "auto" else [path, path.parent.parent]
    return next((place for place in places if (place / "config.json").is_file()), None)


def earlier(home: Path, given: list[Layer]) -> list[Layer]:
    """The layer of a run that is continued: all that it was, but for its place."""
    saved = file_layer(home / "config.json").values
    values = {name: saved[name] for name in saved if name not in ("run.dir", "run.resume", "run.device")}
    if (home / "tokenizer.json").is_file():
        values |= {"tokenizer.path": str(home), "tokenizer.vocab_size": None}
    return [Layer(str(home / "config.json"), without_limits(values, given))]


def starting_point(config: RunConfig, run: RunDirectory) -> Path | None:
    """The checkpoint to continue from; None to start afresh. Raises ValueError where there are some, but none whole."""
    if config.resume == "never":
        return None
    path = run.path if config.resume == "auto" else Path(config.resume)
    series = path / "checkpoints"
    found = checkpoint.candidates(series)
    if not found:
        return None if config.resume == "auto" else find_checkpoint(path)
    newest = checkpoint.latest(series)
    if newest is None:
        raise ValueError(
            f"{series}: none of its checkpoints is whole ({', '.join(one.name for one in found)}); "
            "bring back a copy, or move the directory away to start afresh"
        )
    return newest
