"""A model with adapters, ours or peft's, as one of plain weights."""

from pathlib import Path

import torch

from minillm import checkpoint, hf
from minillm.load import (
    check_same,
    find_checkpoint,
    in_memory,
    new_home,
    open_stored,
    open_whole,
    some_tokens,
    taught_template,
)
from minillm.lora import merge_lora
from minillm.model.transformer import Transformer
from minillm.tensors import parameter_names
from minillm.tokenizer import Tokenizer


@torch.no_grad()
def merge(
    path: str | Path,
    directory: str | Path,
    step: int | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, float]:
    """Write what `load` would load with its adapters made a part of its weights: summed in fp32, written in `dtype`.

    Returns: where it is, and the largest difference of a logit. `base`: as for `load`. Raises ValueError, with nothing
    written, for a model without adapters and where what is to be written gives other logits.
    """
    source = find_checkpoint(Path(path), step)
    stored = open_stored(source, base=base)
    if not stored.lora.r:
        raise ValueError(f"{source}: has no adapters to merge; `minillm export` copies it as it is")
    return write_merged(in_memory(stored), stored.tokenizer, taught_template(source), directory, dtype)


@torch.no_grad()
def merge_peft(
    adapters: str | Path,
    directory: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Path, float]:
    """`merge` of a folder of peft's and the model that its adapters belong to; `dtype`: None is that of the model.

    `base`: where that model is; None: where the folder says. Raises ValueError also where it is not there.
    """
    named = base or hf.peft_base(adapters)
    if named is None:
        raise ValueError(f"{adapters}: does not say which model its adapters belong to; give it with --base")
    try:
        source = find_checkpoint(Path(named))
    except ValueError as error:
        raise ValueError(f"{adapters}: the model that its adapters belong to is not there; --base: {error}") from None
    stored = open_whole(source)
    model = hf.load_peft(in_memory(stored), adapters)
    dtype = dtype or stored.tensors["embed.weight"][0]
    return write_merged(model, stored.tokenizer, taught_template(source), directory, dtype)


def write_merged(
    model: Transformer, tokenizer: Tokenizer | None, template: str | None, directory: str | Path, dtype: torch.dtype
) -> tuple[Path, float]:
    """Write a model with its adapters merged, where its logits stay the same; (where, the largest difference)."""
    with new_home(model.config, tokenizer, directory, template) as (folder, state):
        tokens = some_tokens(model.config)
        expected = model.float()(tokens)
        found = merge_lora(model).to(dtype).float()(tokens)  # with the weights as they will be written
        difference = check_same(expected, found, dtype)
        checkpoint.write(folder, parameter_names(model.to(dtype)), state)
    return Path(directory).resolve(), difference
