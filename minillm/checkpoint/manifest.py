"""The manifest of a checkpoint: what files it has, what tensors, of which pieces, and the proof of itself.

Blocks are alike, and so are a parameter and its moments. So how tensors are cut into pieces is said once, and each
tensor says which of these cuts is its own:

    cuts     [{shape: [8, 4], pieces: [[0, [0, 0], [4, 4]], [1, [4, 0], [4, 4]]]}, ...]   rank, offset, shape
    tensors  {weight: {dtype: F32, cut: 0}, optim.exp_avg.weight: {dtype: F32, cut: 0}, ...}
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.checkpoint.layout import Box, Layout, make_up
from minillm.checkpoint.shard import CODES, DTYPES, MAX_JSON, PLAIN_NAME, parse, read_bytes, require

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIM = "optim."  # tensors named so go into files of their own, so that loading a model never reads them
TENSORS = ""  # all tensors are named so: what is skipped where only config and tokenizer are wanted
MAX_DIMS = 8
MAX_CORNERS = 2**22  # of the pieces of one tensor: those of a matrix cut for a million ranks
MAX_PIECES = 2**26  # of all tensors: 405B parameters under AdamW on 16,384 ranks have 56 million


def spell(value: dict) -> str:
    """JSON that people read: the state, and manifests of the first format."""
    return json.dumps(value, indent=1) + "\n"


def spell_compactly(value: dict) -> str:
    """JSON that may be large: a manifest of a thousand ranks has thousands of pieces and files."""
    return json.dumps(value, separators=(",", ":")) + "\n"


FORMAT = 3
FORMATS: dict[int, Callable[[dict], str]] = {1: spell, 2: spell_compactly, FORMAT: spell_compactly}  # what is read


def make_manifest(layout: Layout, files: dict, step: int) -> bytes:
    """The manifest of what was laid out and written. Raises ValueError where no reader would take one so large.

    That is far off: 70B parameters under AdamW, sharded over 1,024 ranks, take 0.6 MiB of the 64 that are read.
    """
    numbers: dict[tuple, int] = {}
    tensors = {}
    for name, (dtype, shape) in layout.tensors.items():
        cut = (tuple(shape), tuple(layout.pieces[name]))
        tensors[name] = {"dtype": CODES[dtype], "cut": numbers.setdefault(cut, len(numbers))}
    cuts = [{"shape": shape, "pieces": [(rank, *box) for rank, box in pieces]} for shape, pieces in numbers]
    data = signed({"format": FORMAT, "step": step, "files": files, "cuts": cuts, "tensors": tensors})
    count = sum(map(len, layout.pieces.values()))
    fits = count <= MAX_PIECES and len(data) <= MAX_JSON
    require(fits, f"{count} pieces, {len(data)} bytes of manifest: more than is read; shard over fewer ranks")
    return data


def signed(body: dict) -> bytes:
    """A manifest in the spelling of its format, with the hash over all else in it."""
    return signed_in(FORMATS.get(body["format"], spell_compactly), body)


def signed_in(spelling: Callable[[dict], str], body: dict) -> bytes:
    return spelling({**body, "sha256": hashlib.sha256(spelling(body).encode()).hexdigest()}).encode()


def file_of(name: str, rank: int) -> str:
    """The file in which a rank writes a tensor of that name."""
    return file_name(kind_of(name), rank)


def kind_of(name: str) -> str:
    """What kind of tensor it is, after which its files are named."""
    return "optim" if name.startswith(OPTIM) else "model"


def file_name(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def files_of(manifest: dict, skip: str | None = None) -> set[str]:
    """The files that hold a piece of a tensor, of those that are not skipped."""
    return set().union(*(entry["pieces"] for entry in tensors_of(manifest, skip).values()))


def tensors_of(manifest: dict, skip: str | None = None) -> dict[str, dict]:
    """The tensors whose names do not start with `skip`."""
    tensors = manifest["tensors"]
    return {name: tensors[name] for name in tensors if skip is None or not name.startswith(skip)}


def read_manifest(path: Path) -> dict:
    """The manifest, proved by its own hash, with every field that is relied on later checked.

    In whatever format it was written, each of its tensors has a dtype, a shape, and pieces: {file: place in the whole}.
    """
    file = path / MANIFEST
    data = read_bytes(file)
    manifest = parse(file, data)
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    form = manifest.get("format")
    is_known = type(form) is int and form in FORMATS
    spellings = [FORMATS[form]] if is_known else FORMATS.values()
    intact = any(signed_in(spelling, body) == data for spelling in spellings)
    require(intact, f"{file}: not what was saved (its own sha256 differs)")
    require(is_known, f"{file}: written in format {form!r}; this version of minillm reads format {FORMAT} and older")
    try:
        require(STATE in manifest["files"], f"{STATE} is not listed")
        for name, entry in manifest["files"].items():
            require(PLAIN_NAME.fullmatch(name) and name != MANIFEST, f"{name!r} is not a plain file name")
            require(is_size(entry["size"]) and isinstance(entry["sha256"], str), f"{name} has no size or hash")
        manifest["tensors"] = tensors_by_cut(manifest) if form == FORMAT else tensors_one_by_one(manifest)
        for name, entry in manifest["tensors"].items():
            require(entry["dtype"] in DTYPES, f"{name} has an unknown dtype, {entry['dtype']!r}")
        unlisted = sorted(files_of(manifest) - manifest["files"].keys())
        require(not unlisted, f"there are pieces in {unlisted[:1]}, which is not listed")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from None
    return manifest


def tensors_by_cut(manifest: dict) -> dict[str, dict]:
    """What format 3 says of the tensors, whose cuts it takes out; those of the same cut share their pieces."""
    cuts, tensors = manifest.pop("cuts"), manifest["tensors"]
    for i, cut in enumerate(cuts):
        require(all(is_size(rank) for rank, *_ in cut["pieces"]), f"a piece of cut {i} is of no rank")
    pieces = [checked_pieces(f"cut {i}", cut["shape"], cut["pieces"]) for i, cut in enumerate(cuts)]
    for name, entry in tensors.items():
        is_there = is_size(entry["cut"]) and entry["cut"] < len(cuts)
        require(is_there, f"{name} has cut {entry['cut']!r} of {len(cuts)}")
    count = sum(len(pieces[entry["cut"]]) for entry in tensors.values())
    require(count <= MAX_PIECES, f"{count} pieces are more than any run makes")

    @functools.cache
    def in_files(kind: str, cut: int) -> dict[str, Box]:
        return {file_name(kind, rank): box for rank, box in pieces[cut].items()}

    return {
        name: {
            "dtype": entry["dtype"],
            "shape": cuts[entry["cut"]]["shape"],
            "pieces": in_files(kind_of(name), entry["cut"]),
        }
        for name, entry in tensors.items()
    }


def tensors_one_by_one(manifest: dict) -> dict[str, dict]:
    """What the formats before it say: each tensor has pieces of its own, and each piece the name of its file."""
    tensors = {}
    for name, entry in manifest["tensors"].items():
        pieces = [(piece["file"], piece["offset"], piece["shape"]) for piece in entry["pieces"]]
        tensors[name] = entry | {"pieces": checked_pieces(name, entry["shape"], pieces)}
    return tensors


def checked_pieces(what: str, shape: list[int], pieces: list) -> dict[Any, Box]:
    """The pieces that make up a shape, by what comes first in each: the rank that wrote it, or the file that it is in.

    Raises ValueError where they lie outside, overlap or leave gaps, and where two of them are in one file.
    """
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(map(is_size, shape))
    require(is_shape, f"{what} has no shape: {shape}")
    require(len(pieces) << len(shape) <= MAX_CORNERS, f"{what} has {len(pieces)} pieces, more than any run makes")
    boxes = {}
    for holder, offset, size in pieces:
        ranges = zip(offset, size, shape, strict=True)
        inside = all(is_size(a) and is_size(n) and a + n <= whole for a, n, whole in ranges)
        require(inside, f"a piece of {what} exceeds its shape {shape}")
        require(holder not in boxes, f"two pieces of {what} are in one file, which can hold one of that name")
        boxes[holder] = Box(tuple(offset), tuple(size))
    fits = make_up(shape, boxes.values())
    require(fits, f"the pieces of {what} do not make up its shape {shape}: they overlap or leave gaps")
    return boxes


def is_size(number: object) -> bool:
    """Whether it is a whole number from 0 on; true and 1.0 are not."""
    return type(number) is int and number >= 0
