"""Losses over a large vocabulary: heads that a model ends with (heads.py), and the chunks they work in (chunks.py)."""

from minillm.losses.chunks import IGNORE_INDEX, Losses, Penalties, matmul_dtype
from minillm.losses.heads import (
    chunked_cross_entropy,
    chunked_losses,
    cross_entropy,
    loss_and_hits,
    penalised_cross_entropy,
    token_logprobs,
)

__all__ = [
    "IGNORE_INDEX",
    "Losses",
    "Penalties",
    "chunked_cross_entropy",
    "chunked_losses",
    "cross_entropy",
    "loss_and_hits",
    "matmul_dtype",
    "penalised_cross_entropy",
    "token_logprobs",
]
