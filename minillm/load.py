"""A model and its tokenizer, from a run, a checkpoint, a saved folder or one of Hugging Face's; and saved to one.

The model is built on the meta device, without memory, and checked against the files there; then it gets memory and is
filled from them a part of a tensor at a time. So the peak is one model, and the optimizer's files stay closed.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minillm import checkpoint, hf
from minillm.data.jinja import exported, jinja_of, recognise
from minillm.distributed.context import Context
from minillm.files import atomic_directory, explained, read_json, sha256
from minillm.generate.params import SamplingParams
from minillm.lora import LoRAConfig, adapted, add_adapters, base_parameters, init_lora
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.quantize import quantize_int8
from minillm.tensors import parameter_names
from minillm.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("minillm")


def load(
    path: str | Path, device: str | torch.device = "cpu", step: int | None = None, base: str | Path | None = None
) -> tuple[Transformer, Tokenizer | None]:
    """The model, in eval mode, and its tokenizer (None where there is none) of a run, checkpoint, saved folder, or one
    of Hugging Face's.

    Of a run, the newest checkpoint that verifies, or that of `step`. Parameters keep the dtype they were saved in. Of a
    run with LoRA the model has its adapters; `base` says where what they were trained on is now, if it was moved.
    Raises ValueError for a path that is none of these, a damaged checkpoint, a tokenizer that is not the model's, and
    another base.
    """
    stored = open_stored(find_checkpoint(Path(path), step), base=base)
    return in_memory(stored, device), stored.tokenizer


class Stored(NamedTuple):
    """The model of a folder, proved to be there as its config says; no weight is in memory."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    tensors: dict[str, tuple[torch.dtype, list[int]]]  # dtype and shape of each parameter, tied ones once
    fill: Callable[[Mapping[str, Tensor]], None]  # reads into the given parameters what this rank holds of each
    blocks: Callable[[str], Iterator[Tensor]]  # one parameter, some of its rows after the other
    lora: LoRAConfig = LoRAConfig()  # the adapters that it has


def open_stored(
    folder: Path, dist: Context = checkpoint.ALONE, hashed: bool = False, base: str | Path | None = None
) -> Stored:
    """The model of a folder, whichever format it is in. Raises ValueError where it is damaged or not what it says.

    `dist`, `hashed`: as for `checkpoint.verify`. `base`: where the weights are that its adapters were trained on; None:
    where they were then.
    """
    if hf.is_hugging_face(folder):
        return open_hugging_face(folder, describe(folder)[1])
    state, manifest = checkpoint.verify(folder, checkpoint.OPTIM, dist, hashed)
    config, tokenizer = describe(folder)
    tensors = checkpoint.describe(manifest, skip=checkpoint.OPTIM)
    fill, blocks = partial(checkpoint.fill, folder, manifest), checkpoint.block_reader(folder, manifest)
    stored = Stored(config, tokenizer, tensors, fill, blocks)
    adapts = bool(state.get("base_path"))
    if adapts:
        stored = on_base(stored, state, open_base(folder, state, base))
    parameters = dict(on_meta(stored).named_parameters())
    own = {name: p for name, p in parameters.items() if not adapts or p.requires_grad or name in tensors}
    checkpoint.match_tensors(folder, manifest, own, skip=checkpoint.OPTIM)
    return stored


def open_whole(folder: Path, dist: Context = checkpoint.ALONE, hashed: bool = False) -> Stored:
    """`open_stored` of a model that is one set of weights; ValueError where it has adapters."""
    stored = open_stored(folder, dist, hashed)
    if stored.lora.r:
        raise ValueError(f"{folder}: has adapters; `minillm merge {folder} OUT` makes one model of them and their base")
    return stored


def open_base(folder: Path, state: dict, base: str | Path | None) -> Stored:
    """What the adapters of a checkpoint were trained on. Raises ValueError where it is not there, or is another."""
    try:
        found = find_checkpoint(Path(base or state["base_path"]))
    except ValueError as error:
        ways = "put it back, or say where it is: minillm.load(..., base=PATH)"
        raise ValueError(
            f"{folder}: the model that its adapters were trained on is not there; {ways}: {error}"
        ) from None
    if (there := weights_hash(found)) != state["base_sha256"]:
        raise ValueError(
            f"{found}: is not the model that the adapters of {folder} were trained on: the sha256 of its weights is "
            f"{there[:12]}, not {state['base_sha256'][:12]}"
        )
    return open_whole(found)


