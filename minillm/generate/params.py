"""SamplingParams: everything that decides how a completion is made, checked before any work."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from minillm.config import Field, describe, fields_of, within

GREATEST_BIAS = 100  # OpenAI's API reference, `logit_bias`: -100 to 100
GREATEST_SEED = 2**63 - 1  # torch.Generator.manual_seed
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "best_of")
BEAM_SEARCH_ONLY = ("num_beams", "length_penalty", "early_stopping")


@dataclass(frozen=True)
class SamplingParams:
    """How new tokens are chosen, when they end, and what is told about them.

    Lists and mappings may be given; they are kept as tuples, so that equal params have one hash.
    """

    max_new_tokens: Annotated[
        int | None, "tokens to generate (none: as many as the context holds, at most 256)", ">= 1"
    ] = None
    min_new_tokens: Annotated[int, "tokens before which nothing but its length ends a completion", ">= 0"] = 0
    temperature: Annotated[float, "below 1 sharper, above 1 flatter, 0 always the most likely token", ">= 0"] = 1.0
    top_k: Annotated[int, "choose among the k most likely tokens (-1: among all)", ">= -1"] = -1
    top_p: Annotated[float, "choose among the fewest tokens that have this probability together", "> 0, <= 1"] = 1.0
    min_p: Annotated[float, "choose among tokens at least this share as likely as the likeliest", ">= 0, <= 1"] = 0.0
    repetition_penalty: Annotated[
        float, "above 1: tokens of the prompt and the completion become less likely", ">= 0.01, <= 100"
    ] = 1.0
    presence_penalty: Annotated[
        float, "taken off the logit of each token that the completion has already", ">= -2, <= 2"
    ] = 0.0
    frequency_penalty: Annotated[
        float, "taken off the logit of a token for each time that the completion has it", ">= -2, <= 2"
    ] = 0.0
    logit_bias: Annotated[
        dict[int, float | Literal["-inf"]],
        "added to the logits of tokens, as ID:BIAS,...; -100 all but forbids, -inf forbids",
    ] = ()
    seed: Annotated[int | None, "the same seed gives the same text (none: another one each time)", ">= 0"] = None
    n: Annotated[int, "completions of each prompt", ">= 1"] = 1
    best_of: Annotated[int | None, "completions made, of which the n most likely are kept (none: n)", ">= 1"] = None
    stop: Annotated[
        str | tuple[str, ...], 'text that ends a completion and is not part of it; several: ["one", "two"]'
    ] = ()
    stop_token_ids: Annotated[tuple[int, ...], "tokens that end a completion, as the end of text does"] = ()
    ignore_eos: Annotated[bool, "go on after the end of text"] = False
    skip_special_tokens: Annotated[bool, "leave special tokens out of the text"] = True
    logprobs: Annotated[int | None, "tell the k likeliest tokens at each new token (none: do not)", ">= 0"] = None
    prompt_logprobs: Annotated[int | None, "the same at each token of the prompt (none: do not)", ">= 0"] = None
    use_beam_search: Annotated[bool, "search for the likeliest completion instead of sampling"] = False
    num_beams: Annotated[int, "beginnings that beam search keeps at once", ">= 1"] = 1
    length_penalty: Annotated[
        float, "beam search: above 0 favours longer completions, below 0 shorter", ">= -10, <= 10"
    ] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"],
        "beam search ends: true at num_beams finished, false when better is unlikely, never when impossible",
    ] = False

    def __post_init__(self):
        for name, freeze in FROZEN.items():
            object.__setattr__(self, name, freeze(getattr(self, name)))
        wrong = {
            field.name: problem for field in FIELDS if (problem := field_problem(field, getattr(self, field.name)))
        }
        # what is wrong has its default here, so that the combinations of the rest are checked in the same report
        rest = {f.name: f.default if f.name in wrong else getattr(self, f.name) for f in FIELDS}
        problems = [*wrong.values(), *impossible_combinations(SimpleNamespace(**rest))]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def needs_counts(self) -> bool:
        """Whether the next token depends on which tokens there have been."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def stop_ids(self, eos_id: int | None) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return self.stop_token_ids if self.ignore_eos or eos_id is None else (eos_id, *self.stop_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for tokens that a model does not have, or where none is left to choose."""
        ids = {"stop_token_ids": self.stop_token_ids, "logit_bias": [token for token, _ in self.logit_bias]}
        problems = [
            f"{name}: token {token} is outside the vocabulary of {vocab_size}"
            for name, tokens in ids.items()
            for token in tokens
            if token >= vocab_size
        ]
        if sum(bias == -math.inf for _, bias in self.logit_bias) >= vocab_size:
            problems.append(f"logit_bias: forbids all {vocab_size} tokens; leave at least one")
        if problems:
            raise ValueError("\n".join(problems))


