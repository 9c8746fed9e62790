"""Rows of whole documents: cut, pack by best fit, remember.

A stored document of L tokens, bos first and eos last, has L - 1 inputs and the L - 1 targets that follow them. It is
cut into pieces of at most T inputs, each read together with the one token after it, so that no target is lost at a
cut. Pieces are then put into rows of T inputs: the largest first, each into the fullest row that still has room for
it (best fit decreasing; at most 11/9 of the fewest possible rows, in practice within 1%).

    document 7:   bos a b c d e f g eos          T = 5
    pieces:       [bos a b c d] -> a b c d e     [e f g] -> f g eos
    a row:        [e f g][bos x]                 positions 0 1 2 0 1    doc_ids 0 0 0 1 1

The plan, which pieces stand in which row, depends on the lengths of the documents alone. It is computed once, window
by window, so that memory is bounded however long the corpus, and is kept in files beside the shards.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.writing import GrowingArray
from minillm.files import atomic_directory, locked, read_json

logger = logging.getLogger("minillm")

VERSION = 1  # part of a plan's name: raise it when the same documents would be packed otherwise
WINDOW = 2**20  # pieces packed at a time: about 100 MB of working memory, and too many for the last row to matter


class Plan(NamedTuple):
    """Row r consists of pieces rows[r] .. rows[r + 1] - 1; piece p is the inputs starts[p] .. + lengths[p] - 1."""

    rows: np.ndarray  # (n_rows + 1,) int64
    starts: np.ndarray  # (n_pieces,) int64, position in the corpus
    lengths: np.ndarray  # (n_pieces,) int32, inputs; the last target is the token after them
    n_targets: int  # over all rows, which is also the number of inputs

    @property
    def n_rows(self) -> int:
        return len(self.rows) - 1

    def pieces(self, row: int) -> tuple[list[int], list[int]]:
        """(starts, lengths) of the pieces in a row, from left to right."""
        first, stop = self.rows[row : row + 2].tolist()
        return self.starts[first:stop].tolist(), self.lengths[first:stop].tolist()

    def fill(self, seq_len: int) -> float:
        """The share of all places in rows that holds text rather than padding."""
        return self.n_targets / max(1, self.n_rows * seq_len)


def cut(offsets: np.ndarray, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pieces (starts, lengths), in order, of the documents offsets[i] .. offsets[i + 1] - 1; WINDOW at a time."""
    inputs = np.maximum(np.diff(offsets) - 1, 0)
    ends = np.cumsum(-(-inputs // seq_len))  # pieces up to the end of each document
    n_pieces = int(ends[-1])
    for first in range(0, n_pieces, WINDOW):
        pieces = np.arange(first, min(first + WINDOW, n_pieces))
        document = np.searchsorted(ends, pieces, side="right")
        firsts = np.where(document, ends[document - 1], 0)  # the first piece of the document
        within = (pieces - firsts) * seq_len
        yield offsets[document] + within, np.minimum(seq_len, inputs[document] - within)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Pack pieces by best fit decreasing: (row of each piece, number of rows).

    Pieces of one length are alike, and so are rows with the same room left: whole groups are placed at a time, which
    gives exactly the rows of the one-by-one method, millions of pieces a second. `open_rooms` has bit r set where
    some row has room r, so the fullest row with room enough is its lowest set bit from `size` up.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    row_of = np.empty(len(lengths), np.int64)
    groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by room: rows with that room
    open_rooms = n_rows = 0
    for size, first, stop in zip((-sizes).tolist(), firsts.tolist(), [*firsts.tolist()[1:], len(lengths)]):
        left = order[first:stop]
        while len(left):
            fitting = open_rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                rows = groups[room].pop()
                if not groups[room]:
                    open_rooms ^= 1 << room
            else:
                room = capacity
                rows = np.arange(n_rows, n_rows - (-len(left) // (room // size)))
                n_rows += len(rows)
            each = room // size  # pieces a row of this group takes
            full, rest = divmod(min(len(left), each * len(rows)), each)
            placed = full * each + rest
            row_of[left[:placed]] = np.repeat(rows, each)[:placed]
            left = left[placed:]
            used = full + (rest > 0)
            remaining = (rows[:full], room - each * size), (rows[full:used], room - rest * size), (rows[used:], room)
            for group, room_left in remaining:
                if len(group) and room_left:
                    groups[room_left].append(group)
                    open_rooms |= 1 << room_left
    return row_of, n_rows


def pack(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pieces in each row, starts, lengths): rows in the order of their first piece, pieces of a row in text order."""
    row_of, n_rows = best_fit(lengths, seq_len)
    first_piece = np.unique(row_of, return_index=True)[1]
    rank = np.empty(n_rows, np.int64)
    rank[np.argsort(first_piece)] = np.arange(n_rows)
    row_of = rank[row_of]
    order = np.argsort(row_of, kind="stable")
    return np.bincount(row_of, minlength=n_rows), starts[order], lengths[order]


def packed_windows(offsets: np.ndarray, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`pack`, a bounded number of pieces at a time."""
    for first in range(0, len(offsets) - 1, WINDOW):
        for starts, lengths in cut(np.asarray(offsets[first : first + WINDOW + 1], dtype=np.int64), seq_len):
            yield pack(starts, lengths, seq_len)


def plan_rows(offsets: np.ndarray, seq_len: int, directory: str | Path | None = None) -> Plan:
    """The plan for documents offsets[i] .. offsets[i + 1] - 1 in rows of seq_len.

    With a directory (that of the shards) it is read from there, memory-mapped, or computed and stored there first; the
    name tells apart the row length and the documents. Several processes may ask at once: one computes, the others
    wait. A damaged plan is computed again, since it holds nothing that the documents do not.
    """
    if directory is None:
        return plan_in_memory(offsets, seq_len)
    path = Path(directory) / f"packing-{seq_len}-{fingerprint(offsets)}"
    plan = open_plan(path)
    if plan is not None:
        return plan
    try:
        with locked(Path(directory) / "packing.lock", wait=True):
            plan = open_plan(path)
            if plan is None:
                write_plan(path, offsets, seq_len)
                plan = open_plan(path)
                assert plan is not None, path
            return plan
    except ValueError as error:  # the place is read-only, or full: no reason not to train
        logger.warning("%s; the packing plan is kept in memory", error)
        return plan_in_memory(offsets, seq_len)


def plan_in_memory(offsets: np.ndarray, seq_len: int) -> Plan:
    windows = list(packed_windows(offsets, seq_len)) or [(np.empty(0, np.int64),) * 3]
    counts, starts, lengths = (np.concatenate(arrays) for arrays in zip(*windows))
    return Plan(np.concatenate([[0], np.cumsum(counts)]), starts, lengths.astype(np.int32), int(lengths.sum()))


def fingerprint(offsets: np.ndarray) -> str:
    """A hash of all that a plan depends on besides the row length."""
    digest = hashlib.sha256(f"{VERSION} {WINDOW} {len(offsets)}".encode())
    for first in range(0, len(offsets), WINDOW):
        digest.update(np.ascontiguousarray(offsets[first : first + WINDOW], dtype="<i8"))
    return digest.hexdigest()[:16]


def write_plan(path: Path, offsets: np.ndarray, seq_len: int) -> None:
    """Compute a plan into a folder, which appears when it is whole; the caller holds the lock."""
    n_rows = n_pieces = n_targets = 0
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with atomic_directory(path) as temporary:
        files = {"rows": "<i8", "starts": "<i8", "lengths": "<i4"}
        rows, starts, lengths = arrays = [GrowingArray(temporary / f"{name}.npy", files[name]) for name in files]
        rows.append(np.zeros(1, np.int64))
        for window_counts, window_starts, window_lengths in packed_windows(offsets, seq_len):
            rows.append(n_pieces + np.cumsum(window_counts))
            starts.append(window_starts)
            lengths.append(window_lengths)
            n_rows += len(window_counts)
            n_pieces += len(window_starts)
            n_targets += int(window_lengths.sum())
        for array in arrays:
            array.close()
        info = {"n_rows": n_rows, "n_pieces": n_pieces, "n_targets": n_targets, "seq_len": seq_len}
        (temporary / "plan.json").write_text(json.dumps(info))


def open_plan(path: Path) -> Plan | None:
    """The stored plan, or None where there is none that is whole."""
    try:
        info = read_json(path / "plan.json")
        names = ("rows", "starts", "lengths")
        rows, starts, lengths = (np.load(path / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names)
        expected = (info["n_rows"] + 1, info["n_pieces"], info["n_pieces"])
        whole = (len(rows), len(starts), len(lengths)) == expected and rows[-1] == info["n_pieces"]
        return Plan(rows, starts, lengths, info["n_targets"]) if whole else None
    except (OSError, ValueError, KeyError):
        return None
