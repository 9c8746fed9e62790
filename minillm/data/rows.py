"""Rows of tokens: which stretches of the corpus a row reads, and the reading itself.

R rows, T tokens a row.

A row of either kind is a list of spans, stretches of the corpus laid side by side. A span of n inputs reads n + 1
tokens: the inputs, and the same shifted by one, the targets. Places that are left over are padding: token 0, target
IGNORE_INDEX. In a packed row padding is, for positions and doc_ids, one more piece, so that attention need not know
of it: a position always counts from where the doc_id changed.

A document may be a tree, a prompt and several answers to it. Each answer is a branch, which begins with a copy of the
prompt's last token, the one that predicts its first; so a target is the next token here too:

    tokens      p0 p1 p2 p3 c0 c1 p3 r0 r1        the prompt p0 .. p3, chosen c0 c1, rejected r0 r1
    branches     0  0  0  1  1  1  2  2  2
    positions    0  1  2  3  4  5  3  4  5
    targets      -  -  - c0 c1  - r0 r1           "-" is not learned, as the document says of its tokens
"""

from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from minillm.data.batch import Batch
from minillm.data.order import epoch_offset, source_seed
from minillm.data.packing import Plan, plan_rows
from minillm.losses import IGNORE_INDEX

Spans = tuple[list[int], list[int]]  # (starts, lengths), from left to right
PADDING: Spans = ([], [])  # a row that reads nothing


class Store(Protocol):
    """What is read of a TokenStore; anything with these can be trained on.

    A `directory` attribute, where there is one, says where the packing plan is kept. Methods like `tokens`, where there
    are any, say more of each token, or None: `trained` whether it is learned, `branches` the branch of the tree that it
    is in, `reference` its log-probability under a reference model, given what it follows.
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
    """The text of one source cut into rows of T tokens, packed or plain; `number` is its place in the mixture.

    `masked`: only a part of it is learned, as of conversations.
    """

    def __init__(self, store: Store, seq_len: int, packing: bool, seed: int, number: int = 0, name: str = ""):
        self.store, self.seq_len, self.name = store, seq_len, name
        self.seed = source_seed(seed, number)
        self.offset = lru_cache(4)(partial(epoch_offset, n_tokens=store.n_tokens, seed=self.seed))  # asked for each row
        self.plan = plan_of(store, seq_len) if packing else None
        self.masked = beside(store, "trained", 0, 0) is not None
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


def beside(store: Store, name: str, start: int, stop: int) -> np.ndarray | None:
    """What `trained`, `branches` or `reference` says of the tokens start .. stop - 1; None where it says nothing."""
    return getattr(store, name)(start, stop) if hasattr(store, name) else None


def gather(rows: list[tuple[Store, Spans]], seq_len: int, packed: bool, pinned: bool = False) -> Batch:
    """Read rows, each from its own store, into host memory."""
    branched, referenced = (
        packed and any(beside(store, name, 0, 0) is not None for store, _ in rows) for name in ("branches", "reference")
    )
    fields = 4 + branched if packed else 2
    host = torch.empty((fields, len(rows), seq_len), dtype=torch.int64, pin_memory=pinned)
    arrays = host.numpy()
    tokens, targets = arrays[:2]
    reference = torch.zeros((len(rows), seq_len), pin_memory=pinned) if referenced else None
    arrays[4:] = 0
    for row, (store, (starts, lengths)) in enumerate(rows):
        column = 0
        for start, length in zip(starts, lengths):
            here, stop = slice(column, column + length), start + length + 1
            window = read_ring(store, start, stop)
            tokens[row, here] = window[:-1]
            targets[row, here] = window[1:]
            trained = beside(store, "trained", start, stop)
            if trained is not None:
                targets[row, here][trained[1:] == 0] = IGNORE_INDEX
            if branched and (branches := beside(store, "branches", start, stop)) is not None:
                arrays[4, row, here] = branches[:-1]
            if referenced and (logprobs := beside(store, "reference", start, stop)) is not None:
                reference.numpy()[row, here] = np.where(targets[row, here] == IGNORE_INDEX, 0, logprobs[1:])
            column += length
        tokens[row, column:] = 0
        targets[row, column:] = IGNORE_INDEX
    if packed:
        arrays[2:4] = number_pieces([lengths for _, (_, lengths) in rows], seq_len)
    if branched:
        arrays[2] = branch_positions(*arrays[2:])
    return Batch(*host)._replace(reference=reference)


def number_pieces(lengths: list[list[int]], seq_len: int) -> np.ndarray:
    """Positions and doc_ids, (2, R, T), of rows given the lengths of their pieces; what is left is one more piece."""
    filled = [row if sum(row) == seq_len else [*row, seq_len - sum(row)] for row in lengths]
    flat = np.array([length for row in filled for length in row])
    numbers = np.array([number for row in filled for number in range(len(row))])
    positions = np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)
    return np.stack([positions, np.repeat(numbers, flat)]).reshape(2, len(lengths), seq_len)


def branch_positions(positions: np.ndarray, doc_ids: np.ndarray, branches: np.ndarray) -> np.ndarray:
    """Positions of which those of each branch go on from the end of its prompt; all are (R, T)."""
    R, T = positions.shape
    place = np.arange(T)
    begins = np.ones((R, T), dtype=bool)  # a prompt, a branch
    begins[:, 1:] = (np.diff(branches) != 0) | (np.diff(doc_ids) != 0)
    since = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    pieces = np.arange(R)[:, None] * T + doc_ids  # numbered over all rows
    prompts = np.bincount(pieces.ravel(), weights=(branches == 0).ravel(), minlength=R * T).astype(np.int64)
    return np.where(branches == 0, positions, prompts[pieces] + since)


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
