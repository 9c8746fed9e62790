"""What training minimises: an objective counts a batch's units, and sums a loss over them.

The loss is a sum because only the trainer knows how many units the whole step has, over all micro-batches and ranks.
A metric is a pair (sum, count) for the same reason; one called `loss` is reported in place of what is minimised. The
model is any callable that takes `head`, so an objective works unchanged under DDP, FSDP2 and torch.compile.

Shapes: B batch, T time.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.losses import IGNORE_INDEX, Penalties, chunked_cross_entropy, chunked_losses, loss_and_hits
from minillm.tensors import unwrapped

Metrics = dict[str, tuple[Tensor | float, Tensor | int]]


class Objective(Protocol):
    """What is minimised: how many units a batch has, and the loss and metrics summed over them.

    A method `prepare(model, micro_batches, sum_over_ranks)`, where there is one, is called before the first forward of
    a step, or of an evaluation, on each rank with its micro-batches, in host memory, which it goes through once; it
    returns the objective for these, which may so know what only all of them together tell. `sum_over_ranks` adds up a
    tensor over the data-parallel ranks.
    """

    def count(self, batch: Any) -> int: ...

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]: ...


class NextToken:
    """Predict the next token: the unit is a target token, the loss its -log p in nats.

    Args:
        vocab_size: rows of the model's head beyond it are padding; None: there are none.
        chunk_tokens, skip_ignored: as in `chunked_losses`.
        label_smoothing, z_loss: penalties that join what is minimised, not the loss that is reported (`Penalties`).
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
        skip_ignored: bool | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        self.options = {"vocab_size": vocab_size, "chunk_tokens": chunk_tokens, "skip_ignored": skip_ignored}
        self.penalties = Penalties(label_smoothing, z_loss)

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are to be predicted."""
        return int((batch.targets != IGNORE_INDEX).sum())

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The sum of what is minimised; metrics only where that is more than the loss."""
        fields = {"positions": batch.positions, "doc_ids": batch.doc_ids}
        options = {"targets": batch.targets, **self.options}
        if not any(self.penalties):
            return model(batch.tokens, **fields, head=partial(chunked_cross_entropy, **options)), {}
        losses = model(batch.tokens, **fields, head=partial(chunked_losses, **options, penalties=self.penalties))
        count = (batch.targets != IGNORE_INDEX).sum()
        metrics: Metrics = {"loss": (losses.cross_entropy, count)}
        if self.penalties.z_loss:
            metrics["z_loss"] = (losses.z_loss, count)
        return losses.total, metrics


class NoisyNextToken(NextToken):
    """`NextToken` on embeddings with uniform noise of alpha / sqrt(T D), T being the length of the document.

    The noise comes from torch's generator, as dropout does. Where the model is not in training there is none.
    Source: Jain et al. 2023 (arXiv:2310.05914), who call it NEFTune.
    """

    def __init__(self, vocab_size: int | None = None, *, alpha: float, **options: Any):
        super().__init__(vocab_size, **options)
        self.alpha = alpha

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """As `NextToken`."""

        def add_noise(embed: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
            if not embed.training:
                return embedded
            size = self.alpha / (document_lengths(batch)[..., None] * embedded.shape[-1]).sqrt()  # (B, T, 1)
            return embedded + (2 * torch.rand_like(embedded) - 1) * size

        hook = unwrapped(model).embed.register_forward_hook(add_noise)
        try:
            return super().__call__(model, batch)
        finally:
            hook.remove()


def document_lengths(batch: Batch) -> Tensor:
    """(B, T): how many tokens the document has that a token is in."""
    B, T = batch.tokens.shape
    if batch.doc_ids is None:
        return torch.full((B, T), T, device=batch.tokens.device)
    lengths = torch.zeros(B, T, dtype=torch.int64, device=batch.tokens.device)  # of the documents of each row
    lengths.scatter_add_(1, batch.doc_ids, torch.ones_like(batch.doc_ids))
    return lengths.gather(1, batch.doc_ids)


class NextTokenAccuracy(NextToken):
    """`NextToken` for evaluation, with the metric `accuracy`: the share of targets that the model holds most likely."""

    def __init__(self, vocab_size: int | None = None):
        super().__init__(vocab_size)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The summed loss, without gradients, and the metric."""
        head = partial(loss_and_hits, targets=batch.targets, **self.options)
        loss_sum, hits = model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids, head=head)
        return loss_sum, {"accuracy": (hits, (batch.targets != IGNORE_INDEX).sum())}
