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

from minillm.data.clean.words import Ragged, batches, ngram_hashes, span_hashes, word_hashes
from minillm.data.order import make_key, mix64

N_PERM = 128
NGRAM = 5
BLOCK = 2**13  # shingles that go through all orders before the next: 32 KiB, which the first cache holds
EMPTY = 2**32 - 1  # every place of the signature of a text without words


def shingles(texts: Sequence[str], n: int = NGRAM) -> Ragged:
    """The hashes of all n-grams of words of each text, with repetitions; one of all its words where it has fewer."""
    return ngram_hashes(word_hashes(texts), n)


def signatures(texts: Sequence[str], n_perm: int = N_PERM, n: int = NGRAM, seed: int = 0) -> np.ndarray:
    """MinHash signatures of texts: (texts, n_perm) uint32, the same on every machine.

    Texts with the same set of n-grams have the same signature. Two without any word do too: see `EMPTY`.
    """
    out = np.empty((len(texts), n_perm), np.uint32)
    for start, stop in batches(texts):
        sketch(shingles(texts[start:stop], n), seed, out[start:stop])
    return out


def sketch(shingles: Ragged, seed: int, out: np.ndarray) -> None:
    """Fill out, (documents, n_perm) uint32, with the least of each document's shingles in each order."""
    n_perm = out.shape[1]
    factors, offsets = permutations(n_perm, seed)
    hashes = (shingles.values >> np.uint64(32)).astype(np.uint32)
    for i in range(len(out)):
        own = hashes[shingles.offsets[i] : shingles.offsets[i + 1]]
        out[i] = (own * factors[:, None] + offsets[:, None]).min(axis=1, initial=EMPTY)


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
    n, n_perm = signatures.shape
    check_bands(bands, rows, n_perm)
    values = np.ascontiguousarray(signatures[:, : bands * rows]).reshape(-1)
    starts = np.arange(0, len(values), rows)
    return span_hashes(values, starts, starts + rows).reshape(n, bands)


def check_bands(bands: int, rows: int, n_perm: int) -> None:
    if bands < 1 or rows < 1 or bands * rows > n_perm:
        raise ValueError(f"{bands} bands of {rows} rows need {bands * rows} permutations; there are {n_perm}")


def candidate_probability(similarity: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """The probability that two documents of a Jaccard similarity have a band in common."""
    return 1 - (1 - np.asarray(similarity, float) ** rows) ** bands


def choose_bands(threshold: float, n_perm: int = N_PERM, false_negative_weight: float = 0.5) -> tuple[int, int]:
    """(bands, rows), of at most n_perm in all, with the least weighted area of error around a threshold of similarity.

    False positives are the area under the candidate probability below the threshold, false negatives that over it
    above; a larger weight of the latter finds more, and compares more pairs in vain.
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
