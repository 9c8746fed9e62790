"""The weights of a Hugging Face folder: which of its tensors is which of ours, and how to read any part of one.

    model.safetensors                                    one file, or
    model.safetensors.index.json  {weight_map: {tensor: file}}  and the files it names

What is there is held against what the model needs, by the headers alone, before memory is taken for a weight. Then a
part of a tensor is read at a time, straight to where it belongs.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.checkpoint.layout import Box
from minillm.checkpoint.shard import BLOCK, DTYPES, PLAIN_NAME, parse, read_bytes, read_header, read_rows
from minillm.hf.config import read_family
from minillm.hf.families import Family
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tensors import local_part, parameter_names

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
FLOATS = ("F64", "F32", "BF16", "F16")


class Place(NamedTuple):
    """Where one of our parameters lies in a family's files."""

    name: str  # of the tensor there
    offset: tuple[int, ...]  # where in it the parameter begins
    shape: tuple[int, ...]  # of the parameter, without rows that pad the vocabulary
    transposed: bool

    def part(self, box: Box) -> Box:
        """Where a part of the parameter lies in the tensor."""
        offset, shape = (box.offset[::-1], box.shape[::-1]) if self.transposed else box
        return Box(tuple(a + b for a, b in zip(self.offset, offset)), shape)


class Found(NamedTuple):
    """A tensor in a file."""

    path: Path
    entry: tuple[str, list[int], int, int]  # as in a Header


class Source(NamedTuple):
    """One of our parameters in a file."""

    found: Found
    place: Place


