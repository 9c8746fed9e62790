"""Texts as sequences of 64-bit word hashes, a batch at a time: what near-duplicates and contamination are found by.

The rule, on which documents' similarity depends: case is ignored (`str.lower`); a word is a run of letters, marks and
digits; what stands between words (space, punctuation, symbols) is ignored; in scripts that put no spaces between words
(Han, kana, Thai, Lao, Khmer, Burmese, Tibetan) each letter is a word. So that every machine sees the same words,
letters are told from symbols by Unicode 3.2, which every Python knows; what came later is a letter, but for emoji.

A span of values v (characters of a word, words of an n-gram) is hashed as the sum of v[i] * BASE**i modulo 2**64, i
from 0 at the start of the span: prefix sums give the hashes of all spans of a batch at once, whatever their lengths.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minillm.data.order import mix64

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64; its bits are those of the golden ratio
INVERSE = pow(BASE, -1, 2**64)
BATCH = 2**17  # characters that are hashed at a time
BETWEEN, LETTER, ALONE = 0, 1, 2  # what a character is: between words, part of a word, a word by itself
ALONE_RANGES = [
    (0x0E01, 0x0EFF),  # Thai, Lao
    (0x0F40, 0x0FBC),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17D3),  # Khmer
    (0x3005, 0x3007),  # Han: the repetition mark, zero
    (0x3041, 0x312F),  # kana, bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width kana
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
]
EMOJI = (0x1F000, 0x1FAFF)


class Ragged(NamedTuple):
    """One row of values a document: those of document i are values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray  # uint64
    offsets: np.ndarray  # (documents + 1,) int64


def batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive texts of some BATCH characters, at least one each."""
    start = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > BATCH:
            yield start, i
            start, size = i, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)


def word_hashes(texts: Sequence[str]) -> Ragged:
    """The hashes of the words of each text, in order; takes about 50 bytes of memory a character of the batch."""
    folded = [text.lower() for text in texts]
    # a line break at either end, so that each word has something between words on both sides
    joined = "\n".join(["", *folded, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = character_kinds()[codes]
    changes = kinds[1:] != kinds[:-1]
    alone = kinds == ALONE
    edges = changes | alone[1:] | alone[:-1]  # whether a word may start or end between a character and the next
    starts = np.flatnonzero(edges & (kinds[1:] != BETWEEN)) + 1
    ends = np.flatnonzero(edges & (kinds[:-1] != BETWEEN)) + 1
    first = np.cumsum([0, *map(len, folded)]) + np.arange(len(texts) + 1) + 1
    return Ragged(span_hashes(codes, starts, ends), np.searchsorted(starts, first).astype(np.int64))


def ngram_hashes(words: Ragged, n: int) -> Ragged:
    """The hashes of the runs of n words of each document, in order and with repetitions.

    A document of fewer words has one, of all its words; one without words has none.
    """
    lengths = np.diff(words.offsets)
    counts = np.where(lengths < n, np.minimum(lengths, 1), lengths - n + 1)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    starts = np.arange(offsets[-1]) + np.repeat(words.offsets[:-1] - offsets[:-1], counts)
    ends = starts + np.repeat(np.minimum(lengths, n), counts)
    return Ragged(span_hashes(words.values, starts, ends), offsets)


def span_hashes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each values[start:end], which depends on the values and their order alone."""
    n = len(values)
    sums = np.zeros(n + 1, np.uint64)
    np.cumsum(values * powers(BASE, n), out=sums[1:])
    return mix64((sums[ends] - sums[starts]) * powers(INVERSE, n + 1)[starts])


def powers(base: int, n: int) -> np.ndarray:
    """base**i modulo 2**64 for i in range(n)."""
    return all_powers(base, max(n - 1, 1).bit_length())[:n]


@functools.lru_cache(maxsize=4)
def all_powers(base: int, log_size: int) -> np.ndarray:
    factors = np.full(2**log_size, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


@functools.cache
def character_kinds() -> np.ndarray:
    """BATCH = 2**17  # characters that are hashed at a time
    BETWEEN, LETTER or ALONE for each of the 0x110000 characters."""
    kinds = np.full(0x110000, LETTER, np.uint8)
    known = [unicodedata.ucd_3_2_0.category(chr(code)) for code in range(0x10000)]
    kinds[:0x10000][[category[0] in "ZPSC" and category != "Cn" for category in known]] = BETWEEN
    kinds[EMOJI[0] : EMOJI[1] + 1] = BETWEEN
    for first, last in ALONE_RANGES:
        here = kinds[first : last + 1]
        here[here == LETTER] = ALONE
    return kinds
