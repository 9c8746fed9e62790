"""A model as it is stored, and in memory.

It is built on the meta device, without memory, and checked against the files there; then it gets memory and is filled
from them a part of a tensor at a time. So the peak is one model, and the optimizer's files stay closed.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm import checkpoint, hf
from minillm.distributed.context import Context
from minillm.load.find import adapters_in, describe, find_checkpoint, weights_hash
from minillm.lora import LoRAConfig, adapted, add_adapters, base_parameters, init_lora
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.quantize import quantize_int8
from minillm.tensors import parameter_names
from minillm.tokenizer import Tokenizer


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    step: int | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """The model, in eval mode, and its tokenizer (None where there is none) of a run, checkpoint, saved folder, or one
    of Hugging Face's.

    Of a run, the newest checkpoint that verifies, or that of `step`. Parameters keep the dtype they were saved in,
    unless another is given. Of a run with LoRA the model has its adapters; `base` says where what they were trained on
    is now, if it was moved.
    Raises ValueError for a path that is none of these, a damaged checkpoint, a tokenizer that is not the model's, and
    another base.
    """
    stored = cast(open_stored(find_checkpoint(Path(path), step), base=base), dtype)
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


def cast(stored: Stored, dtype: torch.dtype | None) -> Stored:
    """The same model, its tensors described in another dtype, in which they are then read or written."""
    if dtype is None:
        return stored
    if is_int8(stored):
        raise ValueError(
            f"dtype: weights in int8 are not cast to {dtype}; leave it out, or take the model that they were made from"
        )
    return stored._replace(tensors={name: (dtype, shape) for name, (_, shape) in stored.tensors.items()})


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


@torch.no_grad()
def load_weights(path: str | Path, model: Transformer, dist: Context = checkpoint.ALONE) -> Path:
    """Fill a model with the weights of a run, checkpoint or folder, in dtypes of its own; returns where they were.

    Each rank proves its share of the files, and reads what it holds of each weight. What no weight depends on may
    differ: how long sequences are, RoPE, dropout. Adapters of the model stay as they are. Raises ValueError where a
    weight has another shape or is missing.
    """
    folder, hashed = find_proved(path, dist)
    fill(folder, open_whole(folder, dist, hashed), base_parameters(model))
    return folder


def load_base(path: str | Path, model: Transformer, seed: int = 0, dist: Context = checkpoint.ALONE) -> Path:
    """`load_weights` for a model that may have adapters: they begin at nothing, or go on from those that are there.

    Raises ValueError where the model has other adapters than those that are there.
    """
    folder, hashed = find_proved(path, dist)
    if adapters_in(folder) and adapted(model):
        stored = open_stored(folder, dist, hashed)
        check_adapters(folder, stored.lora, next(iter(adapted(model).values())).config)
        fill(folder, stored, parameter_names(model))
    else:
        fill(folder, open_whole(folder, dist, hashed), base_parameters(model))
        init_lora(model, seed)
    return folder


def find_proved(path: str | Path, dist: Context) -> tuple[Path, bool]:
    """The folder that a path stands for, and whether these ranks have proved it just now."""
    folder = find_checkpoint(Path(path), dist=dist)
    return folder, folder != Path(path)


def fill(folder: Path, stored: Stored, into: Mapping[str, Tensor]) -> None:
    """Give parameters the values that are stored. Raises ValueError where some have another shape, or are missing."""
    if is_int8(stored):
        raise ValueError(
            f"{folder}: its weights are int8, good for inference only; start from what it was exported from"
        )
    there = {name: tuple(shape) for name, (_, shape) in stored.tensors.items()}
    if there != {name: tuple(parameter.shape) for name, parameter in into.items()}:
        raise ValueError(f"{folder}: its model has another shape than the one that is to start from it")
    stored.fill(into)


def check_adapters(folder: Path, there: LoRAConfig, here: LoRAConfig) -> None:
    """Raises ValueError where adapters that are to go on are not what they were; dropout may be another."""
    ours, theirs = (dataclasses.asdict(config) | {"alpha": config.scale * config.r} for config in (here, there))
    differ = [name for name in ours if ours[name] != theirs[name] and name not in ("dropout", "base_precision")]
    if differ:
        said = ", ".join(f"lora.{name} {theirs[name]}, not {ours[name]}" for name in differ)
        raise ValueError(
            f"{folder}: has adapters of another kind: {said}. Leave lora out to go on with them, or make them a part "
            f"of the weights: `minillm merge {folder} OUT`"
        )
