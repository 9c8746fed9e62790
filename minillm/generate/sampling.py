"""From logits to the next token: pure functions, applied in one order.

    logits -> temperature -> top_k -> top_p -> softmax -> a token        (temperature 0: the most likely token)

Shapes: B batch, V vocab.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How new tokens are chosen, and how many."""

    max_new_tokens: Annotated[
        int | None, "tokens to generate (none: as many as the context holds, at most 256)", ">= 1"
    ] = None
    temperature: Annotated[float, "below 1 sharper, above 1 flatter, 0 always the most likely token", ">= 0"] = 1.0
    top_k: Annotated[int, "choose among the k most likely tokens (-1: among all)", ">= -1"] = -1
    top_p: Annotated[float, "choose among the fewest tokens that have this probability together", "> 0, <= 1"] = 1.0
    seed: Annotated[int | None, "the same seed gives the same text (none: another one each time)", ">= 0"] = None

    def __post_init__(self):
        problems = []
        if self.max_new_tokens is not None and not (is_whole(self.max_new_tokens) and self.max_new_tokens >= 1):
            problems.append(f"max_new_tokens: must be a whole number of at least 1, not {self.max_new_tokens!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature: must be 0 (greedy) or greater, not {self.temperature!r}")
        if not (is_whole(self.top_k) and (self.top_k == -1 or self.top_k >= 1)):
            problems.append(
                f"top_k: must be a whole number of at least 1, or -1 to choose among all, not {self.top_k!r}"
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: must be greater than 0 and at most 1, not {self.top_p!r}")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            problems.append(f"seed: must be a whole number from 0 to 2^63 - 1, not {self.seed!r}")
        if problems:
            raise ValueError("\n".join(problems))


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the distances between logits by a temperature greater than 0; the greatest becomes 0."""
    greatest = logits.amax(dim=-1, keepdim=True)  # taken off first, so that no temperature overflows
    return (logits - greatest) / max(temperature, torch.finfo(logits.dtype).tiny)


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k greatest; ties with the k-th stay."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest most likely tokens whose probabilities sum to p or more.

    Source: Holtzman et al. 2020, nucleus sampling.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # what the more likely ones sum to: 0 for the first, so that one is kept
    return torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(before >= p, -math.inf))


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits whose softmax is the distribution to sample from; temperature must not be 0. (..., V) -> (..., V)"""
    logits = apply_temperature(logits, params.temperature)
    if params.top_k != -1:
        logits = apply_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = apply_top_p(logits, params.top_p)
    return logits


def choose(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """The next token of each row. logits (B, V), uniform (B,) random numbers in [0, 1) -> (B,)

    One number a row decides, by where it falls in the cumulated probabilities: a row's token depends neither on the
    other rows nor on the device.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    probs = filter_logits(logits if logits.dtype == torch.float64 else logits.float(), params).softmax(dim=-1)
    edges = probs.cumsum(dim=-1)  # (B, V)
    total = edges[:, -1:]
    token = torch.searchsorted(edges, uniform.to(edges)[:, None] * total, right=True)
    possible = (edges < total).sum(dim=-1, keepdim=True)  # the last token that is, should rounding reach the total
    return torch.minimum(token, possible)[:, 0]