def on_base(stored: Stored, state: dict, base: Stored) -> Stored:
    """What a checkpoint of trained weights alone makes of its base."""

    def fill(parameters: Mapping[str, Tensor]) -> None:
        own = {name: parameter for name, parameter in parameters.items() if name in stored.tensors}
        base.fill({name: parameter for name, parameter in parameters.items() if name not in own})
        stored.fill(own)

    def blocks(name: str) -> Iterator[Tensor]:
        return (stored if name in stored.tensors else base).blocks(name)

    lora = LoRAConfig(**state["config"]["lora"])
    return stored._replace(tensors=base.tensors | stored.tensors, fill=fill, blocks=blocks, lora=lora)


def open_hugging_face(folder: Path, tokenizer: Tokenizer | None = None) -> Stored:
    """`open_stored` of one of their folders, but for its tokenizer."""
    config = hf.read_config(folder)
    sources = hf.find_sources(folder, config)
    return Stored(config, tokenizer, hf.describe(sources), partial(hf.fill, sources), partial(hf.blocks, sources))


def on_meta(stored: Stored) -> Transformer:
    """The model without memory, its parameters in the dtypes in which they are stored."""
    with torch.device("meta"):
        model = Transformer(stored.config)
    if is_int8(stored):
        quantize_int8(model)
    for name, parameter in model.named_parameters():
        if name in stored.tensors:
            parameter.data = parameter.data.to(stored.tensors[name][0])
    if stored.lora.r:
        add_adapters(model, stored.lora)
    return model


def in_memory(stored: Stored, device: str | torch.device = "cpu") -> Transformer:
    """The model, in eval mode, with its weights."""
    model = on_meta(stored).to_empty(device=device)
    stored.fill(dict(model.named_parameters()))
    return model.eval()


def is_int8(stored: Stored) -> bool:
    """Whether the weights are stored in int8, each matrix with its scales beside it."""
    return any(dtype == torch.int8 for dtype, _ in stored.tensors.values())


def describe(folder: Path) -> tuple[ModelConfig, Tokenizer | None]:
    """The shape of a folder's model, and its tokenizer; the weights are not read."""
    if hf.is_hugging_face(folder):
        config, tokenizer = hf.read_config(folder), find_tokenizer(folder, {})
    else:
        state, _ = checkpoint.read(folder)
        tokenizer = find_tokenizer(folder, state)
        config = find_config(folder, state, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: its model has {config.vocab_size} tokens, the tokenizer beside it {tokenizer.vocab_size}"
        )
    return config, tokenizer


def weight_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file that holds weights; those of a checkpoint are in its manifest, and proved by `load`."""
    if hf.is_hugging_face(folder):
        return {file: sha256(folder / file) for file in hf.weight_files(folder)}
    _, manifest = checkpoint.read(folder)
    files = sorted(checkpoint.files_of(manifest, skip=checkpoint.OPTIM))
    return {file: manifest["files"][file]["sha256"] for file in files}


def weights_hash(folder: Path) -> str:
    """One sha256 for all weights of a folder, by which adapters know the base that they were trained on."""
    return hashlib.sha256(json.dumps(weight_hashes(folder)).encode()).hexdigest()


def trained_seq_len(folder: Path) -> int | None:
    """The length of the rows that a folder's model was trained on here; None where that is not known."""
    if hf.is_hugging_face(folder):
        return None
    state, _ = checkpoint.read(folder)
    return ((state.get("config") or {}).get("data") or {}).get("seq_len")


def taught_template(folder: Path) -> str | None:
    """The name of the chat template that a folder's model was taught; None where it was taught none that is known."""
    if hf.is_hugging_face(folder):
        tokenizer = find_tokenizer(folder, {})
        text = jinja_of(tokenizer) if tokenizer else None
        if text is None:
            return None
        name = recognise(text, tokenizer)
        if name is None:
            logger.warning("%s: its chat template is none that is known; --template names the nearest", folder)
        return name
    state, _ = checkpoint.read(folder)
    return ((state.get("config") or {}).get("sft") or {}).get("template")


def default_params(path: str | Path) -> SamplingParams:
    """How a folder asks to be sampled from: by its generation_config.json; SamplingParams() where it has none."""
    folder = hf.find_folder(path)
    try:
        return SamplingParams(**hf.read_generation_config(folder))
    except ValueError as error:
        raise ValueError(f"{folder / hf.GENERATION}: {error}") from None


