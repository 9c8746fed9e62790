"""A model with adapters, as one of plain weights."""

from pathlib import Path

import torch

from minillm import checkpoint
from minillm.load import check_same, find_checkpoint, in_memory, new_home, open_stored, some_tokens, taught_template
from minillm.lora import merge_lora
from minillm.tensors import parameter_names


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
    with new_home(stored.config, stored.tokenizer, directory, taught_template(source)) as (folder, state):
        model, tokens = in_memory(stored).float(), some_tokens(stored.config)
        expected = model(tokens)
        found = merge_lora(model).to(dtype).float()(tokens)  # with the weights as they will be written
        difference = check_same(expected, found, dtype)
        checkpoint.write(folder, parameter_names(model.to(dtype)), state)
    return Path(directory).resolve(), difference
