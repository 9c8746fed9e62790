"""Parameters of which each rank holds a part: their parts, and the norms of the whole.

What an optimizer does to each number by itself it does to parts as they are; a norm needs all of them.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

from minillm.tensors import is_sharded


def parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each, sharing its memory; a plain tensor is here wholly."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def batched(parameters: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """The parameters in order, in lists of at most so many numbers (or of one parameter), counted over all ranks."""
    batches: list[list[Tensor]] = []
    total = math.inf
    for parameter in parameters:
        total += parameter.numel()
        if total > most:
            batches.append([])
            total = parameter.numel()
        batches[-1].append(parameter)
    return batches


def whole_norms(pieces: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """(P,): the norm of each whole tensor, of which `pieces` are what this rank holds; equal on all ranks.

    Args: parameters: tensors that are sharded as those are. Where one of them is a DTensor all ranks have to call this.

    One sum over all ranks serves every sharding: of numbers that several ranks hold, each counts its share.
    """
    # a CPU adds up in a row: in fp32 the norm of ten million numbers is wrong in the fourth digit
    dtype = torch.float64 if pieces[0].device.type == "cpu" else None
    norms = torch._foreach_norm(pieces, dtype=dtype)
    if not any(is_sharded(parameter) for parameter in parameters):
        return torch.stack(norms).to(pieces[0].dtype)
    shares = torch._foreach_mul(norms, [1 / math.sqrt(copies(parameter)) for parameter in parameters])
    squares = torch.stack(shares).square()
    torch_dist.all_reduce(squares)
    return squares.sqrt().to(pieces[0].dtype)


def copies(tensor: Tensor) -> int:
    """How many ranks hold each number of a tensor."""
    cuts = 1
    if is_sharded(tensor):
        axes = enumerate(tensor.placements)
        cuts = math.prod(tensor.device_mesh.size(axis) for axis, placement in axes if not placement.is_replicate())
    return torch_dist.get_world_size() // cuts
