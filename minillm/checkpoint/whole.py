"""A checkpoint that many ranks wrote, or another format, as one of a single file: a block of rows at a time."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.folder import check_header, write_rest
from minillm.checkpoint.layout import Box, Layout, intersection, rows_of
from minillm.checkpoint.manifest import file_of, spell, tensors_of
from minillm.checkpoint.shard import BLOCK, DTYPES, byte_view, read_rows, write_blocks
from minillm.tensors import narrowed


def describe(manifest: Mapping[str, Any], skip: str) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of each tensor, but for those whose names start so."""
    return {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in tensors_of(manifest, skip).items()}


def block_reader(path: Path, manifest: dict) -> Callable[[str], Iterator[Tensor]]:
    """What gives a tensor of a verified checkpoint by its name, some rows after the other, whatever pieces it is in."""
    header_of = functools.cache(functools.partial(check_header, path, manifest))

    def blocks(name: str) -> Iterator[Tensor]:
        entry = manifest["tensors"][name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        rows, *rest = shape or [1]
        step = max(1, BLOCK // max(1, dtype.itemsize * math.prod(rest)))
        for start in range(0, rows, step):
            box = rows_of(Box((0,) * len(shape), tuple(shape)), start, min(start + step, rows))
            block = torch.empty(box.shape, dtype=dtype)
            for file, piece in entry["pieces"].items():
                common = intersection(box, piece)
                if common is not None:
                    place = narrowed(block, *common.within(box))
                    read_rows(path / file, header_of(file)[name], common.within(piece), place)
            yield block

    return blocks


def write_whole(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    blocks: Callable[[str], Iterator[Tensor]],
    state: dict,
) -> None:
    """Fill an uncommitted folder with one file of tensors whose blocks of rows come one after the other.

    Takes the memory of a block. They are written in the dtypes that `tensors` gives.
    """

    def data(name: str) -> Iterator[memoryview]:
        return (byte_view(block.to(tensors[name][0]).contiguous()) for block in blocks(name))

    wholes = {name: [(0, Box((0,) * len(shape), tuple(shape)))] for name, (_, shape) in tensors.items()}
    layout = Layout({name: (dtype, list(shape)) for name, (dtype, shape) in tensors.items()}, wholes)
    shard = file_of(next(iter(tensors)), rank=0)
    write_rest(folder, layout, {shard: write_blocks(folder / shard, tensors, data)}, spell(state), step=0)
