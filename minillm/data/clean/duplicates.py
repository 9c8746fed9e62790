"""Which documents say the same: exactly, or nearly so by their MinHash signatures. For any number of them.

Both answer with one array: for each document the number of the first one of its group, which is its own where it has no
duplicate; so what is kept is where first == arange.

Equal keys are found by sorting, a part of the range of keys at a time, so that memory grows with the corpus only by
what a document needs: 8 bytes for the answer. The signatures of near-duplicates are a file (4 * n_perm bytes a
document), their band keys another (8 * bands).
"""

import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.data.clean.minhash import EMPTY, band_keys, check_bands
from minillm.data.order import mix64
from minillm.files import explained

ROWS = 2**14  # signatures read together, 8 MB
BLOCK = 2**16  # keys read together
SORTED = 2**21  # keys sorted together, give or take chance: up to 150 MB with all that sorting takes
PAIRS = 2**14  # pairs compared together, 16 MB
REACH = 256  # in a larger bucket a document is compared with so many after it, and not with all


@dataclass(frozen=True)
class SignatureFile:
    """Signatures in a file, read by rows: `[slice]` or `[array of numbers]`, as those of an array; see open_signatures.

    Nothing is mapped: far more of a mapped file than was read may count as memory of the process.
    """

    path: str | Path
    shape: tuple[int, int]  # (documents, n_perm)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        n_perm = self.shape[1]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            count = max(0, stop - start) * n_perm
            return np.fromfile(self.path, "<u4", count, offset=4 * n_perm * start).reshape(-1, n_perm)
        out = np.empty((len(rows), n_perm), "<u4")
        with open(self.path, "rb", buffering=0) as file:
            for row, place in zip(rows.tolist(), out):
                os.preadv(file.fileno(), [place], 4 * n_perm * row)
        return out


Signatures = np.ndarray | SignatureFile


