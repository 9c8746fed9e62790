"""What a model is fed: one micro-batch of rows.

B batch (rows), T time (tokens a row).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch. `positions` and `doc_ids` are None where rows are plain stretches of text."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, the token that follows; IGNORE_INDEX where nothing is to be learned
    positions: Tensor | None = None  # (B, T) int64, restarting at 0 in every piece of a packed row
    doc_ids: Tensor | None = None  # (B, T) int64, 0, 1, 2, ... along a packed row
    # Where a document is a tree, a prompt with several answers: 0 the prompt, 1 chosen, 2 rejected, 3 another's answer.
    # An answer sees the prompt and itself, and its positions go on from the end of the prompt.
    branches: Tensor | None = None  # (B, T) int64
    reference: Tensor | None = None  # (B, T) float32, log p of each target under the reference, where it is cached

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from page-locked memory the host goes on while it is copied."""
        return Batch(*(None if field is None else field.to(device, non_blocking=True) for field in self))

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows start .. stop - 1."""
        return Batch(*(None if field is None else field[start:stop] for field in self))
