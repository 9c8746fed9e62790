"""Texts as sequences of 64-bit word hashes, a batch at a time: what near-duplicates and contamination are found by.

The rule, on which documents' similarity depends: case is ignored (`str.lower`); a word is a run of letters, marks and
digits; what stands between words (space, punctuation, symbols) is ignored; in scripts that put no spaces between words
(Chinese, Thai and others: ALONE_SCRIPTS) each letter is a word. So that every machine sees the same words, letters are
told from symbols by Unicode 3.2, which every Python knows; what came later is a letter, but for emoji.

A span of values v (characters of a word, words of an n-gram) is hashed as the sum of v[i] * BASE**i modulo 2**64, i
from 0 at the start of the span: prefix sums give the hashes of all spans of a batch at once, whatever their lengths.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from minillm.data.order import mix64
from minillm.scripts import BLOCKS

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64; its bits are those of the golden ratio
INVERSE = pow(BASE, -1, 2**64)
BATCH = 2**18  # characters that are hashed at a time
BETWEEN, LETTER, ALONE = 0, 1, 2  # what a character is: between words, part of a word, a word by itself
ALONE_SCRIPTS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Tibetan", "Myanmar", "Khmer")
EMOJI = (0x1F000, 0x1FAFF)
BREAK = re.compile(r"[\s，。]")


class Ragged(NamedTuple):
    """One row of values a document: those of document i are values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray  # uint64
    offsets: np.ndarray  # (documents + 1,) int64


def batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive texts of at most BATCH characters, or of one text."""
    start = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > BATCH:
            yield start, i
            start, size = i, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)


def word_hashes(texts: Sequence[str]) -> Ragged:
    """The hashes of the words of each text, in order."""
    pieces = [cut(text) for text in texts]
    flat = [piece for some in pieces for piece in some]
    parts = [hash_words(flat[start:stop]) for start, stop in batches(flat)]
    counts = np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])
    ends = np.concatenate([[0], np.cumsum(counts)])
    last = np.cumsum([0, *map(len, pieces)])  # pieces up to the end of each text
    return Ragged(np.concatenate([np.empty(0, np.uint64), *(part.values for part in parts)]), ends[last])


def cut(text: str) -> list[str]:
    """Pieces of some BATCH characters of a long text, cut before a space; a word of more than that may be cut too."""
    pieces, start = [], 0
    while len(text) - start > 2 * BATCH:
        space = BREAK.search(text, start + BATCH, start + 2 * BATCH)
        stop = space.start() if space else start + 2 * BATCH
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def hash_words(texts: Sequence[str]) -> Ragged:
    """word_hashes of one batch, which takes about 50 bytes of memory a character."""
    folded = [text.lower() for text in texts]
    # a line break at either end, so that each word has something between words on both sides
    codes = np.frombuffer("\n".join(["", *folded, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = character_kinds()[codes]
    alone = kinds == ALONE
    edges = (kinds[1:] != kinds[:-1]) | alone[1:]  # where one word or gap ends and the next begins
    starts = np.flatnonzero(edges & (kinds[1:] != BETWEEN)) + 1
    ends = np.flatnonzero(edges & (kinds[:-1] != BETWEEN)) + 1
    first = np.cumsum([1, *(len(text) + 1 for text in folded)])  # character of each text
    return Ragged(span_hashes(codes, starts, ends), np.searchsorted(starts, first))


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
    """A 64-bit hash of each values[start:end], which depends on the values and their order; spans in order."""
    hashes = np.empty(len(starts), np.uint64)
    for first in range(0, len(starts), BATCH):  # a part at a time: a document may be long
        here = slice(first, first + BATCH)
        a, b = starts[here] - starts[first], ends[here] - starts[first]
        part = values[starts[first] : ends[here][-1]]
        sums = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(part * powers(BASE, len(part)), out=sums[1:])
        hashes[here] = mix64((sums[b] - sums[a]) * powers(INVERSE, len(part))[a])
    return hashes


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
    """BETWEEN, LETTER or ALONE for each of the 0x110000 characters."""
    kinds = np.full(0x110000, LETTER, np.uint8)
    known = [unicodedata.ucd_3_2_0.category(chr(code)) for code in range(0x10000)]
    kinds[:0x10000][[category[0] in "ZPSC" and category != "Cn" for category in known]] = BETWEEN
    kinds[EMOJI[0] : EMOJI[1] + 1] = BETWEEN
    for first, last in chain.from_iterable(BLOCKS[script] for script in ALONE_SCRIPTS):
        block = kinds[first : last + 1]
        block[block == LETTER] = ALONE
    return kinds
