"""The two readings that turn a corpus into shards: one checks and counts, the next tokenises and writes.

The first reading parses every file, so that a broken line is reported before hours of work, and counts characters, so
that the place of the split is known. Both hand blocks to the workers and take the results in order: what is written
is the same whatever the number of workers.

    blocks --> workers: parse, count ---------------------> characters, where val begins
    blocks --> workers: parse, encode, add bos and eos ---> train and val shards, offsets, sources
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minillm.data.config import DataConfig
from minillm.data.store import SplitWriter, Written
from minillm.data.text import BLOCK, Block, Document, blocks, parse, texts
from minillm.data.workers import Workers
from minillm.tokenizer import Tokenizer

HASHED_CHARS = 2048  # a document's hash is that of its beginning: less than a piece, so that it is always at hand
ROUNDING = 0.1  # val may lose this share of its size for the sake of whole documents


class Reading(NamedTuple):
    """What is read, and by whom."""

    files: list[tuple[str, str]]  # (path, split): "val" for the files that data.val names, "train" for all others
    size: int  # bytes of all files
    config: DataConfig
    workers: Workers
    progress: bool | None  # None: a bar where there is a terminal

    def blocks(self) -> Iterator[tuple[Block, str]]:
        """(block, split of its file), in the order of the files."""
        for path, split in self.files:
            for block in blocks(path, self.config):
                yield block, split

    def bar(self, title: str) -> tqdm:
        disable = None if self.progress is None else not self.progress
        return tqdm(total=self.size, unit="B", unit_scale=True, desc=title, disable=disable, leave=False)


# --- the first reading ------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What the first reading finds. Two numbers a block: 16 bytes of memory a MiB of text."""

    n_chars: array
    first_end: array  # characters up to the end of the first document that ends in the block; -1 where none does
    n_blank: int  # documents without text
    empty: list[str]  # files without text


class BlockCounts(NamedTuple):
    file: str
    n_chars: int
    first_end: int
    n_blank: int
    n_read: int


def count(reading: Reading) -> Counts:
    """Check and count everything. Raises ValueError where the text cannot be read, or where there is none."""
    n_chars, first_end, n_blank = array("q"), array("q"), 0
    with_text = set()
    with reading.bar("checking") as bar:
        stream = (block for block, _ in reading.blocks())
        for block in reading.workers.map(partial(count_block, reading.config), stream):
            n_chars.append(block.n_chars)
            first_end.append(block.first_end)
            n_blank += block.n_blank
            if block.n_chars:
                with_text.add(block.file)
            bar.update(block.n_read)
    for split, field in (("train", "data.path"), ("val", "data.val")):
        paths = [path for path, its_split in reading.files if its_split == split]
        if not with_text.intersection(paths) and (paths or split == "train"):
            more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            where = f"no text in {', '.join(paths[:5])}{more}" if paths else "no text besides that of data.val"
            raise ValueError(f"{field}: {where}: the corpus is empty")
    return Counts(n_chars, first_end, n_blank, [path for path, _ in reading.files if path not in with_text])


def count_block(config: DataConfig, block: Block) -> BlockCounts:
    sizes = [len(text) for _, text in texts(block, config)]
    n_blank = sizes[0 if block.starts else 1 : None if block.ends else -1].count(0)
    ending = [i for i, size in enumerate(sizes if block.ends else sizes[:-1]) if size or (i == 0 and not block.starts)]
    return BlockCounts(block.file, sum(sizes), sum(sizes[: ending[0] + 1]) if ending else -1, n_blank, block.n_read)


# --- what is held out -------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A block to tokenise, and what of it is held out."""

    block: Block
    in_val: bool | None  # None: what its documents' hashes say
    cut: int | None = None  # val begins after so many characters of the block


def plan(reading: Reading, counts: Counts) -> Iterator[Job]:
    """Every block, with its side of the split. Raises ValueError where one side would be left without text."""
    split = reading.config.val_split()
    if split.kind != "tail":
        return (Job(block, None if split.kind == "hash" else side == "val") for block, side in reading.blocks())
    total = sum(counts.n_chars)
    cut = int(total * (1 - split.fraction))
    if not 0 < cut < total:
        raise ValueError(f"data.val: {reading.config.val} of {total} characters leaves one side of the split empty")
    return tail_jobs(reading, counts, cut)


def tail_jobs(reading: Reading, counts: Counts, cut: int) -> Iterator[Job]:
    """Val begins after `cut` characters; or where the document there ends, if val is nearly as large then."""
    block_ends = np.cumsum(counts.n_chars)
    most_lost = ROUNDING * (int(block_ends[-1]) - cut)
    at = int(np.searchsorted(block_ends, cut))
    char = cut - int(block_ends[at] - counts.n_chars[at])
    for number, (block, _) in enumerate(reading.blocks()):
        if number == at:
            end, end_char = document_end(block, number, char, reading.config, counts)
            if int(block_ends[end]) - counts.n_chars[end] + end_char - cut <= most_lost:
                at, char = end, end_char
        yield Job(block, number > at, char if number == at else None)


def document_end(block: Block, number: int, char: int, config: DataConfig, counts: Counts) -> tuple[int, int]:
    """(block, characters of it) up to the end of the document that the char-th character of a block is in."""
    at = 0
    for piece in parse(block, config):
        at += len(piece.text)
        if at >= char and piece.ends:
            return number, at
    later = number + 1
    while counts.first_end[later] < 0:
        later += 1
    return later, counts.first_end[later]


