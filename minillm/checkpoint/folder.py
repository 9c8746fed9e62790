"""One checkpoint: a folder of shards and JSON, and the manifest that proves it.

The manifest names every file with its size and sha256, and every tensor with its global shape, its dtype and the
pieces it is made of, each piece being a file and a place in the whole; so many ranks can each write their own pieces
and any number of them can read. It carries its own hash, is written last, and nothing that it does not name is read.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.shard import (
    CODES,
    DTYPES,
    byte_view,
    opened,
    parse,
    read_bytes,
    read_header,
    require,
    write_shard,
)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIM = "optim."  # tensors named so go into files of their own, so that loading a model never reads them
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

logger = logging.getLogger("minillm")


def write(folder: Path, tensors: Mapping[str, Tensor], state: dict, step: int = 0) -> None:
    """Fill an uncommitted folder: shards, state and, last, the manifest of all that is in it."""
    shards: dict[str, dict[str, Tensor]] = {}
    for name, *_ in tied_groups(tensors):  # one memory is stored once, under its first name
        part = "optim" if name.startswith(OPTIM) else "model"
        shards.setdefault(f"{part}-00000.safetensors", {})[name] = tensors[name]
    files, entries = {}, {}
    for file, part in shards.items():
        files[file] = write_shard(folder / file, part)
        for name, tensor in part.items():
            shape = list(tensor.shape)
            piece = {"file": file, "offset": [0] * len(shape), "shape": shape}
            entries[name] = {"dtype": CODES[tensor.dtype], "shape": shape, "pieces": [piece]}
    (folder / STATE).write_bytes(json_bytes(state))
    for path in sorted(folder.iterdir()):  # state.json, and what the caller put there: config.json, a tokenizer
        if path.name not in files:
            with opened(path) as (file, size):
                files[path.name] = {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    body = {"format": FORMAT, "step": step, "files": files, "tensors": entries}
    (folder / MANIFEST).write_bytes(json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}))


def json_bytes(value: dict) -> bytes:
    """The one spelling of our JSON files, so that they can be hashed and compared byte for byte."""
    return json.dumps(value, indent=1).encode() + b"\n"


def tied_groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that stand for the same memory, together, in the order of the first of each."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        # without memory of its own (empty, or on the meta device) only the object itself tells
        held = tensor.numel() and not tensor.is_meta
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        groups.setdefault(place if held else id(tensor), []).append(name)
    return list(groups.values())


def load_tensors(path: str | Path, into: Mapping[str, Tensor], skip: str | None = None) -> dict:
    """Copy a checkpoint's tensors into `into`, in place, once everything about it is verified; returns its state.

    `into` names exactly the stored tensors (but for those that start with `skip`), in their shapes and dtypes.
    Raises ValueError before anything is changed, listing all that is missing, unexpected or different.
    """
    state, manifest = verify(path, skip)
    fill(path, manifest, match_tensors(path, manifest, into, skip))
    return state


def read(path: str | Path) -> tuple[dict, dict]:
    """(state, manifest), each proved by its hash; the shards are not opened. Raises ValueError naming what is wrong."""
    path = Path(path)
    manifest = read_manifest(path)
    data = read_bytes(path / STATE, manifest["files"][STATE]["size"])
    if hashlib.sha256(data).hexdigest() != manifest["files"][STATE]["sha256"]:
        raise ValueError(f"{path / STATE}: not what was saved (its sha256 differs)")
    return parse(path / STATE, data), manifest


def verify(path: str | Path, skip: str | None = None) -> tuple[dict, dict]:
    """`read`, then prove every file by size and sha256 and every tensor by the header of the shard that holds it.

    `skip`: tensors whose names start so are left out, and with them the files that hold nothing else.
    """
    path = Path(path)
    state, manifest = read(path)
    extra = sorted(p.name for p in path.iterdir() if p.name not in manifest["files"] and p.name != MANIFEST)
    if extra:
        logger.warning("%s: not in the manifest and ignored: %s", path, ", ".join(extra))
    pieces = list(pieces_of(manifest, skip))
    unread = {piece["file"] for _, piece in pieces_of(manifest)} - {piece["file"] for _, piece in pieces}
    for name in manifest["files"].keys() - unread:
        entry = manifest["files"][name]
        with opened(path / name, entry["size"]) as (file, _):
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{path / name}: not what was saved (its sha256 differs)")
    headers = {file: read_header(path / file) for file in {piece["file"] for _, piece in pieces}}
    for name, piece in pieces:
        dtype = manifest["tensors"][name]["dtype"]
        if headers[piece["file"]].get(name, (None,))[:2] != (dtype, piece["shape"]):
            raise ValueError(f"{path / piece['file']}: {name} is not as the manifest says, {dtype} {piece['shape']}")
    return state, manifest


def match_tensors(
    path: str | Path, manifest: dict, into: Mapping[str, Tensor], skip: str | None = None
) -> dict[str, Tensor]:
    """The tensor of `into` (perhaps on the meta device) for each stored one.

    Raises ValueError listing every tensor that is missing, unexpected, or of another shape or dtype.
    """
    stored = {name: manifest["tensors"][name] for name in manifest["tensors"] if not (skip and name.startswith(skip))}
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


def fill(path: str | Path, manifest: dict, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a verified checkpoint into what `match_tensors` found for them, a piece at a time."""
    pieces: dict[str, list[tuple[str, dict]]] = {}
    for name, piece in pieces_of(manifest):
        if name in targets:
            pieces.setdefault(piece["file"], []).append((name, piece))
    for file_name, parts in pieces.items():
        header = read_header(Path(path) / file_name)
        with opened(Path(path) / file_name) as (file, _), torch.no_grad():
            for name, piece in parts:
                code, shape, begin, end = header[name]
                target = targets[name].detach()
                for dim, (offset, length) in enumerate(zip(piece["offset"], shape)):
                    target = target.narrow(dim, offset, length)
                in_place = target.device.type == "cpu" and target.is_contiguous()
                data = target if in_place else torch.empty(shape, dtype=DTYPES[code])
                file.seek(begin)
                if file.readinto(byte_view(data)) != end - begin:
                    raise ValueError(f"{Path(path) / file_name}: ends inside {name}; it changed while it was read")
                if not in_place:
                    target.copy_(data)


