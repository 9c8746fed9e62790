"""What an engine asks of the model: logits after packed prompts, and after a token more of each row.

Shapes: n prompts, T tokens of all of them, B rows, D dim, V vocab.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from minillm.generate.cache import NextTokens, PackedPrompts
from minillm.generate.logprobs import TokenLogprob, text_logprobs
from minillm.generate.request import Request


def prompt_logits(model: nn.Module, requests: Sequence[Request], caches: Sequence[PackedPrompts]) -> Tensor:
    """Logits after the prompt of each request, (n, V), all read in one row; also gives them their prompt_logprobs."""
    device, vocab_size = next(model.parameters()).device, model.config.vocab_size
    lengths = [len(request.prompt) for request in requests]
    ends = list(accumulate(lengths))
    tokens = torch.tensor([[token for request in requests for token in request.prompt]], device=device)  # (1, T)
    doc_ids = None
    if len(requests) > 1:
        doc_ids = torch.arange(len(requests)).repeat_interleave(torch.tensor(lengths))[None].to(device)  # (1, T)

    def head(lm_head: nn.Linear, hidden: Tensor) -> Tensor:  # (1, T, D): most positions need no logits
        for request, end in zip(requests, ends):
            k, before = request.params.prompt_logprobs, hidden[0, end - len(request.prompt) : end - 1]
            if k is not None and request.prompt_logprobs is None:
                request.prompt_logprobs = [None, *text_logprobs(lm_head, before, request.prompt[1:], vocab_size, k)]
        return lm_head(hidden[0, [end - 1 for end in ends]])[:, :vocab_size]

    return model(tokens, doc_ids=doc_ids, caches=caches, head=head)


def next_logits(model: nn.Module, tokens: Tensor, caches: Sequence[NextTokens]) -> Tensor:
    """Logits after one token more of each row. (B, 1) -> (B, V)"""
    return model(tokens, caches=caches)[:, 0]


@lru_cache
def compiled_next_logits() -> Callable[[nn.Module, Tensor, Sequence[NextTokens]], Tensor]:
    """The same as one launch of all its kernels, where the device can do that."""
    return torch.compile(next_logits, mode="reduce-overhead", dynamic=False)


def completion_logprobs(model: nn.Module, request: Request, tokens: Sequence[int]) -> list[TokenLogprob]:
    """How likely the model finds tokens after the prompt of a request."""
    device, vocab_size = next(model.parameters()).device, model.config.vocab_size
    before, k = [*request.prompt, *tokens[:-1]], request.params.logprobs or 0

    def head(lm_head: nn.Linear, hidden: Tensor) -> list[TokenLogprob]:
        return text_logprobs(lm_head, hidden[0, len(request.prompt) - 1 :], tokens, vocab_size, k)

    return model(torch.tensor([before], device=device), head=head)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; the mode is given back."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
