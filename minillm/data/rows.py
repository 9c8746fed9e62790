"""Rows of tokens: which stretches of the corpus a row reads, and the reading itself.

R rows, T tokens a row.

A row of either kind is a list of spans, stretches of the corpus laid side by side. A span of n inputs reads n + 1
tokens: the inputs, and the same shifted by one, the targets. Places that are left over are padding: token 0, target
IGNORE_INDEX. In a packed row padding is, for positions and doc_ids, one more piece, so that attention need not know
of it: a position always counts from where the doc_id changed.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch

from minillm.losses import IGNORE_INDEX

Spans = tuple[list[int], list[int]]  # (starts, lengths), from left to right
PADDING: Spans = ([], [])  # a row that reads nothing


class Store(Protocol):
    """What is read of a TokenStore; anything with these can be trained on.

    A `directory` attribute, where there is one, says where the packing plan is kept.
    """

    n_tokens: int
    document_offsets: np.ndarray  # (n_documents + 1,): document i is tokens offsets[i] .. offsets[i + 1] - 1

    def tokens(self, start: int, stop: int) -> np.ndarray: ...

    def source(self, document: int) -> str: ...


class Excerpt(NamedTuple):
    """Inputs of a row that come from one document: its tokens start .. stop - 1, where bos is token 0."""

    column: int  # place of the first in the row
    document: int
    source: str
    start: int
    stop: int


class Sample(NamedTuple):
    """Sample k of a run: which row of which epoch it is, and what it reads."""

    k: int
    epoch: int
    row: int
    excerpts: list[Excerpt]


def plain_spans(n_tokens: int, seq_len: int, offset: int, row: int) -> Spans:
    """Row `row` of the corpus closed to a ring and cut every T tokens from `offset` on; the last row may be short."""
    return [(offset + row * seq_len) % n_tokens], [min(seq_len, n_tokens - row * seq_len)]


def read_ring(store: Store, start: int, stop: int) -> np.ndarray:
    """Tokens start .. stop - 1 where token n_tokens is token 0 again."""
    if stop <= store.n_tokens:
        return store.tokens(start, stop)
    return np.concatenate([store.tokens(start, store.n_tokens), store.tokens(0, stop - store.n_tokens)])


def gather(store: Store, rows: list[Spans], seq_len: int, packed: bool, pinned: bool = False) -> torch.Tensor:
    """Read rows into one int64 tensor in host memory.

    Returns: (2, R, T), tokens and targets; packed rows (4, R, T), positions and doc_ids too.
    """
    host = torch.empty((4 if packed else 2, len(rows), seq_len), dtype=torch.int64, pin_memory=pinned)
    arrays = host.numpy()
    tokens, targets = arrays[:2]
    for row, (starts, lengths) in enumerate(rows):
        column = 0
        for start, length in zip(starts, lengths):
            window = read_ring(store, start, start + length + 1)
            tokens[row, column : column + length] = window[:-1]
            targets[row, column : column + length] = window[1:]
            column += length
        tokens[row, column:] = 0
        targets[row, column:] = IGNORE_INDEX
    if packed:
        arrays[2:] = number_pieces([lengths for _, lengths in rows], seq_len)
    return host


def number_pieces(lengths: list[list[int]], seq_len: int) -> np.ndarray:
    """Positions and doc_ids, (2, R, T), of rows given the lengths of their pieces; what is left is one more piece."""
    filled = [row if sum(row) == seq_len else [*row, seq_len - sum(row)] for row in lengths]
    flat = np.array([length for row in filled for length in row])
    numbers = np.array([number for row in filled for number in range(len(row))])
    positions = np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)
    return np.stack([positions, np.repeat(numbers, flat)]).reshape(2, len(lengths), seq_len)


def excerpts(store: Store, spans: Spans) -> list[Excerpt]:
    """Which documents a row reads, from left to right."""
    found: list[Excerpt] = []
    offsets, column = store.document_offsets, 0
    for start, length in zip(*spans):
        place, left = start, length
        while left:
            document = int(np.searchsorted(offsets, place, side="right")) - 1
            first, end = int(offsets[document]), int(offsets[document + 1])
            taken = min(left, end - place)
            found.append(Excerpt(column, document, store.source(document), place - first, place - first + taken))
            column, left = column + taken, left - taken
            place = (place + taken) % store.n_tokens
    return found
