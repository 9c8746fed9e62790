"""What a run has done so far, what ends it early, and the seeds that follow from where it is."""

from dataclasses import dataclass
from typing import Any


class Stopped(Exception):
    """A signal came during an evaluation, whose part is thrown away."""


class NonFiniteError(ValueError):
    """The loss or the gradient was not a finite number for too many steps in a row."""


@dataclass
class Progress:
    """What a run has done so far: with the tensors, all that a checkpoint has to hold."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    spikes: int = 0
    bad_steps_in_a_row: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    unevaluated: dict[str, Any] | None = None  # the row of a step whose evaluation a signal cut short


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A 63-bit seed that differs wherever one of the four does: each is folded in by a multiply-xor round."""
    mixed = 0
    for value in (seed, step, micro_batch, rank):
        mixed = (mixed ^ value + 1) * 0x9E3779B97F4A7C15 % 2**64  # 2**64 / golden ratio (Knuth, TAOCP 3, 6.4)
        mixed ^= mixed >> 29
    return mixed >> 1
