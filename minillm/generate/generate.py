"""The short way to text from a model: prompts in, completions out, by an engine of their own."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from minillm.generate.engine import Engine, Event, default_rows
from minillm.generate.params import SamplingParams
from minillm.generate.request import Completion, Prompt, Request, is_token, make_request
from minillm.tokenizer import Tokenizer


def generate(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_rows: int | None = None,
    compile: bool = False,
) -> Completion | list[Completion] | list[list[Completion]]:
    """Continue a prompt, or each of a list: a Completion for one, a list of them for a list.

    A text is encoded with bos in front, the way training documents begin; an empty one starts from bos alone. The
    model stops at eos. `params` are those of all prompts, or a list with those of each; where they ask for n > 1, a
    list of n takes the place of a Completion. A completion depends on its prompt and its params, not on the rest of the
    list. `max_rows` and `compile` are those of `Engine`.
    Raises ValueError before any work when a prompt, or what is asked of it, does not fit the model's context.
    """
    if not hasattr(prompts, "__getitem__") or isinstance(prompts, Mapping):
        raise ValueError(f"prompts: a text, a list of tokens, or a list of these is expected, not {prompts!r}")
    one = isinstance(prompts, str) or (len(prompts) > 0 and is_token(prompts[0]))
    prompts = [prompts] if one else prompts
    if not isinstance(params, list | tuple):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"params: {len(params)} of them for {len(prompts)} prompts; give one for all, or one a prompt")
    requests = [make_request(model.config, tokenizer, *pair) for pair in zip(prompts, params)]
    for _ in run(model, tokenizer, requests, max_rows, compile):
        pass
    done = [r.completions if r.params.n > 1 else r.completions[0] for r in requests]
    return done[0] if one else done


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    compile: bool = False,
) -> Iterator[str]:
    """The text that `generate` would return for a prompt, in pieces as they come, never a part of a character."""
    request = make_request(model.config, tokenizer, prompt, params)  # here, so that it raises before iteration
    if request.params.use_beam_search or request.n_samples > 1:
        raise ValueError("stream: gives one completion as it comes; n, best_of and beam search are for generate")
    return (event.text for event in run(model, tokenizer, [request], None, compile) if event.text)


def run(
    model: nn.Module, tokenizer: Tokenizer | None, requests: Sequence[Request], max_rows: int | None, compile: bool
) -> Iterator[Event]:
    """An engine as large as the requests need; what its steps add."""
    if not requests:
        return
    capacity = max(request.length for request in requests)
    rows = sum(max(request.n_samples, request.params.num_beams) for request in requests)
    widest = max(request.params.num_beams for request in requests)
    if max_rows is None:
        max_rows = max(widest, min(rows, default_rows(model, capacity)))
    engine = Engine(model, tokenizer, max_rows=max_rows, capacity=capacity, compile=compile)
    for request in requests:
        engine.queue(request)
    while engine.busy:
        yield from engine.step()