def lay_out(config: ModelConfig, family: Family) -> tuple[dict[str, Place], dict[str, tuple[int, ...]]]:
    """The place of each of our parameters, tied ones once, and the shape of each tensor of theirs."""
    with torch.device("meta"):
        parameters = parameter_names(Transformer(config))
    places: dict[str, Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters.items():
        theirs, shape = their_name(name, family), tuple(parameter.shape)
        if name in ("embed.weight", "lm_head.weight"):
            shape = (config.vocab_size, *shape[1:])  # rows that pad it are ours alone
        before = shapes.get(theirs, (0,))[0]  # counted along our rows
        transposed = family.transposed and len(shape) == 2 and name.startswith("blocks.")
        places[name] = Place(theirs, ((0, before) if transposed else (before, 0))[: len(shape)], shape, transposed)
        shapes[theirs] = (before + shape[0], *shape[1:])
    turned = {place.name for place in places.values() if place.transposed}
    return places, {name: shape[::-1] if name in turned else shape for name, shape in shapes.items()}


def their_name(name: str, family: Family) -> str:
    """blocks.3.attn.q_proj.weight -> model.layers.3.self_attn.q_proj.weight."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"\d+", module)
    theirs = family.modules[re.sub(r"\d+", "{}", module)]
    return f"{theirs.format(number and number[0])}.{kind}"


# --- what is there ----------------------------------------------------------------------------------------------------


def find_tensors(folder: Path) -> dict[str, Found]:
    """Every tensor in a folder's files, from their headers. Raises ValueError for files that are missing or damaged."""
    if (folder / ONE_FILE).exists():
        return tensors_of(folder / ONE_FILE)
    index = read_index(folder)
    found: dict[str, Found] = {}
    for file in sorted(set(index.values())):
        found |= tensors_of(folder / file)
    if absent := sorted(index.keys() - found.keys()):
        raise ValueError(f"{folder / INDEX}: lists what its files do not hold: {listed(absent)}")
    return found


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, where there are several files."""
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder}: has no weights; {no_weights(folder)}")
    index = parse(folder / INDEX, read_bytes((folder / INDEX).resolve())).get("weight_map")
    plain = isinstance(index, dict) and all(isinstance(f, str) and PLAIN_NAME.fullmatch(f) for f in index.values())
    if not plain:
        raise ValueError(f"{folder / INDEX}: its weight_map does not name a file of this folder for each tensor")
    return index


def weight_files(folder: Path) -> list[str]:
    """The names of the files that a folder's weights are in."""
    return [ONE_FILE] if (folder / ONE_FILE).exists() else sorted(set(read_index(folder).values()))


def tensors_of(path: Path) -> dict[str, Found]:
    """The tensors of one file. In the cache of the hub it is a link, so that it is followed here."""
    path = path.resolve()
    return {name: Found(path, entry) for name, entry in read_header(path).items()}


def no_weights(folder: Path) -> str:
    """What to do about a folder without files that can be read."""
    old = next((file for file in OLD_FILES if (folder / file).exists()), None)
    if old is None:
        return f"looked for {ONE_FILE} and {INDEX}"
    return (
        f"to read {old} may run any code that is in it, so minillm does not. Where you trust it, convert it with "
        "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
    )


def find_sources(folder: Path, config: ModelConfig) -> dict[str, Source]:
    """Where each of our parameters is. Raises ValueError listing all that is missing, unexpected or different."""
    family = read_family(folder)
    places, shapes = lay_out(config, family)
    found = with_prefix(find_tensors(folder), family)
    head, embed = family.modules["lm_head"] + ".weight", family.modules["embed"] + ".weight"
    spare = found.pop(head, None) if config.tie_embeddings else None  # the embedding once more, as old files have it
    kept = {name for name in found if not name.endswith(family.buffers)}
    different = [
        f"{name} is {found[name].entry[0]} {found[name].entry[1]}, {list(shapes[name])} of floats is expected"
        for name in shapes.keys() & found.keys()
        if tuple(found[name].entry[1]) != shapes[name] or found[name].entry[0] not in FLOATS
    ]
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "not of this model": sorted(kept - shapes.keys()),
        "different": sorted(different),
    }
    lines = [f"\n  {len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]
    if lines:
        raise ValueError(f"{folder}: its weights are not those that its config.json describes:{''.join(lines)}")
    if spare is not None and not same_content(spare, found[embed]):
        raise ValueError(
            f"{folder}: {head} differs from {embed}, but config.json says tie_word_embeddings; "
            "set that to false if the two are to stay apart"
        )
    return {name: Source(found[place.name], place) for name, place in places.items()}


def with_prefix(found: dict[str, Found], family: Family) -> dict[str, Found]:
    """The tensors under their full names, also where the model was saved without its head."""
    if any(name.startswith(family.prefix) for name in found):
        return found
    return {name if name.startswith("lm_head.") else family.prefix + name: tensor for name, tensor in found.items()}


def same_content(a: Found, b: Found) -> bool:
    """Whether two stored tensors are the same, compared a block at a time."""
    if a.entry[:2] != b.entry[:2]:
        return False
    rows, *rest = a.entry[1]
    step = rows_at_a_time(a)
    boxes = (Box((start, 0), (min(step, rows - start), *rest)) for start in range(0, rows, step))
    return all(torch.equal(read_part(a, box), read_part(b, box)) for box in boxes)


def rows_at_a_time(found: Found) -> int:
    return max(1, BLOCK // max(1, math.prod(found.entry[1][1:]) * DTYPES[found.entry[0]].itemsize))


def listed(names: Sequence[str]) -> str:
    """The first twenty."""
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_part(found: Found, box: Box) -> Tensor:
    """A part of a stored tensor, as it is stored."""
    part = torch.empty(box.shape, dtype=DTYPES[found.entry[0]])
    read_rows(found.path, found.entry, box, part)
    return part


def describe(sources: Mapping[str, Source]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of each of our parameters."""
    return {name: (DTYPES[source.found.entry[0]], list(source.place.shape)) for name, source in sources.items()}


@torch.no_grad()
def fill(sources: Mapping[str, Source], parameters: Mapping[str, Tensor]) -> None:
    """Read into each parameter what this rank holds of it, in the dtype that it has."""
    for name, parameter in parameters.items():
        found, place = sources[name]
        part, offset = local_part(parameter.detach())
        into = part.T if place.transposed else part
        read_rows(found.path, found.entry, place.part(Box(offset, tuple(part.shape))), into)


def blocks(sources: Mapping[str, Source], name: str) -> Iterator[Tensor]:
    """One parameter, some of its rows after the other; all at once where it is stored transposed."""
    found, place = sources[name]
    rows, *rest = place.shape
    step = rows if place.transposed else rows_at_a_time(found)
    for start in range(0, rows, step):
        box = Box((start, *(0 for _ in rest)), (min(step, rows - start), *rest))
        part = read_part(found, place.part(box))
        yield part.T if place.transposed else part
