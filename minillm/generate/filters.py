"""From logits to the next token: pure functions, applied in one order.

    adjust_logits   logit_bias -> repetition_penalty -> presence_penalty, frequency_penalty -> min_new_tokens
    filter_logits   -> temperature -> top_k -> top_p -> min_p
    choose          -> softmax -> a token                                 (temperature 0: the most likely token)

The rows of one call share one SamplingParams. A token that is excluded has the logit -inf, through all of it.

Shapes: n rows, V vocab.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.generate.params import SamplingParams

USUALLY_ENOUGH = 1024  # tokens that hold the probability asked for; sorting all of 150,000 takes ten times as long


class TokenCounts(NamedTuple):
    """Which tokens the prompt of each row has, and how often each came since: what penalties go by.

    Tables over the vocabulary, so that a step costs the same after a prompt of any length. A row belongs to whoever
    began it; `take` gives any rows in any order, as a copy.
    """

    in_prompt: Tensor  # (n, V) bool
    new: Tensor  # (n, V) int32

    @classmethod
    def empty(cls, n: int, vocab_size: int, device: torch.device | str | None = None) -> "TokenCounts":
        shape = (n, vocab_size)
        return cls(
            torch.zeros(shape, dtype=torch.bool, device=device), torch.zeros(shape, dtype=torch.int32, device=device)
        )

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """A row begins with a prompt; what it had is forgotten. Tokens that no logit stands for are left out."""
        self.in_prompt[row] = False
        self.new[row] = 0
        tokens = torch.tensor(prompt, device=self.new.device)
        self.in_prompt[row, tokens[tokens < self.new.shape[1]]] = True

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """One new token in each of some rows, which are all different."""
        self.new[rows, tokens] += 1

    def take(self, rows: Tensor | Sequence[int]) -> "TokenCounts":
        return TokenCounts(self.in_prompt[rows], self.new[rows])


# --- biases and penalties: also for beam search and the most likely token ---------------------------------------------


def apply_logit_bias(logits: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Add a number to the logits of some tokens; -inf excludes them.

    Source: OpenAI's API reference, `logit_bias`, where -100 all but excludes a token: a chance e^100 times smaller.
    """
    tokens, values = zip(*bias)
    added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    return logits.index_add(-1, torch.tensor(tokens, device=logits.device), added.expand(*logits.shape[:-1], -1))


def apply_repetition_penalty(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Divide the positive logits of tokens that were seen by the penalty, and multiply the negative ones.

    Source: Keskar et al. 2019, CTRL, section 4.1; it divides both, which makes tokens with negative logits likelier.
    """
    pick = torch.minimum if penalty > 1 else torch.maximum  # ten times as fast as asking for each logit's sign
    return torch.where(seen, pick(logits * penalty, logits / penalty), logits)


def apply_count_penalties(logits: Tensor, presence: float, frequency: float, new: Tensor) -> Tensor:
    """Take off `frequency` for each time that a new token came, and `presence` once if it came at all.

    Source: OpenAI's API guide, frequency and presence penalties: mu[j] - c[j] * frequency - (c[j] > 0) * presence.
    """
    times = new.to(logits.dtype)
    return logits - times * frequency - times.clamp(max=1) * presence


def exclude(logits: Tensor, tokens: Sequence[int], rows: Tensor) -> Tensor:
    """-inf for some tokens in the rows (n,) that are true; a row that has no other token keeps them."""
    excluded = logits.index_fill(-1, torch.tensor(tokens, device=logits.device), -math.inf)
    others = (excluded > -math.inf).any(dim=-1)
    return torch.where((rows & others)[:, None], excluded, logits)


def adjust_logits(
    logits: Tensor,
    params: SamplingParams,
    counts: TokenCounts | None = None,
    new_tokens: Tensor | None = None,
    stop_ids: Sequence[int] = (),
) -> Tensor:
    """Logits after biases and penalties. (n, V) -> (n, V), in fp32 or fp64

    `counts` is needed where `params.needs_counts`, and the number of `new_tokens` (n,) of each row where there are
    `min_new_tokens`, before which none of `stop_ids` is chosen. Given log-probabilities, as beam search does, it works
    on those.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if params.logit_bias:
        logits = apply_logit_bias(logits, params.logit_bias)
    if params.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, params.repetition_penalty, counts.in_prompt | (counts.new > 0))
    if params.presence_penalty or params.frequency_penalty:
        logits = apply_count_penalties(logits, params.presence_penalty, params.frequency_penalty, counts.new)
    if params.min_new_tokens and stop_ids:
        logits = exclude(logits, stop_ids, new_tokens < params.min_new_tokens)
    return logits


# --- temperature and filters: what is sampled from --------------------------------------------------------------------


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the distances between logits by a temperature greater than 0; the greatest becomes 0."""
    greatest = logits.amax(dim=-1, keepdim=True)  # taken off first, so that no temperature overflows
    limits = torch.finfo(logits.dtype)
    return (logits - greatest) / min(max(temperature, limits.tiny), limits.max)


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k greatest; ties with the k-th stay."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest most likely tokens whose probabilities sum to p or more; ties with the last stay.

    Source: Holtzman et al. 2020, nucleus sampling.
    """
    probs = logits.softmax(dim=-1)
    ordered = probs.topk(min(USUALLY_ENOUGH, logits.shape[-1])).values
    if (ordered.sum(dim=-1) < p).any():
        ordered = probs.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered  # what the more likely ones sum to: 0 for the first, so that one is kept
    p = max(p, torch.finfo(probs.dtype).tiny)  # any smaller is 0 in this dtype, and the first would not be kept
    smallest = ordered.masked_fill(before >= p, math.inf).amin(dim=-1, keepdim=True)
    return logits.masked_fill(probs < smallest, -math.inf)


def apply_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less than p times as likely as the most likely one.

    Source: Nguyen et al. 2024, Turning up the heat: min-p sampling.
    """
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits whose softmax is the distribution to sample from; temperature must not be 0. (n, V) -> (n, V)"""
    logits = apply_temperature(logits, params.temperature)
    if params.top_k != -1:
        logits = apply_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = apply_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = apply_min_p(logits, params.min_p)
    return logits


def choose(
    logits: Tensor,
    params: SamplingParams,
    uniform: Tensor,
    counts: TokenCounts | None = None,
    new_tokens: Tensor | None = None,
    stop_ids: Sequence[int] = (),
) -> Tensor:
    """The next token of each row. logits (n, V), uniform (n,) random numbers in [0, 1); the rest as `adjust_logits`.

    One number a row decides, by where it falls in the cumulated probabilities: a row's token depends neither on the
    other rows nor on the device. Returns: (n,)
    """
    logits = adjust_logits(logits, params, counts, new_tokens, stop_ids)
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    edges = filter_logits(logits, params).softmax(dim=-1).cumsum(dim=-1)  # (n, V)
    total = edges[:, -1:]
    token = torch.searchsorted(edges, uniform.to(edges)[:, None] * total, right=True)
    possible = (edges < total).sum(dim=-1, keepdim=True)  # the last token that is, should rounding reach the total
    return torch.minimum(token, possible)[:, 0]
