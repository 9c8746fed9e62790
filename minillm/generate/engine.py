"""Text from a model: the prompt in one forward, then one token a forward, earlier keys and values kept.

Shapes: B batch, T new tokens, S tokens so far, K kv heads, d head_dim, V vocab.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.generate.filters import choose
from minillm.generate.params import SamplingParams
from minillm.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # text, or tokens that are taken as they are
DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Completion:
    """What a model added to one prompt."""

    text: str
    tokens: list[int]  # with the end-of-text token, where there was one
    finish_reason: Literal["stop", "length"]  # the text ended, or max_new_tokens was reached


class KVCache:
    """Keys and values of one block, in memory taken once for `capacity` tokens (when the first arrive)."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.k = self.v = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of T new tokens, (B, K, T, d) each; returns those of all, (B, K, S, d)."""
        B, K, T, d = k.shape
        if self.length == 0:
            self.k, self.v = k.new_empty(B, K, self.capacity, d), v.new_empty(B, K, self.capacity, d)
        start, self.length = self.length, self.length + T
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def generate(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | None = None,
) -> Completion | list[Completion]:
    """Continue a prompt, or each of a list: a Completion for one, a list of them for a list.

    A text is encoded with bos in front, the way training documents begin; an empty one starts from bos alone. The
    model stops at eos. A completion depends on its prompt and the seed, not on the rest of the list.
    Raises ValueError before any work when a prompt, or what is asked of it, does not fit the model's context.
    """
    params = params or SamplingParams()
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    requests = [prepare(model, tokenizer, prompt, params) for prompt in ([prompts] if one else prompts)]
    completions = []
    for tokens, max_new_tokens in requests:
        new = list(decode(model, tokenizer, tokens, max_new_tokens, params))
        ended = tokenizer is not None and new[-1] == tokenizer.eos_id
        completions.append(Completion("".join(text_pieces(tokenizer, new)), new, "stop" if ended else "length"))
    return completions[0] if one else completions


def stream(
    model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams | None = None
) -> Iterator[str]:
    """The text that `generate` would return, in pieces as they come, never a part of a character."""
    params = params or SamplingParams()
    tokens, max_new_tokens = prepare(model, tokenizer, prompt, params)  # here, so that it raises before iteration
    return text_pieces(tokenizer, decode(model, tokenizer, tokens, max_new_tokens, params))


def prepare(
    model: nn.Module, tokenizer: Tokenizer | None, prompt: Prompt, params: SamplingParams
) -> tuple[list[int], int]:
    """(prompt tokens, how many to add), or ValueError that says why the model cannot do it."""
    config = model.config
    if not config.causal:
        raise ValueError("a bidirectional model (causal = false) cannot generate text")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; not a pair")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; without one give a list of tokens")
        tokens = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    else:
        tokens = list(prompt)
    if not tokens:
        raise ValueError("prompt: is empty; give at least one token to go on from")
    if wrong := [token for token in tokens if not 0 <= token < config.vocab_size]:
        raise ValueError(f"prompt: token {wrong[0]} is outside the vocabulary of {config.vocab_size}")
    room = config.max_seq_len - len(tokens)
    new = params.max_new_tokens or max(1, min(room, DEFAULT_NEW_TOKENS))
    if new > room:
        raise ValueError(
            f"max_new_tokens: {new} after a prompt of {len(tokens)} tokens makes {len(tokens) + new}, more than the "
            f"model's max_seq_len {config.max_seq_len}; "
            + (f"ask for at most {room}" if room > 0 else f"shorten the prompt by at least {1 - room} tokens")
        )
    return tokens, new


def decode(
    model: nn.Module, tokenizer: Tokenizer | None, prompt: list[int], max_new_tokens: int, params: SamplingParams
) -> Iterator[int]:
    """New tokens, one at a time, eos being the last if it comes."""
    generator = torch.Generator()  # on the CPU: the same numbers whatever the device
    generator.seed() if params.seed is None else generator.manual_seed(params.seed)
    caches = [KVCache(len(prompt) + max_new_tokens) for _ in model.blocks]
    device = next(model.parameters()).device
    known = tokenizer.vocab_size if tokenizer is not None else None  # a model may have more ids than have a text
    tokens = prompt
    for _ in range(max_new_tokens):
        logits = next_logits(model, torch.tensor([tokens], device=device), caches)[:, :known]  # (1, V)
        token = int(choose(logits, params, torch.rand(1, generator=generator)))
        yield token
        if tokenizer is not None and token == tokenizer.eos_id:
            return
        tokens = [token]


@torch.inference_mode()
def next_logits(model: nn.Module, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
    """Logits after the last of the new tokens, which join the caches. (B, T) -> (B, V)"""

    def last(lm_head: nn.Linear, hidden: Tensor) -> Tensor:  # the prompt's other positions need no logits
        return lm_head(hidden[:, -1])[:, : model.config.vocab_size]

    was_training = model.training
    if was_training:
        model.eval()  # without dropout
    try:
        return model(tokens, caches=caches, head=last)
    finally:
        if was_training:
            model.train()


def text_pieces(tokenizer: Tokenizer | None, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as far as it is certain: a character comes when its last byte has."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        piece = decoder.decode(tokenizer.token_bytes(token)) if tokenizer is not None else ""
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
