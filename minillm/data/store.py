"""Prepared tokens on disk: what is written, how it is read back, and how damage is noticed.

    index.json            what everything is made from, and the size and sha256 of each file below
    train-00000.npy ...   token ids, uint16 or uint32; all but the last shard are equally long
    train-offsets.npy     int64, n_documents + 1: document i is tokens offsets[i] .. offsets[i + 1] - 1
    train-trained.npy     of conversations: uint8 a token, 1 where it is learned
    train-branches.npy    of preferences instead: twice the branch it is in, 1 more where it is learned (data/rows.py)
    train-sources.npy     (file, line) of each document: a row of `files` in the index, and the line where it starts
    val-...               the same for what is held out

Everything is plain .npy and memory-mapped: opening costs no memory, and numpy.load reads each file.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.files import read_json, sha256

FORMAT = "minillm tokens 1"
BEGINNING = re.compile(rb'\s*\{\s*"format"\s*:\s*"minillm tokens ')  # of an index.json of ours
REPORT = re.compile(rb'\s*\{\s*"format"\s*:\s*"minillm clean ')  # of a report.json of ours
SOURCE = np.dtype([("file", "<u4"), ("line", "<u8")])
SMALL = 2**26  # bytes: tokens up to 64 MiB are verified in full at every open, some 0.1 s
SAMPLES = 16  # of larger ones, so many pages of each shard are looked at
PAGE = 2048  # tokens
MARKS = ("trained", "branches")  # files with a byte a token, of which a split has one or none
STRIDE = 2**22  # items looked at together, so that checking needs little memory


class TokenStore:
    """The documents of one split as one long array of tokens; each document is bos, its tokens, eos."""

    def __init__(self, directory: Path, split: str, index: dict):
        entry = index["splits"][split]
        self.directory, self.split = directory, split
        self.n_tokens: int = entry["n_tokens"]
        self.n_documents: int = entry["n_documents"]
        self.n_bytes: int = entry["n_bytes"]  # of text as UTF-8, which is what bits per byte divides by
        self.n_chars: int = entry["n_chars"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer"]["hash"]
        self.fingerprint: str = index["fingerprint"]
        self.files = [file["path"] for file in index["files"]]
        self.shards = [open_array(directory, shard) for shard in entry["shards"]]
        self.shard_tokens = len(self.shards[0])
        self.document_offsets = open_array(directory, entry["offsets"])
        self.sources = open_array(directory, entry["sources"])
        self.branched = "branches" in entry
        self.marks = next((open_array(directory, mark) for mark in marks_of(entry)), None)
        self.logprobs: np.ndarray | None = None

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, in the stored type: a view of the file, a copy only where shards meet."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        first, last = start // self.shard_tokens, max(start, stop - 1) // self.shard_tokens
        if first == last:
            base = first * self.shard_tokens
            return self.shards[min(first, len(self.shards) - 1)][start - base : stop - base]
        parts = []
        for number in range(first, last + 1):
            base = number * self.shard_tokens
            parts.append(self.shards[number][max(start - base, 0) : stop - base])
        return np.concatenate(parts)

    def trained(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the tokens start .. stop - 1 are learned, uint8; None where all are."""
        return None if self.marks is None else self.marks[start:stop] & 1

    def branches(self, start: int, stop: int) -> np.ndarray | None:
        """The branch that each of the tokens start .. stop - 1 is in, uint8; None where documents are no trees."""
        return self.marks[start:stop] >> 1 if self.branched else None

    def reference(self, start: int, stop: int) -> np.ndarray | None:
        """log p of the tokens start .. stop - 1 under a reference, each given what it follows; None where not given."""
        return None if self.logprobs is None else self.logprobs[start:stop]

    def give_reference(self, logprobs: np.ndarray) -> None:
        """Have `reference` read these, one a token; of those that are not learned nothing is asked."""
        if logprobs.shape != (self.n_tokens,) or logprobs.dtype != np.float32:
            found = f"{logprobs.dtype} {logprobs.shape}, expected float32 ({self.n_tokens},)"
            raise ValueError(f"{self.directory}: log-probabilities of another text: {found}")
        self.logprobs = logprobs

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, bos and eos included."""
        start, stop = self.document_offsets[number : number + 2].tolist()
        return self.tokens(start, stop)

    def source(self, document: int) -> str:
        """Where a document starts: `file:line`."""
        file, line = self.sources[document].item()
        return f"{self.files[file]}:{line}"


class Prepared(NamedTuple):
    """Tokens ready to train on; `info` is the index."""

    train: TokenStore
    val: TokenStore | None
    info: dict
    directory: Path


# --- reading ----------------------------------------------------------------------------------------------------------


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a folder of prepared tokens, damaged ones included; another index.json is somebody's text."""
    index = Path(path) / "index.json"
    if not index.is_file():
        return False
    with open(index, "rb") as file:
        return BEGINNING.match(file.read(100)) is not None


def is_cleaned(path: str | Path) -> bool:
    """Whether a path is a folder that `data clean` has written; another report.json is somebody's text."""
    report = Path(path) / "report.json"
    if not report.is_file():
        return False
    with open(report, "rb") as file:
        return REPORT.match(file.read(100)) is not None


