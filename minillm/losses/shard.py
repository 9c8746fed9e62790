"""A head whose rows are spread over the ranks of the tp axis: which of them this rank holds.

Each rank makes the logits of its rows alone. What the softmax needs of the others is three numbers a token, the largest
logit, the sum of the exponentials and the target's logit, so that neither logits nor weights are sent.
Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.

Shapes: V vocab, D dim, C rows of a chunk.
"""

from typing import NamedTuple

import torch.distributed as torch_dist
from torch import Tensor, nn

from minillm.tensors import is_sharded


class VocabShard(NamedTuple):
    """The part of the vocabulary that this rank computes: of `count` equal ones the one at `index`."""

    rows: int  # of lm_head on each rank, those of padding included
    index: int = 0
    count: int = 1
    group: torch_dist.ProcessGroup | None = None  # the ranks that hold the parts

    @property
    def first(self) -> int:
        """The token whose row is the first one here."""
        return self.index * self.rows

    def holds(self, targets: Tensor) -> Tensor:
        """Whether a target's row is here; what is no token falls to the first or last rank, which fails to find it."""
        return (targets // self.rows).clamp(0, self.count - 1) == self.index

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.count > 1:
            torch_dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks, in place."""
        if self.count > 1:
            torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX, group=self.group)
        return tensor


def local_head(lm_head: nn.Linear) -> tuple[Tensor, Tensor | None, VocabShard]:
    """Weight and bias of a head, or the rows of them that this rank holds, and which those are.

    Gradients of the parts reach the parameters. Raises RuntimeError for a weight that is cut in another way, such as
    one that FSDP2 has not gathered.
    """
    weight, bias = lm_head.weight, lm_head.bias
    if not is_sharded(weight):
        return weight, bias, VocabShard(len(weight))
    mesh = weight.device_mesh
    if mesh.mesh_dim_names != ("tp",) or not weight.placements[0].is_shard(0):
        raise RuntimeError(
            f"lm_head.weight lies as {weight.placements} over the axes {mesh.mesh_dim_names}; a head can use it where "
            "it is whole, or cut by rows over tp: hand it to the model, which calls it inside its forward"
        )
    shard = VocabShard(len(weight) // mesh.size(), mesh.get_local_rank(), mesh.size(), mesh.get_group())
    return weight.to_local(), None if bias is None else bias.to_local(), shard
