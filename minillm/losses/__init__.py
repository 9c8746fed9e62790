"""Losses over a large vocabulary: heads that a model ends with (heads.py), and the chunks they work in (chunks.py).

What is preferred over what is measured on log-probabilities (preference.py), which one of those heads makes.
"""

from minillm.losses.chunks import IGNORE_INDEX, Losses, Penalties, matmul_dtype
from minillm.losses.heads import (
    chunked_cross_entropy,
    chunked_losses,
    cross_entropy,
    loss_and_hits,
    penalised_cross_entropy,
    token_logprobs,
)
from minillm.losses.preference import (
    LOSSES,
    PreferenceLoss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "Losses",
    "Penalties",
    "PreferenceLoss",
    "chunked_cross_entropy",
    "chunked_losses",
    "cross_entropy",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "loss_and_hits",
    "matmul_dtype",
    "orpo_loss",
    "penalised_cross_entropy",
    "simpo_loss",
    "token_logprobs",
]
