"""What is asked of an engine, checked before any work, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal

from minillm.generate.logprobs import TokenLogprob
from minillm.generate.params import SamplingParams
from minillm.model.config import ModelConfig
from minillm.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # text, or tokens that are taken as they are
DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Completion:
    """What a model added to one prompt."""

    text: str
    tokens: list[int]  # with the token that ended it, where there was one
    finish_reason: Literal["stop", "length"]  # the text ended, or max_new_tokens was reached
    logprobs: list[TokenLogprob]  # of each of the tokens
    prompt_logprobs: list[TokenLogprob | None] | None = None  # where asked for; nothing precedes the first token

    @property
    def cumulative_logprob(self) -> float:
        """That of the whole completion, in nats."""
        return sum(one.logprob for one in self.logprobs)


@dataclass(eq=False)
class Request:
    """A prompt that a model can complete; where it has been, `completions` holds the best n, the likeliest first."""

    prompt: list[int]
    params: SamplingParams
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    completions: list[Completion] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return bool(self.completions)

    @property
    def n_samples(self) -> int:
        """Completions that are sampled, of which the best n are kept."""
        return self.params.best_of or self.params.n

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the longest completion."""
        return len(self.prompt) + self.max_new_tokens


def is_token(value: object) -> bool:
    """Whether it is a whole number, also one of numpy's or torch's."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0  # any tensor has that method


def make_request(
    config: ModelConfig, tokenizer: Tokenizer | None, prompt: Prompt, params: SamplingParams | None = None
) -> Request:
    """Reads a prompt; ValueError says why the model cannot do what is asked.

    A text is encoded with bos in front, the way training documents begin; an empty one starts from bos alone.
    """
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params: a SamplingParams is expected, not {params!r}")
    if not config.causal:
        raise ValueError("a bidirectional model (causal = false) cannot generate text")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; not a pair")
    if tokenizer is None and params.stop:
        raise ValueError("stop: texts that end a completion need a tokenizer; without one there are stop_token_ids")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; without one give a list of tokens")
        tokens = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    else:
        try:
            tokens = [index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"prompt: a text, or a list of tokens, is expected, not {prompt!r}") from None
    if not tokens:
        raise ValueError("prompt: is empty; give at least one token to go on from")
    if wrong := [token for token in tokens if not 0 <= token < config.vocab_size]:
        raise ValueError(f"prompt: token {wrong[0]} is outside the vocabulary of {config.vocab_size}")
    params.check_vocabulary(config.vocab_size if tokenizer is None else tokenizer.vocab_size)
    room = config.max_seq_len - len(tokens)
    new = params.max_new_tokens or max(1, min(room, DEFAULT_NEW_TOKENS))
    if new > room:
        raise ValueError(
            f"max_new_tokens: {new} after a prompt of {len(tokens)} tokens makes {len(tokens) + new}, more than the "
            f"model's max_seq_len {config.max_seq_len}; "
            + (f"ask for at most {room}" if room > 0 else f"shorten the prompt by at least {1 - room} tokens")
        )
    if params.min_new_tokens > new:  # there is no max_new_tokens then
        raise ValueError(
            f"min_new_tokens: {params.min_new_tokens} is more than the {new} that are made "
            "where max_new_tokens is not set"
        )
    return Request(tokens, params, new, params.stop_ids(tokenizer and tokenizer.eos_id))
