"""Rotary positions, and the ways to stretch them to a longer context.

Shapes: B batch, T time, H heads, d head_dim.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LLAMA3_TURNS = (1, 4)  # over the original context: below, a frequency is scaled in full; above, not at all
YARN_TURNS = (1, 32)


class RopeScaling(NamedTuple):
    """How far the context is stretched, and from what length."""

    kind: str  # a key of SCALINGS
    factor: float
    original_len: int


class Rope:
    """Rotary positions: turns the pair (x[i], x[i + d/2]) of a head by the angle position * theta^(-2i/d).

    A query at position m and a key at position n then meet at an angle that depends on m - n alone. Computed from
    positions once a forward and handed to every block: no buffers, and fp32 angles however the model is cast.
    With `scaling` the slow turns are slower yet, so that a model sees further than it was trained to.
    Source: Su et al. 2021, with the pairing of the Llama weights on the Hugging Face hub.
    """

    def __init__(self, positions: Tensor, head_dim: int, theta: float, scaling: "RopeScaling | None" = None):
        """positions: (B, T), or (1, T) where all rows share them."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # (d/2,)
        frequencies = 1.0 / theta**exponents  # radians a position
        if scaling is not None:
            frequencies = SCALINGS[scaling.kind](frequencies, scaling, theta)
        angles = positions[:, None, :, None] * frequencies  # (B, 1, T, d/2): the heads share them
        length = 1 + 0.1 * math.log(scaling.factor) if scaling is not None and scaling.kind == "yarn" else 1.0
        self.cos, self.sin = length * angles.cos(), length * angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, H, T, d) -> the same shape and dtype, rotated."""
        x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, d/2) each
        rotated = torch.cat([x1 * self.cos - x2 * self.sin, x2 * self.cos + x1 * self.sin], dim=-1)
        return rotated.type_as(x)


Rotation = Callable[[Tensor], Tensor]  # of queries or keys: a Rope, or no_rotation


def no_rotation(x: Tensor) -> Tensor:
    """Stands where Rope would, in models with learned positions or none."""
    return x


# --- stretching -------------------------------------------------------------------------------------------------------


def linear(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """All turns slower by the factor: positions are pressed together. Source: Chen et al. 2023 (arXiv:2306.15595)."""
    return frequencies / scaling.factor


def ntk(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """A larger theta, so that the slowest turn is slower by the factor and the fastest stays. Source: /u/bloc97 2023.

    Of the factor alone, never of the length at hand: cached keys stay right while a text grows.
    """
    pairs = len(frequencies)
    index = torch.arange(pairs, device=frequencies.device, dtype=torch.float32)
    return frequencies / scaling.factor ** (index / max(pairs - 1, 1))


def llama3(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Fast turns stay, slow ones are slowed, with a ramp over the number of turns between. Source: Llama Team 2024."""
    few, many = LLAMA3_TURNS
    turns = scaling.original_len * frequencies / (2 * math.pi)
    kept = ((turns - few) / (many - few)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def yarn(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """As llama3, with the ramp over the index of the pair. Source: Peng et al. 2023 (arXiv:2309.00071), section 3.2.

    Queries and keys are also made longer by 1 + ln(factor) / 10 (eq. 22), which `Rope` does.
    """
    pairs = len(frequencies)

    def pair_of(turns: float) -> float:
        """The (fractional) index of the pair that makes so many turns over the original context."""
        return pairs * math.log(scaling.original_len / (turns * 2 * math.pi)) / math.log(theta)

    few, many = YARN_TURNS
    first, last = max(math.floor(pair_of(many)), 0), min(math.ceil(pair_of(few)), 2 * pairs - 1)
    index = torch.arange(pairs, device=frequencies.device, dtype=torch.float32)
    slowed = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return (1 - slowed) * frequencies + slowed * frequencies / scaling.factor


SCALINGS: dict[str, Callable[[Tensor, RopeScaling, float], Tensor]] = {
    "linear": linear,
    "ntk": ntk,
    "llama3": llama3,
    "yarn": yarn,
}
