"""How a script's configuration comes about: preset < file < command line, and below them what an earlier run had, or
what suits the text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from minillm import checkpoint
from minillm.config import ConfigError, Layer, arguments, build, convert, fields_of, file_layer, lookup, nearest
from minillm.distributed.context import ranks_started
from minillm.distributed.launch import began
from minillm.load import describe, find_checkpoint, tokenizer_home
from minillm.log import LOGGER
from minillm.model.config import ModelConfig
from minillm.model.presets import PRESETS, preset_fields
from minillm.run import RunConfig
from minillm.strategy import layouts, ranks_here
from minillm.tokenizer import Tokenizer, load_tokenizer

C = TypeVar("C")
NOWHERE = Layer("defaults", {})
# What may differ from the model that training starts from: no weight depends on it.
MAY_DIFFER = ("max_seq_len", "rope_theta", "rope_scaling", "rope_factor", "rope_original_len", "dropout")
MADE_BY = {RunConfig.dir: "train.py", f"{RunConfig.dir}-sft": "sft.py"}  # without arguments
NUMBERS_OF_RANKS = ("parallel.dp_replicate", "parallel.dp_shard", "parallel.tp")
LIMITS = ("train.max_steps", "train.max_tokens", "train.max_epochs")


def read_config(
    config_class: type[C],
    argv: Sequence[str],
    choose: Callable[[list[Layer]], list[Layer]],
    places: Layer = NOWHERE,
) -> C:
    """The configuration of a script; every mistake in it is reported before anything is touched.

    `choose(given)`: the layers of what the user left open, below what they gave. A run that is continued has all that
    from before. `places`: what the script starts from and writes to where none is given.
    """
    given = read_layers(config_class, argv, places)
    home = earlier_run([places, *given])
    given = [*source_layer([places, *given], resumed=home), *given]
    below = earlier(config_class, home, given, ranks_started()) if home else choose(given)
    config = build(config_class, [places, *below, *given])
    if not home:
        said = (f"{name} {value}" for name, value in below[-1].values.items() if lookup(given, name) is None)
        LOGGER.info("%s: %s", below[-1].origin, ", ".join(said) or "nothing, all is given")
    return config


def read_layers(config_class: type, argv: Sequence[str], places: Layer = NOWHERE) -> list[Layer]:
    """The layers that the user gave: the preset they named, the file, the command line."""
    files, line = arguments(config_class, argv)
    if len(files) > 1:
        raise ConfigError([f"one config file is expected, not {len(files)}: {', '.join(files)}"])
    given = [*map(file_layer, files), line]
    return [*preset_layer(given), *given, *restart_layer([places, *given])]


def restart_layer(given: Sequence[Layer]) -> list[Layer]:
    """Where torchrun starts again what it has begun itself, the run goes on, whatever was said of an earlier one."""
    directory = Path(str(lookup(given, "run.dir", RunConfig.dir)))
    return [Layer("a restart by torchrun", {"run.resume": "auto"})] if began(directory) else []


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


def source_layer(given: Sequence[Layer], resumed: Path | None = None) -> list[Layer]:
    """The shape and the tokenizer of the model that `model.path` says to start from, below what else is given.

    What contradicts them is a problem of the layer: the weights fit no other shape, and mean nothing to another
    tokenizer. A run that is `resumed` has both of its own.
    """
    path = lookup(given, "model.path")
    if is_none(path):
        return []
    origin, source = f"model.path {path}", Path(str(path)).resolve()
    run = Path(str(lookup(given, "run.dir", RunConfig.dir))).resolve()
    if run in (source, *source.parents):
        ways = "choose another run.dir to start from it, or continue it with --run.resume auto and without model.path"
        return [Layer(origin, {}, (f"model.path: {path} is in the directory of this very run, {run}; {ways}",))]
    if resumed is not None:
        return []
    if str(path) in MADE_BY and not source.exists():
        made = f"run `python {MADE_BY[str(path)]}` first"
        missing = f"model.path: there is no {path} yet; {made}, or give the model to start from"
        return [Layer(origin, {}, (missing,))]
    try:
        folder = find_checkpoint(Path(str(path)), skip=checkpoint.TENSORS)  # its weights are proved when they are read
        config, tokenizer = describe(folder)
        problems = [*other_shape(given, config, path), *other_tokenizer(given, tokenizer, path)]
    except ValueError as error:
        return [Layer(origin, {}, (f"model.path: {error}",))]
    values = {f"model.{name}": value for name, value in dataclasses.asdict(config).items()}
    if tokenizer is not None:
        values |= {"tokenizer.path": str(tokenizer_home(folder)), "tokenizer.kind": tokenizer.kind}
    return [Layer(origin, values, tuple(problems))]


def other_shape(given: Sequence[Layer], config: ModelConfig, path: str) -> list[str]:
    """What is given about a model's shape and is not that of the source."""
    problems = []
    learned = config.position == "learned"  # positions that are weights: as many as there are
    for field in fields_of(ModelConfig, "model."):
        name = field.name.removeprefix("model.")
        value, there = lookup(given, field.name), getattr(config, name)
        if is_none(value) or (name in MAY_DIFFER and not (learned and name == "max_seq_len")):
            continue
        try:
            if convert(value, field.type) != there:
                problems.append(f"{field.name}: {value} is given, but {path} has {there}; leave it out")
        except (ValueError, TypeError, KeyError, OverflowError):
            continue  # reported with the other mistakes
    return problems


