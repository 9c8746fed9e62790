"""Writing prepared tokens: arrays that grow, and can be continued after the process that wrote them is dead."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.store import SOURCE
from minillm.files import sha256


class StaleError(ValueError):
    """What an interrupted preparation left is not whole: start afresh."""


class GrowingArray:
    """A one-dimensional .npy file, written piece by piece, whose length is known when it is closed.

    With a length it continues a file from there, and cuts off what follows; raises StaleError where it is shorter.
    """

    def __init__(self, path: Path, dtype: np.dtype | str, name: str | None = None, length: int = 0):
        self.path, self.dtype, self.name = path, np.dtype(dtype), name or np.dtype(dtype).name
        if length and not path.is_file():
            raise StaleError(f"{path}: the file is missing")
        # Without a buffer nothing is written after an error, when a later call may have continued the file.
        self.file = open(path, "r+b" if length else "wb", buffering=0)  # noqa: SIM115 (closed in close)
        self.length = length
        self.header_size = self.write_header()
        end = self.header_size + length * self.dtype.itemsize
        if path.stat().st_size < end:
            raise StaleError(f"{path}: the file is truncated")
        self.file.truncate(end)
        self.file.seek(end)

    def write_header(self) -> int:
        self.file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)  # leaves room for the length to grow
        return self.file.tell()

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, dtype=self.dtype).view(np.uint8)
        while len(data):
            data = data[self.file.write(data) :]
        self.length += len(array)

    def sync(self) -> int:
        """Make what is written survive a power cut; how many items that are."""
        os.fsync(self.file.fileno())
        return self.length

    def close(self) -> dict:
        """What the index says of the file."""
        grown = self.write_header()
        assert grown == self.header_size, (grown, self.header_size)
        self.sync()
        self.file.close()
        size = self.path.stat().st_size
        entry = {"file": self.path.name, "length": self.length, "dtype": self.name, "size": size}
        return entry | {"sha256": sha256(self.path)}


class Written(NamedTuple):
    """Pieces of documents of one file, encoded: what a SplitWriter takes."""

    tokens: np.ndarray  # of all pieces, bos and eos included
    lengths: np.ndarray  # tokens of each piece
    starts: np.ndarray  # bool: whether the piece starts a document
    ends: np.ndarray  # bool: whether it ends one
    lines: np.ndarray  # where each piece stands in the file
    n_chars: np.ndarray
    n_bytes: np.ndarray

    def where(self, mine: np.ndarray) -> "Written":
        """The pieces that a mask selects."""
        if mine.all():
            return self
        tokens, *per_piece = self
        return Written(tokens[np.repeat(mine, self.lengths)], *(values[mine] for values in per_piece))


class SplitWriter:
    """Writes the files of one split, from the beginning or from the state that another had."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict | None = None):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        before = state or {"n_tokens": 0, "n_chars": 0, "n_bytes": 0, "shards": [], "offsets": 0, "sources": 0}
        self.n_tokens, self.n_chars, self.n_bytes = before["n_tokens"], before["n_chars"], before["n_bytes"]
        self.shards: list[dict] = before["shards"]
        for shard in self.shards:
            path = directory / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["size"]:
                raise StaleError(f"{path}: the file is missing or truncated")
        self.shard = self.next_shard(before["shard"]) if before.get("shard") else None
        self.offsets = GrowingArray(directory / f"{split}-offsets.npy", "<i8", length=before["offsets"])
        self.sources = GrowingArray(directory / f"{split}-sources.npy", SOURCE, "source", before["sources"])
        if not self.offsets.length:
            self.offsets.append(np.zeros(1))

    def next_shard(self, length: int = 0) -> GrowingArray:
        path = self.directory / f"{self.split}-{len(self.shards):05d}.npy"
        return GrowingArray(path, self.dtype, length=length)

    def state(self) -> dict:
        """What is written, synced: from here another SplitWriter can go on."""
        counts = {"n_tokens": self.n_tokens, "n_chars": self.n_chars, "n_bytes": self.n_bytes, "shards": self.shards}
        lengths = {"offsets": self.offsets.sync(), "sources": self.sources.sync()}
        return counts | lengths | {"shard": self.shard.sync() if self.shard is not None else 0}

    def append(self, written: Written, file: int) -> None:
        ends = self.n_tokens + np.cumsum(written.lengths)
        self.offsets.append(ends[written.ends])
        sources = np.empty(int(written.starts.sum()), SOURCE)
        sources["file"], sources["line"] = file, written.lines[written.starts]
        self.sources.append(sources)
        self.n_tokens += len(written.tokens)
        self.n_chars += int(written.n_chars.sum())
        self.n_bytes += int(written.n_bytes.sum())
        tokens = written.tokens
        while len(tokens):
            self.shard = self.shard or self.next_shard()
            room = self.shard_tokens - self.shard.length
            self.shard.append(tokens[:room])
            tokens = tokens[room:]
            if self.shard.length == self.shard_tokens:
                self.shards.append(self.shard.close())
                self.shard = None

    def close(self) -> dict:
        """What the index says of the split."""
        if self.shard is not None:
            self.shards.append(self.shard.close())
        offsets, sources = self.offsets.close(), self.sources.close()
        assert offsets["length"] == sources["length"] + 1, (self.split, offsets, sources)
        return {
            "n_documents": sources["length"],
            "n_tokens": self.n_tokens,
            "n_chars": self.n_chars,
            "n_bytes": self.n_bytes,
            "shards": self.shards,
            "offsets": offsets,
            "sources": sources,
        }
