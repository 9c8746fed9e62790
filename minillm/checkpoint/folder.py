"""One checkpoint: a folder of shards and JSON, and the manifest that proves it.

The manifest names every file with its size and sha256, and every tensor with its global shape, its dtype and the
pieces it is made of, each piece being a file and a place in the whole; so many ranks each write their own pieces, and
any number of them can read. It carries its own hash, is written last, and nothing that it does not name is read.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minillm.checkpoint.layout import Box, Layout, held_here, intersection, lay_out, own_pieces, tied_groups
from minillm.checkpoint.manifest import (
    MANIFEST,
    STATE,
    file_of,
    files_of,
    make_manifest,
    read_manifest,
    spell,
    tensors_of,
)
from minillm.checkpoint.ranks import ALONE, on_every_rank, on_main
from minillm.checkpoint.shard import (
    DTYPES,
    Header,
    file_hash,
    opened,
    parse,
    read_bytes,
    read_header,
    read_rows,
    require,
    write_shard,
)
from minillm.distributed.context import Context
from minillm.files import fsync_directory
from minillm.tensors import local_part, narrowed

logger = logging.getLogger("minillm")


# --- writing ----------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Mapping[str, Tensor], state: dict, step: int = 0, dist: Context = ALONE) -> None:
    """Fill an uncommitted folder: shards, state and, last, the manifest of all that is in it.

    Every rank writes its own shards; rank 0 the rest, once those of all are on the disk.
    """
    layout = lay_out(held_here(tensors), dist)
    write_pieces(folder, layout, own_pieces(layout, tensors, dist.rank), spell(state), step, dist)


def write_pieces(
    folder: Path,
    layout: Layout,
    own: Mapping[str, Tensor],
    state: str,
    step: int,
    dist: Context,
    at: Path | None = None,
) -> None:
    """`write`, of what was laid out before; `own` is what this rank writes of it, `state` the spelled state.

    `at`: what the folder will be called, for errors.
    """
    written = on_every_rank(dist, lambda: write_shards(folder, own, dist.rank), at)
    files = {name: entry for shards in written for name, entry in shards.items()}
    on_main(dist, lambda: write_rest(folder, layout, files, state, step), at)


def write_rest(folder: Path, layout: Layout, files: Mapping[str, dict], state: str, step: int) -> None:
    """Write what there is beside the shards (`files`: their sizes and hashes): the state and, last, the manifest."""
    files = dict(files)
    (folder / STATE).write_text(state, encoding="utf-8")
    for path in sorted(folder.iterdir()):  # state.json, and what the caller put there: config.json, a tokenizer
        if path.name not in files:
            files[path.name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    (folder / MANIFEST).write_bytes(make_manifest(layout, files, step))


def write_shards(folder: Path, own: Mapping[str, Tensor], rank: int) -> dict[str, dict]:
    """Write a rank's pieces and see them on the disk; size and sha256 of each file."""
    shards: dict[str, dict[str, Tensor]] = {}
    for name, piece in own.items():
        shards.setdefault(file_of(name, rank), {})[name] = piece
    entries = {file: write_shard(folder / file, pieces) for file, pieces in shards.items()}
    fsync_directory(folder)
    return entries


# --- proving ----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> tuple[dict, dict]:
    """(state, manifest), each proved by its hash; the shards are not opened. Raises ValueError naming what is wrong."""
    path = Path(path)
    manifest = read_manifest(path)
    data = read_bytes(path / STATE, manifest["files"][STATE]["size"])
    if hashlib.sha256(data).hexdigest() != manifest["files"][STATE]["sha256"]:
        raise ValueError(f"{path / STATE}: not what was saved (its sha256 differs)")
    return parse(path / STATE, data), manifest


def verify(path: str | Path, skip: str | None = None, dist: Context = ALONE, hashed: bool = False) -> tuple[dict, dict]:
    """`read`, then prove every file by size and sha256 and every tensor by the header of the shard that holds it.

    The files are dealt out to the ranks, so that each is read once; what is wrong with one is an error on all.
    `skip`: tensors whose names start so are left out, and with them the files that hold nothing else. `hashed`: these
    ranks have proved the files by sha256 before, which holds.
    """
    path = Path(path)
    found: list[tuple[dict, dict]] = []

    def prove() -> str:
        state, manifest = read(path)
        extra = sorted(p.name for p in path.iterdir() if p.name not in manifest["files"] and p.name != MANIFEST)
        if extra and dist.is_main:
            logger.warning("%s: not in the manifest and ignored: %s", path, ", ".join(extra))
        unread = files_of(manifest) - files_of(manifest, skip)
        sizes = {name: entry["size"] for name, entry in manifest["files"].items() if name not in unread}
        own = share_of(sizes, dist)
        for name in own:
            size, sha256 = manifest["files"][name]["size"], manifest["files"][name]["sha256"]
            same = hashed or file_hash(path / name, size) == sha256
            require(same, f"{path / name}: not what was saved (its sha256 differs)")
        for file in files_of(manifest).intersection(own):
            check_header(path, manifest, file)
        found.append((state, manifest))
        return manifest["sha256"]

    hashes = on_every_rank(dist, prove)
    require(len(set(hashes)) == 1, f"{path}: the ranks see different checkpoints there; is the directory shared?")
    return found[0]


