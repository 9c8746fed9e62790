"""How likely the model itself finds tokens: its logits as they are, before any parameter changes them.

Shapes: n positions, V vocab, D dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

POSITIONS_AT_ONCE = 256  # whose logits are in memory together


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, by itself: before any parameter changed what is chosen."""

    token: int
    logprob: float  # in nats
    alternatives: dict[int, float] = field(default_factory=dict)  # the likeliest there and theirs, where asked for


def log_probs(logits: Tensor) -> Tensor:
    """In fp32, or fp64 where the model is. (n, V) -> (n, V)"""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)


def token_logprobs(logits: Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """Of a token after each position, with the given number of alternatives there. logits (n, V)"""
    all_tokens = log_probs(logits)
    index = torch.tensor(tokens, device=logits.device)
    own = all_tokens.gather(-1, index[:, None])[:, 0].tolist()
    if not any(alternatives):
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, own)]
    values, ids = (best.tolist() for best in all_tokens.topk(min(max(alternatives), logits.shape[-1])))
    return [
        TokenLogprob(token, logprob, dict(zip(ids[i][:k], values[i][:k])))
        for i, (token, logprob, k) in enumerate(zip(tokens, own, alternatives))
    ]


def text_logprobs(
    lm_head: nn.Linear, hidden: Tensor, tokens: Sequence[int], vocab_size: int, alternatives: int
) -> list[TokenLogprob]:
    """Of each token of a text after the hidden state (n, D) before it; the logits of a few positions at a time."""
    found = []
    for start in range(0, len(tokens), POSITIONS_AT_ONCE):
        here = slice(start, start + POSITIONS_AT_ONCE)
        logits = lm_head(hidden[here])[:, :vocab_size]
        found += token_logprobs(logits, tokens[here], [alternatives] * len(logits))
    return found
