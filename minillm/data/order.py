"""The order of samples: a function of (seed, k), never a state.

A run reads its rows epoch after epoch, each epoch in another order. A stored shuffle would need memory for every row
and a place in the checkpoint; a keyed permutation needs neither. It is a Feistel network: write k as a pair
(left, right) of digits in the mixed radix (a, b), and in turn add to one digit a keyed hash of the other. Each such
round can be undone (subtract the same hash), so the whole is a bijection of [0, a * b) whatever the hash. With
a * b barely above n, the few results that fall outside [0, n) are sent through again until they fall inside, which
again is a bijection ("cycle walking").

In a mixture the stream is cut into blocks in which each source has a fixed number of places. Permuting a block says
which source a sample is of; counting that source's places up to there says which of its samples, and from then on the
source is read as if it were alone.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5 (generalised Feistel) and 3.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ROUNDS = 12  # even. 4 do for large n (Luby and Rackoff 1988); with 8, some orders of 6 rows are seen too rarely
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, the step of SplitMix64
MASK = 2**64 - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit integer hash, each output bit depending on each input bit: the finaliser of SplitMix64.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (variant 13 of Stafford).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_key(*numbers: int) -> int:
    """One 64-bit key from any integers, in order: the same on every machine and version."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix64((state ^ np.uint64(number & MASK)) + GOLDEN)
    return int(state[0])


def permute(k: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(n) sends each k: int64, of the shape of k; memory does not depend on n."""
    k = np.asarray(k)
    assert n >= 1, n
    assert k.size == 0 or (k.min() >= 0 and k.max() < n), (k.min(), k.max(), n)
    a = math.isqrt(n - 1) + 1  # the smallest a with a * a >= n
    b = -(-n // a)
    round_keys = mix64(np.uint64(key & MASK) + GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))
    x = shuffle_digits(k.reshape(-1).astype(np.uint64), np.uint64(a), np.uint64(b), round_keys)
    outside = x >= n
    while outside.any():
        x[outside] = shuffle_digits(x[outside], np.uint64(a), np.uint64(b), round_keys)
        outside = x >= n
    return x.astype(np.int64).reshape(k.shape)


def shuffle_digits(x: np.ndarray, a: np.uint64, b: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """The Feistel network: a bijection of [0, a * b)."""
    left, right = x // b, x % b
    for even, odd in zip(round_keys[0::2], round_keys[1::2]):
        left = (left + mix64(right + even) % a) % a
        right = (right + mix64(left + odd) % b) % b
    return left * b + right


def sources_and_numbers(k: np.ndarray, places: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples k of a mixture: (which source each is of, which of that source's samples it is), int64.

    Of each block of sum(places) samples exactly places[s] are of source s. A single source keeps its own order.
    """
    if len(places) == 1:
        return np.zeros_like(k), k
    sizes = np.array(places, dtype=np.int64)
    ends = np.cumsum(sizes)
    blocks, at = k // ends[-1], k % ends[-1]
    sources, numbers = np.empty_like(k), np.empty_like(k)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        of, number = block_of_sources(tuple(places), make_key(make_key(seed, 0, 2), block))
        sources[here] = of[at[here]]
        numbers[here] = block * sizes[sources[here]] + number[at[here]]
    return sources, numbers


@lru_cache(4)
def block_of_sources(places: tuple[int, ...], key: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a block: its source, and how many places of that source are before it.

    So a source is read in its own order, each row once before any comes again, in a run shorter than a block too.
    """
    ends = np.cumsum(places)
    sources = np.searchsorted(ends, permute(np.arange(ends[-1]), int(ends[-1]), key), side="right")
    in_order = np.argsort(sources, kind="stable")
    numbers = np.empty_like(sources)
    numbers[in_order] = np.arange(len(sources)) - np.repeat(ends - places, places)
    return sources, numbers


def source_seed(seed: int, source: int) -> int:
    """The seed of a source's own order: two sources of equally many rows are not read in step."""
    return make_key(seed, source, 2) if source else seed


def epochs_and_rows(k: np.ndarray, rows_per_epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples k of a source: (epoch, row within the epoch) of each, int64."""
    epochs, places = k // rows_per_epoch, k % rows_per_epoch
    rows = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = permute(places[here], rows_per_epoch, make_key(seed, epoch))
    return epochs, rows


def epoch_offset(epoch: int, n_tokens: int, seed: int) -> int:
    """Where in the corpus the first row of an epoch begins."""
    return make_key(seed, epoch, 1) % n_tokens  # the 1 tells this key from that of the order of the rows
