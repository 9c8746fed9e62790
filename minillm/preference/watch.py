"""A known failure of learning from preferences, said in words when it happens.

The losses ask for a distance between two answers, and nothing of where they are: both may become less likely, as long
as the rejected one does so faster. What gains is text that is in neither.
Source: Pal et al. 2024 (arXiv:2402.13228); Rafailov et al. 2024 (arXiv:2404.12358), section 4.
"""

import math
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

from minillm.log import LOGGER, read_metrics

ROWS = 10  # of metrics, over which means are taken
FALLEN = math.log(1.1)  # nats a token: chosen answers less likely by a tenth a token


class FallingChosen:
    """A tracker that warns, once, when chosen answers have become less likely while the margin has grown.

    They are compared with the reference, which gave them the likelihood that they began with; without one, with the
    first rows. `metrics`: where the rows of the run are kept, so that one that goes on is judged as a whole.
    """

    name = "the watch on chosen answers"

    def __init__(
        self, metrics: Path | None = None, advice: str = "raise sft_weight or beta, or lower the learning rate"
    ):
        self.metrics, self.advice = metrics, advice
        self.said = False
        self.began: tuple[float, float] | None = None
        self.recent: deque[tuple[float, float]] = deque(maxlen=ROWS)

    def begin(self, step: int) -> None:
        """Take up the rows that the run has written before, of which nothing is said again."""
        for row in read_metrics(self.metrics) if self.metrics else ():
            self.look(row)

    def write(self, row: dict[str, Any]) -> None:
        """Look at a row, and warn where it is the one that shows it."""
        if moved_and_margin := self.look(row):
            moved, margin = moved_and_margin
            LOGGER.warning(
                "step %d: the margin grows (%.3f), and yet the chosen answers become less likely: each of their tokens "
                "has %.2f of the probability that it had in the beginning. What the model would rather say is in "
                "neither answer; %s",
                *(row["step"], margin, math.exp(moved), self.advice),
            )

    def look(self, row: dict[str, Any]) -> tuple[float, float] | None:
        """Of the first row that shows it: how far log p of a chosen token has moved by then, and the margin.

        What moves is log p less what the reference gives it.
        """
        figures = [row.get(name) for name in ("logprobs_chosen", "length_chosen", "rewards_chosen", "rewards_rejected")]
        if self.said or None in figures:
            return None
        logprob, length, chosen, rejected = figures
        reference = row.get("reference_logprobs_chosen")
        self.recent.append(((logprob - (reference or 0.0)) / length, chosen - rejected))
        if len(self.recent) < ROWS:
            return None
        now = tuple(map(fmean, zip(*self.recent)))
        if self.began is None:
            self.began = now if reference is None else (0.0, 0.0)
        moved, grown = now[0] - self.began[0], now[1] - self.began[1]
        self.said = moved < -FALLEN and grown > 0
        return (moved, now[1]) if self.said else None

    def close(self) -> None:
        """Nothing is held."""
