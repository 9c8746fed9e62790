"""Rows of tokens: which stretches of the corpus a row reads, and the reading itself.

R rows, T tokens a row.

A row of either kind is a list of spans, stretches of the corpus laid side by side. A span of n inputs reads n + 1
tokens: the inputs, and the same shifted by one, the targets. Places that are left over are padding: token 0, target
IGNORE_INDEX. In a packed row padding is, for positions and doc_ids, one more piece, so that attention need not know
of it: a position always counts from where the doc_id changed.
"""

from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from minillm.data.order import epoch_offset, source_seed
from minillm.data.packing import Plan, plan_rows
from minillm.losses import IGNORE_INDEX

Spans = tuple[list[int], list[int]]  # (starts, lengths), from left to right
PADDING: Spans = ([], [])  # a row that reads nothing


class Store(Protocol):
    """What is read of a TokenStore; anything with these can be trained on.

    A `directory` attribute, where there is one, says where the packing plan is kept; a method `trained`, like `tokens`,
    which tokens are learned.
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
    """Sample k of a run: which row of which epoch of which source it is, and what it reads."""

    k: int
    source: int  # its number; 0 where nothing is mixed
    epoch: int
    row: int
    excerpts: list[Excerpt]


class SourceRows:
    """The text of one source cut into rows of T tokens, packed or plain; `number` is its place in the mixture."""

    def __init__(self, store: Store, seq_len: int, packing: bool, seed: int, number: int = 0, name: str = ""):
        self.store, self.seq_len, self.name = store, seq_len, name
        self.seed = source_seed(seed, number)
        self.offset = lru_cache(4)(partial(epoch_offset, n_tokens=store.n_tokens, seed=self.seed))  # asked for each row
        self.plan = plan_of(store, seq_len) if packing else None
        self.per_epoch = -(-store.n_tokens // seq_len) if self.plan is None else self.plan.n_rows
        self.targets_per_epoch = store.n_tokens if self.plan is None else self.plan.n_targets

    def spans(self, epoch: int, row: int) -> Spans:
        """What a row of an epoch reads."""
        if self.plan is not None:
            return self.plan.pieces(row)
        return plain_spans(self.store.n_tokens, self.seq_len, self.offset(epoch), row)


def plan_of(store: Store, seq_len: int) -> Plan:
    """The packing plan of a store, kept in its directory where it has one."""
    return plan_rows(store.document_offsets, seq_len, getattr(store, "directory", None))


def plain_spans(n_tokens: int, seq_len: int, offset: int, row: int) -> Spans:
    """Row `row` of the corpus closed to a ring and cut every T tokens from `offset` on; the last row may be short."""
    return [(offset + row * seq_len) % n_tokens], [min(seq_len, n_tokens - row * seq_len)]


def read_ring(store: Store, start: int, stop: int) -> np.ndarray:
    """Tokens start .. stop - 1 where token n_tokens is token 0 again."""
    if stop <= store.n_tokens:
        return store.tokens(start, stop)
    return np.concatenate([store.tokens(start, store.n_tokens), store.tokens(0, stop - store.n_tokens)])


def learned(store: Store, start: int, stop: int) -> np.ndarray | None:
    """Which of the tokens start .. stop - 1 of a packed row are learned; None where all are."""
    return store.trained(start, stop) if hasattr(store, "trained") else None


def gather(rows: list[tuple[Store, Spans]], seq_len: int, packed: bool, pinned: bool = False) -> torch.Tensor:
    """Read rows, each from its own store, into one int64 tensor in host memory.

    Returns: (2, R, T), tokens and targets; packed rows (4, R, T), positions and doc_ids too.
    """
    host = torch.empty((4 if packed else 2, len(rows), seq_len), dtype=torch.int64, pin_memory=pinned)
    arrays = host.numpy()
    tokens, targets = arrays[:2]
    for row, (store, (starts, lengths)) in enumerate(rows):
        column = 0
        for start, length in zip(starts, lengths):
            window = read_ring(store, start, start + length + 1)
            tokens[row, column : column + length] = window[:-1]
            targets[row, column : column + length] = window[1:]
            trained = learned(store, start, start + length + 1)
            if trained is not None:
                targets[row, column : column + length][trained[1:] == 0] = IGNORE_INDEX
            column += length
        tokens[row, column:] = 0
        targets[row, column:] = IGNORE_INDEX
    if packed:
        arrays[2:] = number_pieces([lengths for _, (_, lengths) in rows], seq_len)
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