def open_prepared(directory: str | Path, tokenizer_hash: str | None = None) -> Prepared:
    """Open prepared tokens, refusing what is damaged or, where a hash is given, made by another tokenizer.

    Sizes and headers are always checked; the content in full up to SMALL bytes, beyond that the ids of a few pages.
    `verify` checks everything.
    """
    directory = Path(directory)
    index = read_index(directory)
    if tokenizer_hash is not None and tokenizer_hash != index["tokenizer"]["hash"]:
        raise ValueError(
            f"{directory}: prepared with another tokenizer (hash {index['tokenizer']['hash']}) than the one given "
            f"(hash {tokenizer_hash}); give that tokenizer, or prepare the text again with this one"
        )
    stores = {split: TokenStore(directory, split, index) for split in index["splits"]}
    small = sum(shard["size"] for entry in index["splits"].values() for shard in entry["shards"]) <= SMALL
    problems = list(damage(directory, index) if small else sampled_damage(stores, index))
    if problems:
        raise ValueError("\n".join(problems))
    return Prepared(stores["train"], stores.get("val"), index, directory)


def verify(directory: str | Path) -> None:
    """Read everything: ids, offsets, hashes. Raises ValueError with all that is wrong, one a line."""
    directory = Path(directory)
    index = read_index(directory)
    for split in index["splits"]:
        TokenStore(directory, split, index)
    problems = list(damage(directory, index))
    if problems:
        raise ValueError("\n".join(problems))


def read_index(directory: Path) -> dict:
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; `minillm data prepare` makes one")
    if not (directory / "index.json").exists():
        raise ValueError(f"{directory}: no prepared tokens there (no index.json); `minillm data prepare` makes them")
    index = read_json(directory / "index.json")
    if index.get("format") != FORMAT:
        found = f"format {index.get('format')!r}, expected {FORMAT!r}"
        raise ValueError(f"{directory}/index.json: {found}; prepare the text again")
    if index.get("hash") != json_hash(index):
        raise ValueError(f"{directory}/index.json: changed since it was written; {advice(directory)}")
    return index


def json_hash(content: dict) -> str:
    """The hash that an index, or another JSON object of ours, carries of everything else in it."""
    rest = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_array(directory: Path, entry: dict) -> np.ndarray:
    """A .npy file, memory-mapped, after a look at its size and header."""
    path = directory / entry["file"]
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing; {advice(directory)}")
    size = path.stat().st_size
    if size != entry["size"]:
        what = "truncated" if size < entry["size"] else "not the one that was prepared"
        raise ValueError(f"{path}: the file is {what}: {size:,} bytes, expected {entry['size']:,}; {advice(directory)}")
    try:
        array = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{path}: the header is damaged: {error}; {advice(directory)}") from None
    if array.shape != (entry["length"],) or array.dtype != np.dtype(dtype_of(entry)):
        found = f"{array.shape} of {array.dtype}, expected ({entry['length']},) of {entry['dtype']}"
        raise ValueError(f"{path}: the header is damaged: {found}; {advice(directory)}")
    return np.asarray(array)  # still the mapped file; slices of np.memmap itself are slow


def marks_of(entry: dict) -> list[dict]:
    """The file of a split that says more of each token, if it has one."""
    return [entry[name] for name in MARKS if name in entry]


def dtype_of(entry: dict) -> np.dtype:
    return SOURCE if entry["dtype"] == "source" else np.dtype(entry["dtype"])


def advice(directory: Path) -> str:
    return f"delete {directory} to have it prepared again"


def damage(directory: Path, index: dict) -> Iterator[str]:
    """What is wrong with the content, a line each."""
    vocab_size = index["tokenizer"]["vocab_size"]
    for entry in index["splits"].values():
        for shard in entry["shards"]:
            yield from beyond_vocabulary(directory, shard, open_array(directory, shard), vocab_size)
        offsets = open_array(directory, entry["offsets"])
        ordered = all((np.diff(offsets[at : at + STRIDE + 1]) >= 2).all() for at in range(0, len(offsets), STRIDE))
        if offsets[0] != 0 or offsets[-1] != entry["n_tokens"] or not ordered:
            yield f"{directory / entry['offsets']['file']}: the offsets are not those of documents; {advice(directory)}"
        for file in (*entry["shards"], entry["offsets"], entry["sources"], *marks_of(entry)):
            found = sha256(directory / file["file"])
            if found != file["sha256"]:
                hashes = f"sha256 {found}, expected {file['sha256']}"
                yield f"{directory / file['file']}: changed since it was prepared: {hashes}; {advice(directory)}"


def sampled_damage(stores: dict[str, TokenStore], index: dict) -> Iterator[str]:
    """A cheap look at the ids of large shards: some pages of each, evenly spread."""
    for split, store in stores.items():
        for shard, tokens in zip(index["splits"][split]["shards"], store.shards):
            for page in range(SAMPLES):
                start = page * max(len(tokens) - PAGE, 0) // (SAMPLES - 1)
                found = tokens[start : start + PAGE]
                yield from beyond_vocabulary(store.directory, shard, found, store.vocab_size, start)


def beyond_vocabulary(
    directory: Path, shard: dict, tokens: np.ndarray, vocab_size: int, base: int = 0
) -> Iterator[str]:
    """A line for the first of the tokens, which stand at `base` and after, that is no id of the vocabulary."""
    for start in range(0, len(tokens), STRIDE):
        part = tokens[start : start + STRIDE]
        if part.max() >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            place = f"{directory / shard['file']}: position {base + start + at}"
            yield f"{place}: token id {part[at]} is beyond the vocabulary of {vocab_size}; {advice(directory)}"
            return
