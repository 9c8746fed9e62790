"""The manifest of a checkpoint: what files it has, what tensors, of which pieces, and the proof of itself."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from minillm.checkpoint.layout import Box, Layout, make_up
from minillm.checkpoint.shard import CODES, DTYPES, MAX_JSON, PLAIN_NAME, parse, read_bytes, require

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIM = "optim."  # tensors named so go into files of their own, so that loading a model never reads them
MAX_DIMS = 8


def spell(value: dict) -> str:
    """JSON that people read: the state, and manifests of the first format."""
    return json.dumps(value, indent=1) + "\n"


def spell_compactly(value: dict) -> str:
    """JSON that may be large: a manifest of a thousand ranks has hundreds of thousands of pieces."""
    return json.dumps(value, separators=(",", ":")) + "\n"


FORMAT = 2
FORMATS: dict[int, Callable[[dict], str]] = {1: spell, FORMAT: spell_compactly}  # those that are read


def make_manifest(layout: Layout, files: dict, step: int) -> bytes:
    """The manifest of what was laid out and written. Raises ValueError where no reader would take one so large."""
    tensors = {
        name: {
            "dtype": CODES[dtype],
            "shape": shape,
            "pieces": [{"file": file_of(name, rank), **box._asdict()} for rank, box in layout.pieces[name]],
        }
        for name, (dtype, shape) in layout.tensors.items()
    }
    data = signed({"format": FORMAT, "step": step, "files": files, "tensors": tensors})
    require(len(data) <= MAX_JSON, f"{len(data)} bytes of manifest: too many pieces; shard over fewer ranks")
    return data


def signed(body: dict) -> bytes:
    """A manifest in the spelling of its format, with the hash over all else in it."""
    return signed_in(FORMATS.get(body["format"], spell_compactly), body)


def signed_in(spelling: Callable[[dict], str], body: dict) -> bytes:
    return spelling({**body, "sha256": hashlib.sha256(spelling(body).encode()).hexdigest()}).encode()


def file_of(name: str, rank: int) -> str:
    """The file in which a rank writes a tensor of that name."""
    return f"{'optim' if name.startswith(OPTIM) else 'model'}-{rank:05d}.safetensors"


def pieces_of(manifest: dict, skip: str | None = None) -> Iterator[tuple[str, str, Box]]:
    """(tensor name, file, place in the whole) of every piece of the tensors that are not skipped."""
    for name, entry in manifest["tensors"].items():
        if not (skip and name.startswith(skip)):
            for piece in entry["pieces"]:
                yield name, piece["file"], Box(tuple(piece["offset"]), tuple(piece["shape"]))


def read_manifest(path: Path) -> dict:
    """The manifest, proved by its own hash, with every field that is relied on later checked."""
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
        for name, entry in manifest["tensors"].items():
            check_tensor(name, entry, manifest["files"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from None
    return manifest


def check_tensor(name: str, entry: dict, files: dict) -> None:
    """Raises ValueError for a tensor whose pieces are not listed, lie outside, overlap or leave gaps."""
    shape, pieces = entry["shape"], entry["pieces"]
    require(entry["dtype"] in DTYPES, f"{name} has an unknown dtype, {entry['dtype']!r}")
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(map(is_size, shape))
    require(is_shape, f"{name} has no shape: {shape}")
    for piece in pieces:
        require(piece["file"] in files, f"{name} is in {piece['file']!r}, which is not listed")
        ranges = zip(piece["offset"], piece["shape"], shape, strict=True)
        inside = all(is_size(a) and is_size(n) and a + n <= size for a, n, size in ranges)
        require(inside, f"a piece of {name} exceeds its shape {shape}")
    boxes = [Box(tuple(piece["offset"]), tuple(piece["shape"])) for piece in pieces]
    require(make_up(shape, boxes), f"the pieces of {name} do not make up its shape {shape}: they overlap or leave gaps")
    in_files = {piece["file"] for piece in pieces}
    require(len(in_files) == len(pieces), f"two pieces of {name} are in one file, which can hold one of that name")


def is_size(number: object) -> bool:
    """Whether it is a whole number from 0 on; true and 1.0 are not."""
    return type(number) is int and number >= 0
