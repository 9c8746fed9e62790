"""A checkpoint that many ranks wrote as one of a single file, a block of rows at a time."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minillm.checkpoint.folder import check_header, write_rest
from minillm.checkpoint.layout import Box, Layout, intersection, rows_of
from minillm.checkpoint.manifest import file_of, files_of, spell
from minillm.checkpoint.shard import BLOCK, DTYPES, byte_view, read_rows, write_blocks
from minillm.tensors import narrowed


def write_whole(folder: Path, path: Path, manifest: Mapping[str, Any], state: dict, skip: str) -> None:
    """Fill an uncommitted folder with the verified checkpoint at `path`, but for the tensors whose names start so.

    Takes the memory of a block, whatever the size of the tensors.
    """
    names = [name for name in manifest["tensors"] if not name.startswith(skip)]
    entries = {name: manifest["tensors"][name] for name in names}
    tensors = {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in entries.items()}
    headers = {file: check_header(path, manifest, file) for file in files_of(manifest, skip)}
    wholes = {name: Box((0,) * len(shape), tuple(shape)) for name, (_, shape) in tensors.items()}

    def blocks(name: str) -> Iterator[memoryview]:
        dtype, shape = tensors[name]
        rows, *rest = shape or [1]
        step = max(1, BLOCK // max(1, dtype.itemsize * math.prod(rest)))
        for start in range(0, rows, step):
            box = rows_of(wholes[name], start, min(start + step, rows))
            block = torch.empty(box.shape, dtype=dtype)
            for file, piece in entries[name]["pieces"].items():
                common = intersection(box, piece)
                if common is not None:
                    place = narrowed(block, *common.within(box))
                    read_rows(path / file, headers[file][name], common.within(piece), place)
            yield byte_view(block)

    layout = Layout(tensors, {name: [(0, box)] for name, box in wholes.items()})
    shard = file_of(names[0], rank=0)
    write_rest(folder, layout, {shard: write_blocks(folder / shard, tensors, blocks)}, spell(state), manifest["step"])