def open_signatures(path: str | Path, n_perm: int) -> SignatureFile:
    """The signatures in a file: (documents, n_perm) uint32, little-endian, in order, as `tobytes` writes them.

    Raises ValueError where the file was cut off.
    """
    size = Path(path).stat().st_size
    if size % (4 * n_perm):
        raise ValueError(f"{path}: {size:,} bytes are no whole number of signatures of {n_perm} permutations")
    return SignatureFile(path, (size // (4 * n_perm), n_perm))


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """A 64-bit BLAKE2b hash of each text, runs of white space taken for one space and those at the ends for none.

    Among 100 million different texts, two have the same hash with probability 0.0003.
    """
    digests = [hashlib.blake2b(" ".join(t.split()).encode("utf-8", "surrogatepass"), digest_size=8) for t in texts]
    return np.frombuffer(b"".join(digest.digest() for digest in digests), "<u8").astype(np.uint64)


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """For each document the first with the same hash: (documents,) uint64 -> (documents,) int64.

    The hashes may be a memory-mapped file. Takes 8 bytes a document and some 200 MB.
    """
    first = np.arange(len(hashes))
    for order, keys in equal_keys(hashes):
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        lengths = np.diff(np.append(starts, len(keys)))
        first[order] = np.repeat(order[starts], lengths)
    return first


def near_duplicates(
    signatures: Signatures,
    bands: int,
    rows: int,
    threshold: float,
    directory: str | Path | None = None,
) -> np.ndarray:
    """For each document the first of its group: (documents, n_perm) uint32 -> (documents,) int64.

    Two documents are joined when they have a band in common and at least `threshold` of their signatures' places agree;
    a group is all that are joined directly or through others. Texts without words are joined to none: equal ones are
    exact duplicates. The order of the documents makes no difference, but where more than REACH have a band in common
    and are not of one group.

    Signatures may be in a file (`open_signatures`). Band keys are kept in a temporary file in `directory`, or in memory
    where there is none. Takes 8 bytes a document and some 300 MB.
    """
    check_bands(bands, rows, signatures.shape[1])
    group = np.arange(len(signatures))
    with temporary_array((bands, len(signatures)), directory) as keys:
        for start in range(0, len(signatures), ROWS):
            stop = min(start + ROWS, len(signatures))
            block = signatures[start:stop]
            empty = np.flatnonzero((block == EMPTY).all(axis=1))
            block_keys = band_keys(block, bands, rows)
            block_keys[empty] = mix64(start + empty.astype(np.uint64))[:, None]  # a bucket of its own
            keys[:, start:stop] = block_keys.T
            let_go(keys)
        for band in range(bands):
            for order, sorted_keys in equal_keys(keys[band]):
                join_buckets(group, order, sorted_keys, signatures, threshold)
    for start in range(0, len(group), BLOCK):
        find(group, np.arange(start, min(start + BLOCK, len(group))))
    return group


# --- buckets: documents with the same key -----------------------------------------------------------------------------


def equal_keys(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents that share their key with others: (documents, keys), by key, then number, a part at a time."""
    parts = -(-len(keys) // SORTED)
    for part in range(parts):
        documents, found = map(np.concatenate, zip(*in_part(keys, part, parts)))
        by_key = np.argsort(found, kind="stable")
        found, documents = found[by_key], documents[by_key]
        same = found[1:] == found[:-1]
        repeated = np.concatenate([same, [False]]) | np.concatenate([[False], same])
        if repeated.any():
            yield documents[repeated], found[repeated]


def in_part(keys: np.ndarray, part: int, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The keys in one of so many equal parts of their range: (documents, keys), a block at a time."""
    for start in range(0, len(keys), BLOCK):
        block = np.array(keys[start : start + BLOCK])
        here = np.flatnonzero(((block >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32) == part)
        yield start + here, block[here]
        let_go(keys)


def join_buckets(
    group: np.ndarray, documents: np.ndarray, keys: np.ndarray, signatures: Signatures, threshold: float
) -> None:
    """Join documents with the same key that are similar enough: each with the next, then the second next, and so on.

    A bucket that has become one group is done, so that thousands of copies take as many comparisons, not their square.
    """
    distance = 0
    while len(keys) and distance < REACH:
        distance += 1
        together = keys[distance:] == keys[:-distance]  # sorted: then all between have the same key
        a, b = documents[:-distance][together], documents[distance:][together]
        join_similar(group, a, b, signatures, threshold)
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        roots, sizes = find(group, documents), np.diff(np.append(starts, len(keys)))
        several = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
        going_on = np.repeat(several & (sizes > distance + 1), sizes)
        documents, keys = documents[going_on], keys[going_on]


def join_similar(group: np.ndarray, a: np.ndarray, b: np.ndarray, signatures: Signatures, threshold: float) -> None:
    """Join documents a[i] and b[i] for each i where the signatures agree in at least `threshold` of the places."""
    apart = find(group, a) != find(group, b)
    a, b = a[apart], b[apart]
    for start in range(0, len(a), PAIRS):
        x, y = a[start : start + PAIRS], b[start : start + PAIRS]
        agree = np.count_nonzero(signatures[x] == signatures[y], axis=1)
        alike = agree >= threshold * signatures.shape[1]
        unite(group, x[alike], y[alike])


# --- groups: a forest in which each document points to an earlier one of its group, the first to itself --------------


def find(group: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The first document of each one's group; they point to it directly from now on."""
    root = group[documents]
    while not np.array_equal(above := group[root], root):
        root = above
    group[documents] = root
    return root


def unite(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Make one group of those of a[i] and b[i], for each i."""
    while True:
        a, b = find(group, a), find(group, b)
        apart = a != b
        if not apart.any():
            break
        a, b = a[apart], b[apart]
        # the later root of a pair points to the earliest it meets; pairs that lost come round again
        np.minimum.at(group, np.maximum(a, b), np.minimum(a, b))


# --- files that are larger than memory --------------------------------------------------------------------------------


@contextmanager
def temporary_array(shape: tuple[int, ...], directory: str | Path | None) -> Iterator[np.ndarray]:
    """A uint64 array: in a file without a name in the directory, which is gone at the end, or in memory."""
    if directory is None or 0 in shape:
        yield np.empty(shape, np.uint64)
        return
    with explained(directory), tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a signal while the array is written
            os.posix_fallocate(file.fileno(), 0, 8 * math.prod(shape))
        yield np.memmap(file, np.uint64, "r+", shape=shape)


def let_go(array: np.ndarray) -> None:
    """Take the pages of a mapped file out of this process's memory; they are read again when they are needed."""
    if not isinstance(array, np.memmap) or array.mode == "c":  # changes to a private copy would be lost
        return
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
