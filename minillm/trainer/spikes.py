"""Spikes: a loss or a gradient norm far above what is usual.

Usual is the median of the last steps. How far they scatter is told by the median distance from it, and by the 95th
percentile, because some batches may rightly be harder than most (another language, code); the larger counts. A few
outliers move none of these, and a spike does not enter them. A mean and a standard deviation would be pulled up by the
very spike that they are to judge, and hide the next one. Gradient norms are compared by their logarithms, because they
scatter by factors.

Sources: Chowdhery et al. 2022 (PaLM), section 5.1, go back before a spike and leave out its batches; OLMo-core leaves
out the update where a figure is 6 standard deviations above the mean of the last 128 steps.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from torch import Tensor, stack

from minillm.log import LOGGER

WINDOW = 128  # steps that say what is usual
FEWEST = 32  # steps before anything is judged
MOST = 6  # spikes among them: what comes more often is no spike, but a new level, or a part of the text
# Of a normal distribution, in standard deviations: the median distance from the median, and the 95th percentile.
MEDIAN_DISTANCE, TAIL = 0.6745, 1.645
SHOWN = 4  # parameters, and pieces of text, that a warning names


class Scale(NamedTuple):
    """How a figure is compared: the function of it, and the least scatter that counts, whatever the statistics say."""

    of: Callable[[float], float]
    least: float


# A figure that hardly scatters (a text learned by heart) must not turn every quiver into a spike.
SCALES = {"loss": Scale(float, 0.01), "grad_norm": Scale(lambda x: math.log(max(x, 1e-30)), 0.05)}


class Reading(NamedTuple):
    """A figure far above the usual."""

    name: str
    value: float
    usual: float
    sigmas: float


class SpikeWatch:
    """What has been usual lately, and what is not.

    Args: mode: what becomes of a spike, as in TrainConfig. names: of the parameters. documents: names the text of the
        step whose first sample is given.
    """

    def __init__(
        self,
        mode: Literal["off", "report", "skip"],
        threshold: float,
        names: Sequence[str],
        documents: Callable[[int], list[str]] | None = None,
    ):
        self.mode, self.threshold, self.names, self.documents = mode, threshold, names, documents
        self.history: dict[str, list[float]] = {name: [] for name in SCALES}
        self.recent: list[bool] = []  # of the last steps, whether each was a spike
        self.layers: deque[Tensor] = deque(maxlen=WINDOW)  # gradient norms (P,) of the same steps, for reports only

    def look(self, step: int, cursor: int, figures: dict[str, Any], each_norm: Tensor) -> dict[str, Any] | None:
        """Judge a step; of a spike, warn, and return its row of spikes.jsonl, where `applied` says what to do.

        All ranks come to the same decision, because each judges the same global figures.
        """
        readings = [] if self.mode == "off" else self.judge(figures, each_norm)
        if not readings:
            return None
        row = {
            "step": step,
            "applied": self.mode == "report",
            **{key: figures[key] for key in ("loss", "lr", "grad_norm")},
            "spikes": {one.name: {"usual": one.usual, "sigmas": round(one.sigmas, 1)} for one in readings},
            "layers": self.compared(each_norm),
            "documents": self.documents(cursor) if self.documents else [],
        }
        LOGGER.warning("%s", describe(row))
        return row

    def judge(self, figures: dict[str, Any], each_norm: Tensor) -> list[Reading]:
        """What of a step is a spike; where nothing is, the step joins what is usual."""
        readings = [self.reading(name, figures[name]) for name in SCALES]
        found = [reading for reading in readings if reading.sigmas > self.threshold]
        if sum(self.recent) >= MOST:
            found = []
        self.recent = [*self.recent, bool(found)][-WINDOW:]
        if found:
            if sum(self.recent) == MOST:
                LOGGER.warning("%d spikes within %d steps: more of them are taken for the usual", MOST, WINDOW)
            return found
        for name in SCALES:
            self.history[name] = [*self.history[name], figures[name]][-WINDOW:]
        self.layers.append(each_norm)
        return []

    def reading(self, name: str, value: float) -> Reading:
        """How far a figure is above the usual, in standard deviations of a normal distribution of the same scatter."""
        history, scale = self.history[name], SCALES[name]
        if len(history) < FEWEST:
            return Reading(name, value, math.nan, 0.0)
        scaled = sorted(scale.of(one) for one in history)
        usual, high = median(scaled), scaled[int(0.95 * len(scaled))]
        distance = median(abs(one - usual) for one in scaled)
        scatter = max(distance / MEDIAN_DISTANCE, (high - usual) / TAIL, scale.least)
        return Reading(name, value, median(history), (scale.of(value) - usual) / scatter)

    def compared(self, each_norm: Tensor) -> dict[str, dict[str, float | None]]:
        """Each parameter's gradient norm, and how many times the usual it is, the farthest above it first."""
        usual = stack(list(self.layers)).median(dim=0).values if self.layers else each_norm
        rows = {
            name: {"grad_norm": norm, "times_usual": round(norm / before, 2) if before else None}
            for name, norm, before in zip(self.names, each_norm.tolist(), usual.tolist())
        }
        return dict(sorted(rows.items(), key=lambda row: -(row[1]["times_usual"] or 0.0)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges as the uninterrupted one."""
        return {"history": self.history, "recent": self.recent}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.history, self.recent = state["history"], state["recent"]


def describe(row: dict[str, Any]) -> str:
    """The warning for a row of spikes.jsonl."""
    words = {"loss": "loss", "grad_norm": "gradient norm"}
    said = [
        f"{words[name]} {row[name]:.4g} where {spike['usual']:.4g} is usual ({spike['sigmas']:g} sigmas)"
        for name, spike in row["spikes"].items()
    ]
    above = [f"{name} {layer['times_usual']:g}x" for name, layer in row["layers"].items() if layer["times_usual"]]
    text = list(dict.fromkeys(row["documents"]))
    more = f" and {len(text) - SHOWN} more in spikes.jsonl" if len(text) > SHOWN else ""
    return (
        f"step {row['step']}: {', '.join(said)}, learning rate {row['lr']:.3g}; "
        f"{'the update is applied' if row['applied'] else 'the update is skipped'}. "
        f"Gradients above their usual: {', '.join(above[:SHOWN])}"
        + (f". Text of the batch: {', '.join(text[:SHOWN])}{more}" if text else "")
    )
