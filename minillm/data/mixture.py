"""Several sources as one stream: which share of the samples is of each."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minillm.data.rows import SourceRows
from minillm.data.store import Prepared

logger = logging.getLogger("minillm")

PLACES = 4096  # a block of so many samples has exactly its share of each source
MOST_PASSES = 4  # text that is read more often teaches ever less (Muennighoff et al. 2023, arXiv:2305.16264)


class Source(NamedTuple):
    """A source of the mixture: its name, its places of every PLACES samples, and its tokens."""

    name: str  # empty where nothing is mixed
    places: int
    prepared: Prepared

    @property
    def share(self) -> float:
        """The part of all samples that is of this source."""
        return self.places / PLACES


def shares(
    sizes: Sequence[int], weights: Sequence[float] | None = None, temperature: float | None = None
) -> list[float]:
    """The part of the stream that each source of so many tokens is to have.

    In proportion to the weights; without them to n ** (1 / temperature): at 1 as the text comes, higher is more even.
    Source: Devlin et al. 2018 (multilingual BERT) and Conneau et al. 2020 (XLM-R), where alpha = 1 / temperature.
    """
    if weights is not None:
        parts = [weight / max(weights) for weight in weights]
    else:
        largest = max(sizes)
        parts = [math.exp((math.log(size) - math.log(largest)) / (temperature or 1.0)) for size in sizes]
    return [part / sum(parts) for part in parts]


def whole_places(wanted: Sequence[float], places: int = PLACES) -> list[int]:
    """Shares as whole places that add up: the largest remainders are rounded up, and each source has at least one."""
    refuse_too_many(len(wanted), places)
    exact = np.array(wanted) * places
    counts = np.maximum(1, np.floor(exact).astype(np.int64))
    while counts.sum() < places:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > places:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts.tolist()


def refuse_too_many(n_sources: int, places: int = PLACES) -> None:
    """Raises ValueError where there are not places enough for each source to have one."""
    if n_sources > places:
        raise ValueError(f"data.sources: {n_sources} sources; a mixture has at most {places}")


def held_out(sources: list[Source]) -> list[Source]:
    """The sources of which something is held out."""
    return [source for source in sources if source.prepared.val is not None]


def say_use(sources: Sequence[Source], rows: Sequence[SourceRows], samples: int) -> None:
    """Say how a run of so many samples uses each source, and which ones it repeats too often."""
    for source, its_rows in zip(sources, rows):
        passes = samples * source.share / its_rows.per_epoch
        logger.info(
            "source %s: %.3g%% of the samples, %s tokens to train on, read %.3g times",
            *(source.name, 100 * source.share, f"{source.prepared.train.n_tokens:,}", passes),
        )
        if round(passes) > MOST_PASSES:
            logger.warning(
                "source %s is read %.1f times: text repeated more than %d times teaches little more (Muennighoff et "
                "al. 2023); give it a smaller share, or train for fewer steps",
                *(source.name, passes, MOST_PASSES),
            )
