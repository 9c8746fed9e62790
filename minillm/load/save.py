"""A model into a folder: as it is in memory, or as it is stored, in our format or in Hugging Face's."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minillm import checkpoint, hf
from minillm.data.jinja import exported
from minillm.files import atomic_directory, explained
from minillm.load.find import find_checkpoint, taught_template
from minillm.load.stored import Stored, cast, in_memory, is_int8, open_hugging_face, open_stored, open_whole
from minillm.lora import adapted
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.quantize import quantize_int8
from minillm.tensors import parameter_names
from minillm.tokenizer import Tokenizer


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


def export_peft(path: str | Path, directory: str | Path, step: int | None = None) -> Path:
    """Write the adapters of a run with LoRA as a folder that peft reads. Raises ValueError where there are none."""
    source = find_checkpoint(Path(path), step)
    stored = open_stored(source)
    if not stored.lora.r:
        raise ValueError(f"{source}: has no adapters; --format hf writes the whole model")
    return hf.save_peft(in_memory(stored), directory, checkpoint.read(source)[0]["base_path"])


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