# --- one field --------------------------------------------------------------------------------------------------------


def freeze_texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else freeze_list(value)


def freeze_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def freeze_biases(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return freeze_list(value)
    return tuple(sorted(((token, -math.inf if bias == "-inf" else bias) for token, bias in value.items()), key=repr))


FROZEN: dict[str, Callable[[Any], Any]] = {
    "stop": freeze_texts,
    "stop_token_ids": freeze_list,
    "logit_bias": freeze_biases,
}


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_token(value: object) -> bool:
    return is_whole(value) and value >= 0


def is_bias(value: object) -> bool:
    return value == -math.inf or (is_number(value) and abs(value) <= GREATEST_BIAS)


def is_token_with_bias(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and is_token(value[0]) and is_bias(value[1])


KINDS = {
    int: is_whole,
    float: is_number,
    bool: lambda value: isinstance(value, bool),
    type(None): lambda value: value is None,
}
COLLECTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stop": (lambda text: isinstance(text, str) and text != "", "texts that are not empty"),
    "stop_token_ids": (is_token, "whole numbers >= 0"),
    "logit_bias": (
        is_token_with_bias,
        f"tokens (whole numbers >= 0) with numbers from -{GREATEST_BIAS} to {GREATEST_BIAS}, or -inf",
    ),
}


def is_a(value: Any, type_: Any) -> bool:
    """Whether a value has a type, where nothing is converted: no text is a number, and no 1.0 a whole number."""
    if isinstance(type_, UnionType) or get_origin(type_) not in (None, Literal):
        return any(is_a(value, member) for member in get_args(type_))
    return value in get_args(type_) if get_origin(type_) is Literal else KINDS[type_](value)


def field_problem(field: Field, value: Any) -> str | None:
    """What is wrong with the value of a field, in words."""
    if field.name in COLLECTIONS:
        fits, expected = COLLECTIONS[field.name]
        right = isinstance(value, tuple) and all(map(fits, value))
    else:
        right = is_a(value, field.type) and (value is None or within(value, field.range))
        expected = ", ".join(filter(None, [describe(field.type), field.range]))
    return None if right else f"{field.name}: must be {expected}, not {value!r}"


# --- fields together --------------------------------------------------------------------------------------------------


def impossible_combinations(params: SimpleNamespace) -> Iterator[str]:
    """Each combination of fields that cannot be, or would have no effect, in words."""
    if params.top_k == 0:
        yield "top_k: must be a whole number of at least 1, or -1 to choose among all, not 0"
    if params.seed is not None and params.seed > GREATEST_SEED:
        yield f"seed: must be at most 2^63 - 1, not {params.seed}"
    if params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens:
        yield f"min_new_tokens: {params.min_new_tokens} is more than max_new_tokens {params.max_new_tokens}"
    if params.best_of is not None and params.best_of < params.n:
        yield f"best_of: {params.best_of} completions are made, and n asks for {params.n} of them"
    if params.use_beam_search:
        yield from impossible_with_beams(params)
        return
    if params.temperature == 0 and (params.best_of or 1) > 1:
        yield "best_of: with temperature 0 all completions are the same; leave it out, or raise temperature"
    if params.temperature == 0 and params.n > 1:
        yield "n: with temperature 0 all completions are the same; ask for 1, or raise temperature"
    for name in BEAM_SEARCH_ONLY:
        if changed(params, name):
            yield f"{name}: belongs to beam search; leave it out, or set use_beam_search"


def impossible_with_beams(params: SimpleNamespace) -> Iterator[str]:
    if params.num_beams < 2:
        yield "num_beams: beam search needs at least 2"
    elif params.n > params.num_beams:
        yield f"n: {params.n} completions are more than num_beams {params.num_beams}"
    if params.stop:
        yield "stop: beam search ends at tokens, not at text; use stop_token_ids"
    for name in SAMPLING_ONLY:
        if changed(params, name):
            yield f"{name}: belongs to sampling; leave it out, or leave out use_beam_search"


def changed(params: SimpleNamespace, name: str) -> bool:
    return getattr(params, name) != getattr(SamplingParams, name)


FIELDS = tuple(fields_of(SamplingParams))