def pieces_of(manifest: dict, skip: str | None = None) -> Iterator[tuple[str, dict]]:
    """(tensor name, piece) for every piece of the tensors that are not skipped."""
    for name, entry in manifest["tensors"].items():
        if not (skip and name.startswith(skip)):
            for piece in entry["pieces"]:
                yield name, piece


def read_manifest(path: Path) -> dict:
    """The manifest, proved by its own hash, with every field that is relied on later checked."""
    file = path / MANIFEST
    data = read_bytes(file)
    manifest = parse(file, data)
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    sha256 = hashlib.sha256(json_bytes(body)).hexdigest()
    require(json_bytes({**body, "sha256": sha256}) == data, f"{file}: not what was saved (its own sha256 differs)")
    form = manifest.get("format")
    require(form == FORMAT, f"{file}: written in format {form!r}; this version of minillm reads format {FORMAT}")
    try:
        require(STATE in manifest["files"], f"{STATE} is not listed")
        for name, entry in manifest["files"].items():
            require(PLAIN_NAME.fullmatch(name) and name != MANIFEST, f"{name!r} is not a plain file name")
            require(entry["size"] >= 0 and isinstance(entry["sha256"], str), f"{name} has no size or hash")
        for name, entry in manifest["tensors"].items():
            shape, pieces = entry["shape"], entry["pieces"]
            require(entry["dtype"] in DTYPES, f"{name} has an unknown dtype, {entry['dtype']!r}")
            for piece in pieces:
                require(piece["file"] in manifest["files"], f"{name} is in {piece['file']!r}, which is not listed")
                ranges = zip(piece["offset"], piece["shape"], shape, strict=True)
                inside = all(type(a) is int and 0 <= a <= a + n <= size for a, n, size in ranges)
                require(inside, f"a piece of {name} exceeds its shape {shape}")
            covered = sum(math.prod(piece["shape"]) for piece in pieces)
            require(covered == math.prod(shape), f"the pieces of {name} do not make up its shape {shape}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from None
    return manifest
