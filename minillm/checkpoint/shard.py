"""One file of tensors in the safetensors format, and files that may be damaged or hostile.

    8 bytes: n, little-endian | n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}} | the data

Written and read here rather than through the format's library: hashing while writing saves a second pass, and reading
one tensor at a time into its place keeps the peak at one model, where a mapped file counts a second time.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minillm.checkpoint.layout import Box
from minillm.tensors import narrowed

MAX_JSON = 64 * 2**20  # bytes of a header or manifest that we are ready to parse: far above any real one
BLOCK = 4 * 2**20  # bytes written, then hashed while they are still in the processor's cache
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Header = dict[str, tuple[str, list[int], int, int]]  # dtype, shape, and where the data begin and end in the file


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one safetensors file of tensors; returns its size and sha256. Copies one only where it is on a device."""

    def blocks(name: str) -> Iterator[memoryview]:
        data = byte_view(tensors[name].detach().cpu().contiguous())
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]

    return write_blocks(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, blocks)


def write_blocks(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    blocks: Callable[[str], Iterable[bytes | memoryview]],
) -> dict[str, Any]:
    """Write one safetensors file of tensors whose bytes come a block at a time, and see it on the disk.

    Returns: its size and sha256.
    """
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)  # so that each starts aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype, shape = tensors[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in chain([len(text).to_bytes(8, "little") + text], *map(blocks, names)):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    assert size == 8 + len(text) + end, (path, size)
    return {"size": size, "sha256": digest.hexdigest()}


def read_header(path: Path) -> Header:
    """{name: (dtype, shape, begin, end)} of a safetensors file, the places counted from its start."""
    with opened(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        fits = size >= 8 and length <= min(size - 8, MAX_JSON)
        require(fits, f"{path}: a header of {length} bytes in a file of {size}: truncated, or not a safetensors file")
        entries = parse(path, file.read(length))
    entries.pop("__metadata__", None)
    try:
        header = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            expected = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            numbers = all(type(n) is int and n >= 0 for n in (begin, end, *entry["shape"]))
            require(numbers and end - begin == expected, f"{name} has a wrong place")
            header[name] = (entry["dtype"], entry["shape"], 8 + length + begin, 8 + length + end)
        ends = [8 + length, *sorted(end for *_, end in header.values())]
        begins = [*sorted(begin for *_, begin, _ in header.values()), size]
        require(ends[-1] <= size, f"truncated: it describes {ends[-1]} bytes, the file has {size}")
        require(ends == begins, "its tensors overlap, leave gaps or exceed the file")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a valid safetensors header: {error}") from None
    return header


def read_rows(path: Path, entry: tuple[str, list[int], int, int], box: Box, into: Tensor) -> None:
    """Copy a part of a stored tensor, some blocks of rows at a time.

    `entry` is what the header says of the tensor, `box` the part of it, `into` a tensor of that part's shape, whose
    dtype may be another.
    """
    code, shape, place, _ = entry
    if not shape:  # a number is a row of one
        shape, box, into = [1], Box((0,), (1,)), into.view(1)
    row = DTYPES[code].itemsize * math.prod(shape[1:])
    whole_rows = list(box.shape[1:]) == shape[1:]
    as_stored = into.device.type == "cpu" and into.dtype == DTYPES[code] and into.is_contiguous()
    in_place = whole_rows and as_stored
    step = max(1, BLOCK // row)
    with opened(path) as (file, _):
        for start in range(0, box.shape[0], step):
            part = into[start : start + step]
            data = part if in_place else torch.empty((len(part), *shape[1:]), dtype=DTYPES[code])
            file.seek(place + (box.offset[0] + start) * row)
            complete = file.readinto(byte_view(data)) == len(part) * row
            require(complete, f"{path}: ends too early; it changed while it was read")
            if not in_place:
                part.copy_(narrowed(data, (0, *box.offset[1:]), part.shape))


def file_hash(path: Path, expected_size: int | None = None) -> str:
    """Hex sha256 of a plain file. Raises ValueError where it is not one, has another size or cannot be read."""
    with opened(path, expected_size) as (file, _):
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@contextmanager
def opened(path: Path, expected_size: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """(file, size) of a plain file; ValueError for a missing one, a symbolic link, a pipe, or another size."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reasons = {errno.ENOENT: "is missing", errno.ELOOP: "is a symbolic link, which is not followed"}
        raise ValueError(f"{path}: {reasons.get(error.errno, f'cannot be read: {error.strerror}')}") from None
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: is not a plain file")
        if expected_size not in (None, found.st_size):
            raise ValueError(f"{path}: has {found.st_size} bytes, {expected_size} were saved")
        yield file, found.st_size


def read_bytes(path: Path, expected_size: int | None = None) -> bytes:
    """A whole file of JSON, which must be of a sane size."""
    with opened(path, expected_size) as (file, size):
        require(size <= MAX_JSON, f"{path}: {size} bytes are too many for it; it is not ours")
        return file.read()


def parse(path: Path, data: bytes) -> dict:
    """The JSON object in `data`, which came from `path`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    require(isinstance(value, dict), f"{path}: not a JSON object; the file is damaged")
    return value


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
