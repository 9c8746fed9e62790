"""What training minimises: an objective counts a batch's units, and sums a loss over them.

The loss is a sum because only the trainer knows how many units the whole step has, over all micro-batches and ranks.
A metric is a pair (sum, count) for the same reason. The model is any callable that takes `head`, so an objective
works unchanged under DDP, FSDP2 and torch.compile.

Shapes: B batch, T time.
"""

from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.losses import IGNORE_INDEX, chunked_cross_entropy

Metrics = dict[str, tuple[Tensor | float, Tensor | int]]


class Objective(Protocol):
    """What is minimised: how many units a batch has, and the loss and metrics summed over them."""

    def count(self, batch: Any) -> int: ...

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]: ...


class NextToken:
    """Predict the next token: the unit is a target token, the loss its -log p in nats.

    Args:
        vocab_size: rows of the model's head beyond it are padding; None: there are none.
        chunk_tokens, skip_ignored: as in `chunked_cross_entropy`.
    """

    def __init__(
        self, vocab_size: int | None = None, chunk_tokens: int | None = None, skip_ignored: bool | None = None
    ):
        self.options = {"vocab_size": vocab_size, "chunk_tokens": chunk_tokens, "skip_ignored": skip_ignored}

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are to be predicted."""
        return int((batch.targets != IGNORE_INDEX).sum())

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The summed loss; no metric, since the loss says it all."""
        head = partial(chunked_cross_entropy, targets=batch.targets, **self.options)
        loss_sum = model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids, head=head)
        return loss_sum, {}
