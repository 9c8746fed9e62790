"""MinHash: a document as a few numbers, of which two documents share as large a part as they share of their n-grams.

The n-grams (shingles) of a document are a set; the Jaccard similarity of two sets is the size of their intersection
over that of their union. Take a random order of all possible shingles: the first shingle of two sets in it is the same
with exactly that probability. A signature holds the first in each of `n_perm` orders, so that the share of equal places
estimates the similarity s, with standard deviation sqrt(s (1 - s) / n_perm).

To find similar documents without comparing all pairs, a signature is cut into `bands` of `rows` numbers. Two documents
have some band in common with probability 1 - (1 - s**rows)**bands, a step that is steep near a threshold of our choice.

Sources: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4.
"""

from collections.abc import Sequence

import numpy as np

from minillm.data.clean.words import BASE, Ragged, batches, ngram_hashes, powers, word_hashes
from minillm.data.order import make_key, mix64

N_PERM = 128
NGRAM = 5
EMPTY = 2**32 - 1  # every place of the signature of a text without words


def shingles(texts: Sequence[str], n: int = NGRAM) -> Ragged:
    """The hashes of all n-grams of words of each text, with repetitions; one of all its words where it has fewer."""
    return ngram_hashes(word_hashes(texts), n)


def signatures(texts: Sequence[str], n_perm: int = N_PERM, n: int = NGRAM, seed: int = 0) -> np.ndarray:
    """MinHash signatures of texts: (texts, n_perm) uint32, the same on every machine.

    Texts with the same set of n-grams have the same signature; that of a text without words is EMPTY in every place.
    """
    parts = [sketch(shingles(texts[start:stop], n), n_perm, seed) for start, stop in batches(texts)]
    return np.concatenate([np.empty((0, n_perm), np.uint32), *parts])


def sketch(shingles: Ragged, n_perm: int, seed: int) -> np.ndarray:
    """The least of each document's shingles in each order: (documents, n_perm) uint32."""
    hashes = (shingles.values >> np.uint64(32)).astype(np.uint32)
    filled = np.flatnonzero(np.diff(shingles.offsets))
    starts = shingles.offsets[filled]
    least = np.empty((n_perm, len(filled)), np.uint32)
    ordered = np.empty_like(hashes)  # of a batch, small enough for the cache
    for factor, offset, row in zip(*permutations(n_perm, seed), least):
        np.multiply(hashes, factor, out=ordered)
        np.add(ordered, offset, out=ordered)
        np.minimum.reduceat(ordered, starts, out=row)
    out = np.full((len(shingles.offsets) - 1, n_perm), EMPTY, np.uint32)
    out[filled] = least.T
    return out


def permutations(n_perm: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and offsets, (n_perm,) uint32: x -> factor * x + offset modulo 2**32, a bijection as the factor is odd.

    Shingle hashes are mixed before, so that their order under it is as good as random.
    """
    key = np.uint64(make_key(seed))
    bits = mix64(key + np.arange(1, n_perm + 1, dtype=np.uint64))
    return (bits >> np.uint64(32)).astype(np.uint32) | np.uint32(1), bits.astype(np.uint32)


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """A hash of each band of signatures: (documents, n_perm) -> (documents, bands) uint64.

    Band b is columns b * rows to (b + 1) * rows. A text without words has keys like any other: see near_duplicates.
    """
    check_bands(bands, rows, signatures.shape[1])
    values = signatures[:, : bands * rows].reshape(-1, bands, rows)
    return mix64((values * powers(BASE, rows)).sum(axis=2))


def check_bands(bands: int, rows: int, n_perm: int) -> None:
    if bands < 1 or rows < 1 or bands * rows > n_perm:
        raise ValueError(f"{bands} bands of {rows} rows need {bands * rows} permutations; there are {n_perm}")


def candidate_probability(similarity: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """The probability that two documents of a Jaccard similarity have a band in common."""
    return 1 - (1 - np.asarray(similarity, float) ** rows) ** bands


def choose_bands(threshold: float, n_perm: int = N_PERM, false_negative_weight: float = 0.9) -> tuple[int, int]:
    """(bands, rows), of at most n_perm in all, with the least weighted area of error around a threshold of similarity.

    False positives are the area under the candidate probability below the threshold, false negatives that over it
    above. They weigh more by default: a candidate too many is compared and found different, one too few is lost.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; it must lie between 0 and 1, such as 0.8")
    if not 0 <= false_negative_weight <= 1:
        raise ValueError(f"false_negative_weight is {false_negative_weight}; it must lie from 0 to 1")
    similarity = (np.arange(1000) + 0.5) / 1000
    below = similarity < threshold
    best, least = (1, 1), np.inf
    for rows in range(1, n_perm + 1):
        for bands in range(1, n_perm // rows + 1):
            found = candidate_probability(similarity, bands, rows)
            error = (1 - false_negative_weight) * found[below].sum() + false_negative_weight * (1 - found[~below]).sum()
            if error < least:
                best, least = (bands, rows), error
    return best
