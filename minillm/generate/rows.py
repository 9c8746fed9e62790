"""Who has rows of the batch: a sample of a prompt has one, a beam search one for each beam.

Shapes: n rows, V vocab.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.generate.beam import BeamSearch
from minillm.generate.filters import TokenCounts, adjust_logits, choose
from minillm.generate.logprobs import TokenLogprob, log_probs
from minillm.generate.params import SamplingParams
from minillm.generate.pieces import TextPieces
from minillm.generate.request import Completion, Request
from minillm.tokenizer import Tokenizer

SEED_STRIDE = 0x9E3779B97F4A7C15  # odd and far from 1: other samples of a seed are those of no seed that people choose


class Sample:
    """One completion of a request in the making."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None):
        self.request, self.index = request, index
        self.n_rows, self.slots = 1, []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.pieces = TextPieces(tokenizer, request.params)
        self.counts: TokenCounts | None = None
        self.how = selection(request.params)
        self.generator = torch.Generator()  # on the CPU: the same numbers whatever the device
        if request.params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((request.params.seed + index * SEED_STRIDE) % 2**63)

    def add(self, token: TokenLogprob) -> str:
        """The next token; returns what of the text has become certain."""
        self.tokens.append(token.token)
        self.logprobs.append(token)
        if self.counts is not None:
            self.counts.add(torch.tensor([0]), torch.tensor([token.token]))
        ended = token.token in self.request.stop_ids
        text = "" if ended else self.pieces.add(token.token)
        if ended or self.pieces.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.pieces.end()
        self.text += text
        return text

    def completion(self) -> Completion:
        return Completion(self.text, self.tokens, self.finish_reason, self.logprobs, self.request.prompt_logprobs)


def selection(params: SamplingParams) -> SamplingParams:
    """What of the params decides how a token is chosen: samples for which it is equal are chosen for together."""
    told = {"max_new_tokens": None, "seed": None, "n": 1, "best_of": None, "stop": ()}
    return dataclasses.replace(params, **told, logprobs=None, prompt_logprobs=None)


def choose_tokens(samples: Sequence[Sample], logits: Tensor) -> list[int]:
    """The next token of each sample. logits (n, V)"""
    alike: dict[SamplingParams, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        alike[sample.how].append(row)
    chosen = [0] * len(samples)
    for params, rows in alike.items():
        group = [samples[row] for row in rows]
        own = logits if len(rows) == len(samples) else logits[rows]
        for row, token in zip(rows, choose_alike(group, own, params)):
            chosen[row] = token
    return chosen


def choose_alike(samples: Sequence[Sample], logits: Tensor, params: SamplingParams) -> list[int]:
    """The next token of samples that share how it is chosen."""
    uniform = torch.zeros(len(samples))
    if params.temperature > 0:
        uniform = torch.cat([torch.rand(1, generator=sample.generator) for sample in samples])
    counts = None
    if params.needs_counts:
        for sample in samples:
            if sample.counts is None:
                sample.counts = TokenCounts.empty(1, logits.shape[-1], logits.device)
                sample.counts.begin(0, sample.request.prompt)
        counts = TokenCounts(*(torch.cat(tables) for tables in zip(*(sample.counts for sample in samples))))
    lengths = torch.tensor([len(sample.tokens) for sample in samples], device=logits.device)
    return choose(logits, params, uniform.to(logits.device), counts, lengths, samples[0].request.stop_ids).tolist()


class Search:
    """The completions of a request in the making, by beam search: a row a beam."""

    def __init__(self, request: Request):
        self.request = request
        self.slots: list[int] = []
        self.n_rows = request.params.num_beams
        self.beams = BeamSearch(request.params, request.stop_ids, request.max_new_tokens)
        self.counts: TokenCounts | None = None
        self.n_tokens = 0

    def advance(self, logits: Tensor, known: int) -> tuple[list[int], list[int]]:
        """Which beams the next ones continue, and with which tokens; none when the search is over.

        logits (n, V) after each row, of which the first `known` can be chosen.
        """
        params, device = self.request.params, logits.device
        scores = log_probs(logits[: len(self.beams.rows)])[:, :known]  # there may be fewer beams than rows
        if params.needs_counts and self.counts is None:
            self.counts = TokenCounts.empty(1, known, device)
            self.counts.begin(0, self.request.prompt)
        lengths = torch.full((len(scores),), self.n_tokens, device=device)
        scores = adjust_logits(scores, params, self.counts, lengths, self.request.stop_ids)
        parents, tokens = self.beams.advance(scores)
        self.n_tokens += 1
        if self.counts is not None and tokens:
            self.counts = self.counts.take(parents)
            self.counts.add(torch.arange(len(tokens), device=device), torch.tensor(tokens, device=device))
        return parents, tokens

    def completions(
        self, tokenizer: Tokenizer | None, score: Callable[[Request, Sequence[int]], list[TokenLogprob]]
    ) -> list[Completion]:
        """The best n, the best first; `score` tells how likely the model finds tokens."""
        return [
            Completion(
                text_of(tokenizer, tokens[:-1] if finished else tokens, self.request.params),
                tokens,
                "stop" if finished else "length",
                score(self.request, tokens),
                self.request.prompt_logprobs,
            )
            for _, tokens, finished in self.beams.hypotheses()
        ]


def text_of(tokenizer: Tokenizer | None, tokens: Sequence[int], params: SamplingParams) -> str:
    pieces = TextPieces(tokenizer, params)
    return "".join([*(pieces.add(token) for token in tokens), pieces.end()])