def share_of(sizes: Mapping[str, int], dist: Context) -> list[str]:
    """The files that this rank proves: each, from the largest on, goes to the rank that has the fewest bytes so far."""
    loads = [0] * dist.world_size
    own = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name] + 1  # empty ones are dealt out too
        if rank == dist.rank:
            own.append(name)
    return own


def check_header(path: Path, manifest: dict, file: str) -> Header:
    """The header of a shard, each tensor that is to be in it being there as the manifest says, or ValueError."""
    with opened(path / file, manifest["files"][file]["size"]):  # of the right size
        header = read_header(path / file)
    for name, entry in manifest["tensors"].items():
        if file in entry["pieces"]:
            dtype, shape = entry["dtype"], list(entry["pieces"][file].shape)
            as_said = header.get(name, (None,))[:2] == (dtype, shape)
            require(as_said, f"{path / file}: {name} is not as the manifest says, {dtype} {shape}")
    return header


# --- reading ----------------------------------------------------------------------------------------------------------


def load_tensors(
    path: str | Path,
    into: Mapping[str, Tensor],
    skip: str | None = None,
    dist: Context = ALONE,
    hashed: bool = False,
) -> dict:
    """Copy a checkpoint's tensors into `into`, in place, once everything about it is verified; returns its state.

    `into` names exactly the stored tensors (but for those that start with `skip`), in their shapes and dtypes; of a
    sharded one, each rank reads the part that it holds. However many ranks wrote the checkpoint, and however they had
    sharded it: any other may read it. Raises ValueError, on every rank, before anything is changed on any, listing all
    that is missing, unexpected or different. `hashed`: as for `verify`.
    """
    state, manifest = verify(path, skip, dist, hashed)
    matched: list[dict[str, Tensor]] = []

    def match() -> None:
        targets = match_tensors(path, manifest, into, skip)
        for file in {file for _, file, *_ in reads(manifest, targets)}:
            check_header(Path(path), manifest, file)
        matched.append(targets)

    on_every_rank(dist, match)
    on_every_rank(dist, lambda: fill(path, manifest, matched[0]))
    return state


def match_tensors(
    path: str | Path, manifest: dict, into: Mapping[str, Tensor], skip: str | None = None
) -> dict[str, Tensor]:
    """The tensor of `into` (perhaps on the meta device) for each stored one.

    Raises ValueError listing every tensor that is missing, unexpected, or of another shape or dtype.
    """
    stored = tensors_of(manifest, skip)
    targets, missing, different = {}, [], []
    for group in tied_groups(into):
        name = next((name for name in group if name in stored), None)
        if name is None:
            missing.append(group[0])
            continue
        targets[name] = into[name]
        there = f"{tuple(stored[name]['shape'])} {DTYPES[stored[name]['dtype']]}"
        here = f"{tuple(into[name].shape)} {into[name].dtype}"
        if there != here:
            different.append(f"{name} is {there} in the checkpoint, {here} in the model")
    unexpected = [name for name in stored if name not in into]
    problems = {"missing in the checkpoint": missing, "not in the model": unexpected, "different": different}
    lines = [
        f"\n  {len(names)} {what}: {', '.join(names[:20])}{', ...' * (len(names) > 20)}"
        for what, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(f"{path}: does not fit this model; was it made with another config?{''.join(lines)}")
    return targets


def reads(manifest: dict, targets: Mapping[str, Tensor]) -> list[tuple[str, str, Box, Box]]:
    """(tensor name, file, the piece in it, what this rank needs of the piece), for all that it needs."""
    found = []
    needed: dict[tuple[int, Box], list[tuple[str, Box, Box]]] = {}
    for name, target in targets.items():
        part, offset = local_part(target)
        own, pieces = Box(offset, tuple(part.shape)), manifest["tensors"][name]["pieces"]
        key = id(pieces), own  # pieces may be many, but tensors of the same cut share them
        if key not in needed:
            common = ((file, box, intersection(box, own)) for file, box in pieces.items())
            needed[key] = [each for each in common if each[2] is not None]
        found += [(name, *each) for each in needed[key]]
    return found


@torch.no_grad()
def fill(path: str | Path, manifest: dict, targets: Mapping[str, Tensor]) -> None:
    """Copy a verified checkpoint into what `match_tensors` found for its tensors: of each, what this rank holds."""
    headers: dict[str, Header] = {}
    for name, file, box, common in reads(manifest, targets):
        if file not in headers:
            headers[file] = read_header(Path(path) / file)
        part, offset = local_part(targets[name].detach())
        place = narrowed(part, *common.within(Box(offset, tuple(part.shape))))
        read_rows(Path(path) / file, headers[file][name], common.within(box), place)