@torch.no_grad()
def load_weights(path: str | Path, model: Transformer, dist: Context = checkpoint.ALONE) -> Path:
    """Fill a model with the weights of a run, checkpoint or folder, in dtypes of its own; returns where they were.

    Each rank proves its share of the files, and reads what it holds of each weight. What no weight depends on may
    differ: how long sequences are, RoPE, dropout. Adapters of the model stay as they are. Raises ValueError where a
    weight has another shape or is missing.
    """
    folder = find_checkpoint(Path(path), dist=dist)
    is_of_run = folder != Path(path)  # then these ranks have proved it just now
    stored, into = open_whole(folder, dist, hashed=is_of_run), base_parameters(model)
    if is_int8(stored):
        raise ValueError(
            f"{folder}: its weights are int8, good for inference only; start from what it was exported from"
        )
    there = {name: tuple(shape) for name, (_, shape) in stored.tensors.items()}
    if there != {name: tuple(parameter.shape) for name, parameter in into.items()}:
        raise ValueError(f"{folder}: its model has another shape than the one that is to start from it")
    stored.fill(into)
    return folder


def load_base(path: str | Path, model: Transformer, seed: int = 0, dist: Context = checkpoint.ALONE) -> Path:
    """`load_weights` for a model with adapters, which then get the values that they begin with."""
    folder = load_weights(path, model, dist)
    init_lora(model, seed)
    return folder


def save(model: Transformer, tokenizer: Tokenizer | None, directory: str | Path, template: str | None = None) -> Path:
    """Write a folder that `load` reads: weights, config.json and tokenizer, whole or not at all.

    `template`: the name of the chat template that the model was taught. Raises ValueError when `directory` holds
    something already, when the disk is full or the place read-only, and for a model with adapters.
    """
    if adapted(model):
        raise ValueError("the model has adapters; merge_lora makes them a part of its weights")
    with new_home(model.config, tokenizer, directory, template) as (folder, state):
        checkpoint.write(folder, parameter_names(model), state)
    return Path(directory).resolve()


