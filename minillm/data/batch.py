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

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from page-locked memory the host goes on while it is copied."""
        return Batch(*(None if field is None else field.to(device, non_blocking=True) for field in self))
