"""Writes a Hugging Face folder, a block of rows at a time.

config.json                       of the first family that can express the model
generation_config.json            the ids of the tokens that begin, end and pad
model.safetensors                 or, above max_shard_size, model-00001-of-00003.safetensors ... and
model.safetensors.index.json      {metadata: {total_size}, weight_map: {tensor: file}}
tokenizer.json, ...               as minillm/tokenizer/to_hf.py writes them
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.shard import byte_view, write_blocks
from minillm.data.jinja import Exported
from minillm.files import read_json
from minillm.hf.config import choose_family, is_hugging_face
from minillm.hf.generation import GENERATION
from minillm.hf.weights import INDEX, ONE_FILE, lay_out
from minillm.model.config import ModelConfig
from minillm.tokenizer import Tokenizer
from minillm.tokenizer.to_hf import hugging_face_files

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
# How the tokenizer of every Qwen2 and Qwen2.5 cuts a text into words, by its tokenizer.json.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]

logger = logging.getLogger("minillm")


def write(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    blocks: Callable[[str], Iterator[Tensor]],
    max_shard_size: str | int = "5GB",
    chat: Exported | None = None,
) -> None:
    """Fill a folder with a model whose tensors come a block of rows at a time, in the dtypes that `tensors` gives.

    `chat`: the template that it was taught, and the tokens that end its answers.

    Raises ValueError, before anything is written, for a model that no family can express.
    """
    limit = bytes_of(max_shard_size)
    family, values = choose_family(config)
    places, shapes = lay_out(config, family)
    ours: dict[str, list[str]] = {theirs: [] for theirs in shapes}
    for name, place in places.items():
        ours[place.name].append(name)
    theirs: Tensors = {
        name: (reduce(torch.promote_types, (tensors[part][0] for part in parts)), shapes[name])
        for name, parts in ours.items()
    }

    def data(name: str) -> Iterator[memoryview]:
        dtype, _ = theirs[name]
        found = chain.from_iterable(first_rows(blocks(part), places[part].shape[0]) for part in ours[name])
        if places[ours[name][0]].transposed:
            found = iter([torch.cat(list(found)).T])
        return (byte_view(block.to(dtype).contiguous()) for block in found)

    marks = {name: getattr(tokenizer, name.replace("_token", ""), None) for name in MARKS}
    dtype = str(theirs[family.modules["embed"] + ".weight"][0]).removeprefix("torch.")
    write_json(folder / "config.json", values | marks | {"torch_dtype": dtype})
    ends = list(dict.fromkeys([*chat.stop_ids, marks["eos_token_id"]])) if chat else marks["eos_token_id"]
    write_json(folder / GENERATION, marks | {"eos_token_id": ends})
    if tokenizer is not None:
        files = hugging_face_files(tokenizer, config.max_seq_len, chat.jinja if chat else None)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if family.model_type == "qwen2" and not cuts_as_qwen2(files["tokenizer.json"]):
            logger.warning(
                "the tokenizer cuts words otherwise than Qwen2's, which AutoTokenizer of transformers 5 makes of any "
                "that is beside a qwen2; PreTrainedTokenizerFast.from_pretrained reads it as it is"
            )
    write_shards(folder, theirs, data, limit)


def cuts_as_qwen2(description: str) -> bool:
    """Whether a tokenizer.json cuts a text into words as that of every Qwen2 does."""
    return json.dumps(QWEN2_WORDS) in json.dumps(json.loads(description)["pre_tokenizer"])


def copy_generation_config(source: Path, folder: Path) -> None:
    """What a folder says about drawing texts from its model goes with it, also by way of a folder of ours."""
    if (source / GENERATION).exists():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    elif is_hugging_face(source):  # then they stand in config.json, of which a folder of ours keeps the shape alone
        given = {name: value for name, value in read_json(source / "config.json").items() if name in MARKS}
        if given.get("eos_token_id") is not None:
            write_json(folder / GENERATION, given)


def first_rows(blocks: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """The blocks up to a number of rows: those that pad the vocabulary come after it."""
    for block in blocks:
        yield block[:rows]
        rows -= len(block[:rows])


def write_shards(folder: Path, tensors: Tensors, data: Callable[[str], Iterator[memoryview]], limit: int) -> None:
    """Write tensors to as many files as it takes for none to be larger than `limit`, unless one tensor alone is."""
    shards: list[Tensors] = [{}]
    for name, described in tensors.items():
        if shards[-1] and sum(map(size_of, shards[-1].values())) + size_of(described) > limit:
            shards.append({})
        shards[-1][name] = described
    if len(shards) == 1:
        write_blocks(folder / ONE_FILE, tensors, data)
        return
    files = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_blocks(folder / file, shard, data)
        files |= dict.fromkeys(shard, file)
    total = sum(map(size_of, tensors.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def size_of(described: tuple[torch.dtype, Sequence[int]]) -> int:
    """Bytes of a tensor of that dtype and shape."""
    dtype, shape = described
    return dtype.itemsize * math.prod(shape)


def bytes_of(size: str | int) -> int:
    """5GB, 500MB, 2GiB or a plain number of bytes -> the number of bytes."""
    match = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in UNITS or match[1].count(".") > 1 or not float(match[1]):
        raise ValueError(f"max_shard_size: {size!r} is no size; write it as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