def export(
    path: str | Path,
    directory: str | Path,
    step: int | None = None,
    quantize: Literal["int8"] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """`save` of what `load` would load, however many files it is in; in the memory of a block of rows.

    `quantize`: store the weights in int8, for inference alone; this takes the memory of the model. `dtype`: cast them
    to it; None leaves them as they are. Raises ValueError as `load` and `save` do.
    """
    source = find_checkpoint(Path(path), step)
    stored = cast(open_whole(source), dtype)
    if quantize is not None and is_int8(stored):
        raise ValueError(f"{source}: its weights are int8 already; leave quantize out to copy it")
    with new_home(stored.config, stored.tokenizer, directory, taught_template(source)) as (folder, state):
        hf.copy_generation_config(source, folder)
        if quantize is None:
            checkpoint.write_whole(folder, stored.tensors, stored.blocks, state)
        else:
            checkpoint.write(folder, parameter_names(quantize_int8(in_memory(stored))), state)
    return Path(directory).resolve()


def export_hugging_face(
    path: str | Path,
    directory: str | Path,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """`export` as a folder of Hugging Face's, for transformers and whatever else reads those.

    What was written is read again and has to give the logits of the model before the folder is there. Raises
    ValueError also for a model that no family of theirs can express.
    """
    source = find_checkpoint(Path(path), step)
    stored = cast(open_whole(source), dtype)
    if is_int8(stored):
        raise ValueError(f"{source}: its weights are int8, which is our own format alone; export what it was made from")
    with new_directory(directory) as folder:
        chat = exported(taught_template(source), stored.tokenizer)
        hf.write(folder, stored.config, stored.tokenizer, stored.tensors, stored.blocks, max_shard_size, chat)
        hf.copy_generation_config(source, folder)
        check_same_logits(stored, open_hugging_face(folder))
    return Path(directory).resolve()


def cast(stored: Stored, dtype: torch.dtype | None) -> Stored:
    """The same model, its tensors described in another dtype, in which they are then written."""
    if dtype is None:
        return stored
    if is_int8(stored):
        raise ValueError(f"its weights are int8, which are not cast to {dtype}; export what it was made from")
    return stored._replace(tensors={name: (dtype, shape) for name, (_, shape) in stored.tensors.items()})


@torch.no_grad()
def check_same_logits(source: Stored, written: Stored) -> None:
    """Raises ValueError where the two give other logits for some tokens; one model is in memory at a time."""
    tokens = some_tokens(source.config)
    expected, found = (in_memory(stored)(tokens) for stored in (source, written))
    check_same(expected, found, expected.dtype)


def some_tokens(config: ModelConfig) -> Tensor:
    """(1, T), of all over the vocabulary."""
    return (torch.arange(min(16, config.max_seq_len)) * 7919 % config.vocab_size)[None]


def check_same(expected: Tensor, found: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of logits. Raises ValueError where it is more than weights in that dtype explain."""
    largest, difference = expected.abs().max().item(), (expected - found).abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(f"in {dtype} the model's logits are no numbers; choose another dtype")
    if not difference <= largest * max(1e-4, 4 * torch.finfo(dtype).eps):
        raise ValueError(f"what was written gives other logits than the model, by up to {difference:.2g}; not kept")
    return difference


@contextmanager
def new_home(
    config: ModelConfig, tokenizer: Tokenizer | None, directory: str | Path, template: str | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, state) to write weights with; the folder, with config and tokenizer, becomes `directory` in the end."""
    written = {"model": dataclasses.asdict(config)} | ({"sft": {"template": template}} if template else {})
    with new_directory(directory) as folder:
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        yield folder, {"config": written, "tokenizer_hash": tokenizer.hash if tokenizer else None}


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A folder to write in that becomes `directory` in the end; ValueError where something is there already."""
    directory = Path(directory).resolve()
    with explained(directory):
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise ValueError(f"{directory}: is there already; choose another directory, or remove it first")
        with atomic_directory(directory) as folder:
            yield folder


def find_checkpoint(
    path: Path, step: int | None = None, skip: str = checkpoint.OPTIM, dist: Context = checkpoint.ALONE
) -> Path:
    """The folder of weights that a path stands for: itself, or the newest valid checkpoint (or `step`'s) inside it.

    A name on the Hugging Face hub is looked for in the cache. `skip`, `dist`: as for `checkpoint.verify`, which says
    what is valid.
    """
    path = hf.find_folder(path)
    if not path.is_dir():
        problem = "is a file; give the directory it is in" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {problem} (expected a run, a checkpoint, a saved folder or one of Hugging Face's)")
    if (path / "manifest.json").exists():
        if step is not None:
            raise ValueError(f"{path}: is a single checkpoint; give the run's directory to choose step {step} in it")
        return path
    for directory in (path / "checkpoints", path):
        found = checkpoint.candidates(directory, dist)
        if found and step is not None:
            chosen = directory / f"step-{step:08d}"
            if chosen not in found:
                raise ValueError(f"{directory}: no step {step}; there are {', '.join(p.name for p in found[::-1])}")
            return chosen
        if found:
            newest = checkpoint.latest(directory, skip, dist)
            if newest is None:
                checkpoint.verify(found[0], skip, dist)  # raises: says what is wrong with the newest
            return newest
    if step is None and hf.is_hugging_face(path):
        return path
    raise ValueError(
        f"{path}: no run, checkpoint or saved folder; looked for manifest.json, checkpoints/step-*/ and step-*/ "
        "in it, and for the model_type of a Hugging Face folder in config.json"
    )


def homes_of(folder: Path) -> list[Path]:
    """Where config and tokenizer may be: beside the weights, or in the run that they are from."""
    if not folder.name.startswith("step-"):
        return [folder]
    return [folder, folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent]


def tokenizer_home(folder: Path) -> Path | None:
    """The directory of a checkpoint's tokenizer."""
    return next((home for home in homes_of(folder) if (home / "tokenizer.json").exists()), None)


def find_tokenizer(folder: Path, state: dict) -> Tokenizer | None:
    """The tokenizer of a checkpoint, where it is there; ValueError when it is not that of `state`."""
    home = tokenizer_home(folder)
    expected = state.get("tokenizer_hash")
    if home is None:
        if expected is not None:
            logger.warning("%s: the tokenizer this model was trained with is not there", homes_of(folder)[-1])
        return None
    tokenizer = load_tokenizer(home)
    if expected not in (None, tokenizer.hash):
        raise ValueError(
            f"{home}: its tokenizer (hash {tokenizer.hash[:12]}) is not the one that {folder} was trained with "
            f"(hash {expected[:12]}); put that one back"
        )
    return tokenizer


def find_config(folder: Path, state: dict, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model's shape, from the checkpoint's own state or else from the config.json of one of the directories."""
    source, config = folder / "state.json", state.get("config") or {}
    if "model" not in config:
        source = next((home / "config.json" for home in homes_of(folder) if (home / "config.json").exists()), None)
        config = read_json(source) if source else {}
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{folder}: the shape of the model is unknown: no section `model` in {source or 'a config'}")
    section = {name: value for name, value in config["model"].items() if name not in ("preset", "path")}
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(section.keys() - known):
        raise ValueError(f"{source}: model.{unknown[0]} is not a field of a model; written by a newer minillm?")
    if section.get("vocab_size") is None and tokenizer is not None:
        section["vocab_size"] = tokenizer.vocab_size
    try:
        return ModelConfig(**section)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its section `model` is not a model: {error}") from None
