"""Beam search: of all completions, the likeliest that a search over a few beginnings at a time finds.

    rows (beginnings that go on) -- log-probs --> candidates: each row with each token, best first
        those that end (a stop token, or the length) --> hypotheses, scored by  log-prob / length ** length_penalty
        the best num_beams of the others             --> rows of the next step

It knows no model: whoever drives it computes log-probabilities, and keeps keys and values of the rows in their order.

Shapes: n rows, V vocab.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.generate.params import SamplingParams


class Beam(NamedTuple):
    """A beginning that may go on."""

    log_prob: float  # of all its tokens
    tokens: list[int]


class Hypothesis(NamedTuple):
    """A completion that has ended."""

    score: float
    tokens: list[int]
    finished: bool  # by a stop token, which is its last; otherwise by its length


class BeamSearch:
    """The search for one prompt.

    Each step gives log-probabilities after every row to `advance`, which says the rows of the next: at first there is
    one, the prompt. `early_stopping` decides when it is over once there are num_beams hypotheses: True: at once; False:
    when the best row, ended now, would be no better than the worst of them; "never": when it could not become better
    either, at the length where its score would be best.

    Source: the behaviour of transformers 5, `generate(num_beams=...)`, with which its tests compare it.
    """

    def __init__(self, params: SamplingParams, stop_ids: Sequence[int], max_new_tokens: int):
        self.params, self.max_new_tokens = params, max_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self.rows = [Beam(0.0, [])]
        self.ended: list[Hypothesis] = []  # the best num_beams, best first

    def advance(self, log_probs: Tensor) -> tuple[list[int], list[int]]:
        """One more token. log_probs (n, V) of the n rows.

        Returns: for each row that goes on, which one it continues, and with which token; empty when the search is over.
        """
        num_beams = self.params.num_beams
        length = len(self.rows[0].tokens) + 1
        going_on: list[tuple[int, Beam]] = []
        for rank, (row, beam) in enumerate(self.candidates(log_probs)):
            finished = beam.tokens[-1] in self.stop_ids
            if not finished and length < self.max_new_tokens:
                going_on.append((row, beam))
            elif rank < num_beams:  # one that others outdo is not worth ending with
                self.ended.append(Hypothesis(self.score(beam.log_prob, length), beam.tokens, finished))
        self.ended = sorted(self.ended, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        going_on = going_on[:num_beams]
        if going_on and self.is_over(going_on[0][1].log_prob, length):
            going_on = []
        self.rows = [beam for _, beam in going_on]
        return [row for row, _ in going_on], [beam.tokens[-1] for beam in self.rows]

    def candidates(self, log_probs: Tensor) -> list[tuple[int, Beam]]:
        """The likeliest continuations with the row of each, best first: so many that num_beams of them do not end."""
        before = torch.tensor([beam.log_prob for beam in self.rows], dtype=log_probs.dtype, device=log_probs.device)
        sums = (log_probs + before[:, None]).flatten()  # (n * V,)
        best = sums.topk(min(max(2, 1 + len(self.stop_ids)) * self.params.num_beams, sums.numel()))
        rows, tokens = best.indices // log_probs.shape[1], best.indices % log_probs.shape[1]
        return [
            (row, Beam(log_prob, [*self.rows[row].tokens, token]))
            for row, token, log_prob in zip(rows.tolist(), tokens.tolist(), best.values.tolist())
            if log_prob > -torch.inf  # tokens that were excluded
        ]

    def is_over(self, best_log_prob: float, length: int) -> bool:
        """Whether no row is worth going on with."""
        if len(self.ended) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.max_new_tokens  # the longer, the smaller the loss of a log-probability
        return self.score(best_log_prob, length) <= self.ended[-1].score

    def score(self, log_prob: float, length: int) -> float:
        return log_prob / length**self.params.length_penalty

    def hypotheses(self) -> list[Hypothesis]:
        """The n best completions, best first, when the search is over."""
        return self.ended[: self.params.n]
