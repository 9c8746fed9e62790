"""What is applied to a finished model from outside, in this order: activation checkpointing, compile.

The model knows nothing of it; it only has to offer `blocks`, each with an `attn`.
"""

from typing import Literal

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def parallelize(
    model: nn.Module,
    activation_checkpointing: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
) -> nn.Module:
    """Apply activation checkpointing and compilation, block by block, in place.

    Args: activation_checkpointing: "selective" recomputes attention in the backward pass, whose activations are many
        for the little work they cost (Korthikanti et al. 2022, section 5); "full" recomputes whole blocks and keeps
        only their inputs. Parameter names stay as they are.
    """
    for index, block in enumerate(model.blocks):
        if activation_checkpointing == "selective":
            block.attn = checkpoint_wrapper(block.attn)
        elif activation_checkpointing == "full":
            block = model.blocks[index] = checkpoint_wrapper(block)
        if compile:
            block.compile()
    return model
