"""Which documents hold a part of a test: they share a long run of words with it.

Two texts that have 13 words in a row in common have, as a rule, one source. A document that shares such an n-gram with
a test of the evaluation is contaminated: a model trained on it has seen the question. Words are those of
`minillm.data.clean.words`, so that case, space and punctuation make no difference. A test of fewer than n words is
looked for as a whole; one of fewer than `min_words` is left out, for it stands in many a text by chance.

Source: Brown et al. 2020, "Language models are few-shot learners", appendix C: 13-grams, and at least 8 words.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from minillm.data.clean.words import batches, ngram_hashes, word_hashes

NGRAM = 13
MIN_WORDS = 8
TESTS = 1024  # tests that are hashed at a time
SIEVE = 16  # places of the sieve for each n-gram


class Table(NamedTuple):
    """Which tests have which n-grams, each pair of them once."""

    hashes: np.ndarray  # (pairs,) uint64, sorted
    tests: np.ndarray  # (pairs,) int64
    sieve: np.ndarray  # (a power of two,) bool: whether any hash has these low bits; a search is only worth it then


class NgramIndex(NamedTuple):
    """The n-grams of tests, to be looked for in documents; made by `index_tests`."""

    places: list[str]  # file:line of each test
    sizes: np.ndarray  # (tests,) int64: how many different n-grams it has; 0 where it is too short to be looked for
    tables: dict[int, Table]  # by the number of words of an n-gram: n, and those of shorter tests

    @property
    def skipped(self) -> list[str]:
        """file:line of the tests that are too short to be looked for."""
        return [self.places[i] for i in np.flatnonzero(self.sizes == 0)]


class Contamination(NamedTuple):
    """A contaminated document, and the test of which the largest share was found in it."""

    document: int  # its place among the texts looked at
    test: str  # file:line
    share: float  # of the test's different n-grams, those found in the document


def index_tests(tests: Iterable[tuple[str, str]], n: int = NGRAM, min_words: int = MIN_WORDS) -> NgramIndex:
    """The n-grams of tests given as (file:line, text); takes 32 to 48 bytes of memory an n-gram."""
    if n < 1 or min_words < 1:
        raise ValueError(f"n is {n} and min_words is {min_words}; both must be 1 or more")
    places: list[str] = []
    pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    tests = iter(tests)
    while some := list(islice(tests, TESTS)):
        words = word_hashes([text for _, text in some])
        lengths = np.diff(words.offsets)
        spans = np.where(lengths < min_words, 0, np.minimum(lengths, n))
        for span in set(spans.tolist()) - {0}:
            grams = ngram_hashes(words, span)
            test = np.repeat(np.arange(len(some)), np.diff(grams.offsets))
            here = spans[test] == span
            pairs.setdefault(span, []).append((grams.values[here], len(places) + test[here]))
        places += [place for place, _ in some]
    tables = {span: make_table(*map(np.concatenate, zip(*pairs[span]))) for span in sorted(pairs)}
    found = np.concatenate([np.empty(0, np.int64), *(table.tests for table in tables.values())])
    return NgramIndex(places, np.bincount(found, minlength=len(places)), tables)


def make_table(hashes: np.ndarray, tests: np.ndarray) -> Table:
    order = np.lexsort((tests, hashes))
    hashes, tests = hashes[order], tests[order]
    new = np.concatenate([[True], (hashes[1:] != hashes[:-1]) | (tests[1:] != tests[:-1])])
    sieve = np.zeros(2 ** (SIEVE * len(hashes) - 1).bit_length(), bool)
    sieve[low_bits(hashes, sieve)] = True
    return Table(hashes[new], tests[new], sieve)


def low_bits(hashes: np.ndarray, sieve: np.ndarray) -> np.ndarray:
    return hashes & np.uint64(len(sieve) - 1)


def contaminated(texts: Sequence[str], index: NgramIndex, share: float = 0.0) -> list[Contamination]:
    """The documents that share n-grams with a test, in order: any at all, or at least `share` of the test's.

    Where there are several such tests, the one is named of which the largest share is found, the first of equals.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie from 0 to 1")
    return list(chain.from_iterable(look(texts[a:b], a, index, share) for a, b in batches(texts)))


def look(texts: Sequence[str], first: int, index: NgramIndex, share: float) -> list[Contamination]:
    words = word_hashes(texts)
    found: dict[int, tuple[float, int]] = {}  # document -> (share of the test, -test)
    for span, table in index.tables.items():
        grams = ngram_hashes(words, span)
        met = np.flatnonzero(table.sieve[low_bits(grams.values, table.sieve)])
        document = np.searchsorted(grams.offsets, met, side="right") - 1
        start, stop = (np.searchsorted(table.hashes, grams.values[met], side) for side in ("left", "right"))
        n_tests = stop - start
        # one entry of the table for each test that has the n-gram
        entry = np.arange(n_tests.sum()) + np.repeat(start - np.cumsum(n_tests) + n_tests, n_tests)
        once = np.unique(np.repeat(document, n_tests) * len(table.hashes) + entry)  # an n-gram counts once a document
        document, entry = np.divmod(once, len(table.hashes))
        pairs, counts = np.unique(document * len(index.places) + table.tests[entry], return_counts=True)
        for document, test, count in zip(*np.divmod(pairs, len(index.places)), counts):
            part = float(count / index.sizes[test])
            if part >= share:
                found[document] = max(found.get(document, (0.0, 0)), (part, -test))
    return [Contamination(first + int(i), index.places[-test], part) for i, (part, test) in sorted(found.items())]