def hash_side(text: str, fraction: float) -> bool:
    """Whether a document is held out: a function of its beginning alone, so it stays where the corpus grows."""
    digest = hashlib.blake2b(text[:HASHED_CHARS].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# --- the second reading -----------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A block of tokens on its way from a worker to the files."""

    file: str
    pieces: Written
    in_val: np.ndarray  # int8 a piece: 0, 1, or -1 for "as the piece before the block"
    n_read: int


def tokenise(reading: Reading, counts: Counts, tokenizer: Tokenizer, shard_tokens: int, directory: Path) -> dict:
    """Write the files of train and, if anything is held out, val. Returns: what the index says of each."""
    config = reading.config
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    splits = ["train"] if config.val_split().kind == "none" else ["train", "val"]
    writers = [SplitWriter(directory, split, dtype, shard_tokens) for split in splits]
    number = {path: i for i, (path, _) in enumerate(reading.files)}
    side_before = 0
    with reading.bar("tokenising") as bar:
        encode = partial(encode_block, config, tokenizer, dtype)
        for encoded in reading.workers.map(encode, plan(reading, counts)):
            in_val = np.where(encoded.in_val < 0, side_before, encoded.in_val)
            side_before = in_val[-1] if len(in_val) else side_before
            for side, writer in enumerate(writers):
                writer.append(encoded.pieces.where(in_val == side), number[encoded.file])
            bar.update(encoded.n_read)
    for writer in writers:
        if not writer.n_tokens:
            n = sum(writer.sources.length for writer in writers)
            raise ValueError(f"data.val: {config.val} of {n} documents leaves none for {writer.split}; try another one")
    return {writer.split: writer.close() for writer in writers}


def encode_block(config: DataConfig, tokenizer: Tokenizer, dtype: np.dtype, job: Job) -> Encoded:
    """Parse and encode a block. Raises ValueError naming file and line for text that cannot be encoded."""
    found = list(sided(job, config))
    pieces = [piece for piece, _ in found]
    tokens, lengths = [], []
    for batch in batches(pieces):
        flat: list[int] = []
        for piece, ids in zip(batch, encode_pieces(batch, tokenizer)):
            before = len(flat)
            if piece.starts:
                flat.append(tokenizer.bos_id)
            flat += ids
            if piece.ends:
                flat.append(tokenizer.eos_id)
            lengths.append(len(flat) - before)
        array_of_ids = np.array(flat, dtype=np.int64)
        if array_of_ids.min() < 0 or array_of_ids.max() >= tokenizer.vocab_size:
            refuse_ids(batch, tokenizer)
        tokens.append(array_of_ids.astype(dtype))
    written = Written(
        np.concatenate(tokens) if tokens else np.empty(0, dtype),
        np.array(lengths, dtype=np.int64),
        np.array([piece.starts for piece in pieces], dtype=bool),
        np.array([piece.ends for piece in pieces], dtype=bool),
        np.array([piece.line for piece in pieces], dtype=np.int64),
        np.array([len(piece.text) for piece in pieces], dtype=np.int64),
        np.array([utf8_length(piece.text) for piece in pieces], dtype=np.int64),
    )
    return Encoded(job.block.file, written, np.array([side for _, side in found], dtype=np.int8), job.block.n_read)


def sided(job: Job, config: DataConfig) -> Iterator[tuple[Document, int]]:
    """The pieces of a block that have text or end one, each with its side of the split; cut where val begins."""
    fraction = config.val_split().fraction
    side = -1 if job.in_val is None else int(job.in_val)
    at = 0
    for piece in parse(job.block, config):
        if not piece.text and piece.starts and piece.ends:
            continue
        if job.in_val is None and piece.starts:
            side = int(hash_side(piece.text, fraction))
        if job.cut is not None and not side:
            stop = at + len(piece.text)
            if piece.starts and at >= job.cut:
                side = 1
            elif stop > job.cut or (stop == job.cut and not piece.ends):
                head, tail = piece.text[: job.cut - at], piece.text[job.cut - at :]
                yield piece._replace(text=head, ends=True), 0
                line = piece.line + head.count("\n") * piece.has_lines
                piece, side = piece._replace(text=tail, line=line, starts=True), 1
            at = stop
        yield piece, side


def batches(pieces: list[Document]) -> Iterator[list[Document]]:
    """The pieces some MiB at a time, since the lists of ids take many times the memory of their text."""
    batch: list[Document] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_pieces(pieces: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([piece.text for piece in pieces])
    except ValueError:
        for piece in pieces:
            try:
                tokenizer.encode(piece.text)
            except ValueError as error:
                raise ValueError(f"{piece.source}: {error}") from None
        raise


def refuse_ids(pieces: Iterable[Document], tokenizer: Tokenizer) -> None:
    for piece in pieces:
        wrong = [id for id in tokenizer.encode(piece.text) if not 0 <= id < tokenizer.vocab_size]
        if wrong:
            raise ValueError(f"{piece.source}: token id {wrong[0]} is beyond the vocabulary of {tokenizer.vocab_size}")
    raise ValueError(f"token ids beyond the vocabulary of {tokenizer.vocab_size}: bos or eos")


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