def other_tokenizer(given: Sequence[Layer], tokenizer: Tokenizer | None, path: str) -> list[str]:
    """What is given about a tokenizer and is not that of the source."""
    theirs, kind = lookup(given, "tokenizer.path"), lookup(given, "tokenizer.kind")
    vocab_size = lookup(given, "tokenizer.vocab_size")
    if tokenizer is None:
        missing = f"model.path: no tokenizer is beside {path}; give the one that it was trained with as tokenizer.path"
        return [missing] if is_none(theirs) else []
    if not is_none(theirs):
        other = load_tokenizer(str(theirs))
        if other.hash != tokenizer.hash:
            return [f"tokenizer.path: {theirs} is another tokenizer than that of {path}; leave it out"]
    elif kind not in (None, tokenizer.kind):
        return [f"tokenizer.kind: {kind} is given, but {path} has a tokenizer of kind {tokenizer.kind}; leave it out"]
    elif not is_none(vocab_size) and str(vocab_size) != str(tokenizer.vocab_size):
        return [f"tokenizer.vocab_size: {vocab_size} is given, but {path} has {tokenizer.vocab_size}; leave it out"]
    return []


def is_none(value: Any) -> bool:
    """Whether a value not checked yet stands for none."""
    return value is None or str(value).lower() in ("none", "null")


def earlier_run(given: list[Layer]) -> Path | None:
    """The directory of the run to be continued, or begun again where it has no checkpoint yet; None for a new one."""
    resume = str(lookup(given, "run.resume", "never"))
    if resume == "never":
        return None
    path = Path(resume)
    places = [Path(str(lookup(given, "run.dir", RunConfig.dir)))] if resume == "auto" else [path, path.parent.parent]
    return next((place for place in places if (place / "config.json").is_file()), None)


def earlier(config_class: type, home: Path, given: list[Layer], world_size: int) -> list[Layer]:
    """The layer of a run that is continued: all that it was, but for its place and what does not fit these ranks."""
    saved = file_layer(home / "config.json").values
    values = {name: saved[name] for name in saved if name not in ("run.dir", "run.resume", "run.device")}
    if (home / "tokenizer.json").is_file():
        values |= {"tokenizer.path": str(home), "tokenizer.vocab_size": None}
    if lookup(given, "optim.warmup_ratio") is not None:  # what was made of it then would stand beside it now
        values.pop("optim.warmup_steps", None)
    layer = Layer(str(home / "config.json"), without_limits(values, given))
    return [fitting_ranks(config_class, layer, given, world_size)]


def fitting_ranks(config_class: type, inherited: Layer, given: list[Layer], world_size: int) -> Layer:
    """The layer without numbers of ranks, meant for another number of them, that make no layout of so many.

    Left out are first the copies, on which no rank's memory depends, then the shards, and last tensor parallelism; what
    is given now stays. Where that does not help, nothing is left out, and the mistake is found later.
    """
    fixed = {name for layer in given for name in layer.values}
    numbers = [name for name in NUMBERS_OF_RANKS if not is_none(inherited.values.get(name)) and name not in fixed]
    for count in range(len(numbers) + 1):
        unfit = numbers[:count]
        values = {name: value for name, value in inherited.values.items() if name not in unfit}
        left = inherited._replace(values=values)
        try:
            layouts(build(config_class, [left, *given]).parallel, world_size, ranks_here(world_size))
        except ValueError:
            continue
        if unfit:
            said = ", ".join(f"{name} {inherited.values[name]}" for name in unfit)
            LOGGER.info("there are now %d ranks, so not taken over from %s: %s", world_size, inherited.origin, said)
        return left
    return inherited


def without_limits(values: dict[str, Any], given: list[Layer]) -> dict[str, Any]:
    """Where the user says when to stop, no other layer does."""
    said = any(lookup(given, limit) is not None for limit in LIMITS)
    return {name: value for name, value in values.items() if not (said and name in LIMITS)}
