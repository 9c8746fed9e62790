"""The two readings that turn a corpus into shards: one checks and counts, the next tokenises and writes.

The first reading parses every file, so that a broken line is reported before hours of work, and counts characters, so
that the place of the split is known. Both hand blocks to the workers and take the results in order: what is written
is the same whatever the number of workers.

    blocks --> workers: parse, count ---------------------> characters, where val begins
    blocks --> workers: parse, encode, add bos and eos ---> train and val shards, offsets, sources
"""

import hashlib
import logging
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minillm.data.config import DataConfig
from minillm.data.partial import Partial
from minillm.data.text import BLOCK, Block, Pieces, blocks, parse, text_format, texts_of
from minillm.data.workers import Workers
from minillm.data.writing import SplitWriter, StaleError, Written
from minillm.tokenizer import Tokenizer

logger = logging.getLogger("minillm")

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


def counted(reading: Reading, work: Partial) -> Counts:
    """`count`, once: what it found is kept where it took long."""
    kept = work.kept("counts.json")
    if kept is not None:
        return Counts(array("q", kept["n_chars"]), array("q", kept["first_end"]), kept["n_blank"], kept["empty"])
    counts = count(reading)
    if work.is_due():
        columns = {"n_chars": counts.n_chars.tolist(), "first_end": counts.first_end.tolist()}
        work.keep("counts.json", counts._asdict() | columns)
    return counts


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
    sizes = list(map(len, texts_of(block, config)[1]))
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
    pieces = parse(block, config)
    at = 0
    for text, ends in zip(pieces.texts, pieces.ends):
        at += len(text)
        if at >= char and ends:
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
    place: list  # of the block
    n_read: int


def tokenise(reading: Reading, counts: Counts, tokenizer: Tokenizer, shard_tokens: int, work: Partial) -> dict:
    """Write the files of train and, if anything is held out, val; or the rest of them, where some work is kept.

    Returns: what the index says of each split. Raises StaleError where what is kept cannot be continued.
    """
    config = reading.config
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    splits = ["train"] if config.val_split().kind == "none" else ["train", "val"]
    kept = work.kept("progress.json") or {"n_blocks": 0, "side_before": 0, "splits": {}}
    n_blocks, side_before = kept["n_blocks"], kept["side_before"]
    writers = [SplitWriter(work.tokens, split, dtype, shard_tokens, kept["splits"].get(split)) for split in splits]
    number = {path: i for i, (path, _) in enumerate(reading.files)}
    jobs = plan(reading, counts)
    with reading.bar("tokenising") as bar:
        if n_blocks:
            logger.info("%s: resumed at block %d of %d", work.directory, n_blocks + 1, len(counts.n_chars))
            bar.update(skip(jobs, n_blocks, kept["last"]))
        for encoded in reading.workers.map(partial(encode_block, config, tokenizer, dtype), jobs):
            in_val = np.where(encoded.in_val < 0, side_before, encoded.in_val)
            side_before = int(in_val[-1]) if len(in_val) else side_before
            for side, writer in enumerate(writers):
                writer.append(encoded.pieces.where(in_val == side), number[encoded.file])
            n_blocks += 1
            if work.is_due():
                states = {writer.split: writer.state() for writer in writers}
                done = {"n_blocks": n_blocks, "last": encoded.place, "side_before": side_before, "splits": states}
                work.keep("progress.json", done)
            bar.update(encoded.n_read)
    for writer in writers:
        if not writer.n_tokens:
            n = sum(writer.sources.length for writer in writers)
            raise ValueError(
                f"data.val: {config.val} of {n} documents leaves none for {writer.split}; give another fraction"
            )
    return {writer.split: writer.close() for writer in writers}


def skip(jobs: Iterator[Job], n_blocks: int, last: list) -> int:
    """Pass over what is written; the bytes it was read from. Raises StaleError where the last block is not `last`."""
    n_read, block = 0, None
    for job in islice(jobs, n_blocks):
        n_read, block = n_read + job.block.n_read, job.block
    if block is None or place(block) != last:
        raise StaleError(f"{last[0]}: no longer read in the same blocks")
    return n_read


def place(block: Block) -> list:
    """Where a block begins."""
    return [block.file, block.line, block.offset]


def encode_block(config: DataConfig, tokenizer: Tokenizer, dtype: np.dtype, job: Job) -> Encoded:
    """Parse and encode a block. Raises ValueError naming file and line for text that cannot be encoded."""
    file, pieces = job.block.file, parse(job.block, config)
    if job.in_val is None:
        sides = hashed_sides(pieces, config.val_split().fraction)
    elif job.cut is not None:
        sides = cut_sides(pieces, job.cut, text_format(file) == "txt")
    else:
        sides = [int(job.in_val)] * len(pieces.texts)
    tokens, lengths = [np.empty(0, dtype)], []
    for batch in batches(pieces):
        ids, batch_lengths = encode(batch, file, tokenizer)
        if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
            refuse_ids(batch, file, tokenizer)
        tokens.append(ids.astype(dtype))
        lengths += batch_lengths
    written = Written(
        np.concatenate(tokens),
        np.array(lengths, dtype=np.int64),
        np.array(pieces.starts, dtype=bool),
        np.array(pieces.ends, dtype=bool),
        np.array(pieces.lines, dtype=np.int64),
        np.array(list(map(len, pieces.texts)), dtype=np.int64),
        np.array([utf8_length(text) for text in pieces.texts], dtype=np.int64),
    )
    return Encoded(file, written, np.array(sides, dtype=np.int8), place(job.block), job.block.n_read)


def hashed_sides(pieces: Pieces, fraction: float) -> list[int]:
    """The side of each piece: that of its document, or -1 for a document that started in an earlier block."""
    sides, side = [], -1
    for text, starts in zip(pieces.texts, pieces.starts):
        side = int(hash_side(text, fraction)) if starts else side
        sides.append(side)
    return sides


def cut_sides(pieces: Pieces, cut: int, has_lines: bool) -> list[int]:
    """The side of each piece where val begins after `cut` characters; a document there becomes two."""
    sizes = list(map(len, pieces.texts))
    ends = np.cumsum(sizes)
    at = int(np.searchsorted(ends, cut))  # the first piece that reaches the cut, the last of train
    inside = cut - int(ends[at] - sizes[at])
    if inside < sizes[at] or not pieces.ends[at]:
        text, line = pieces.texts[at], pieces.lines[at]
        head, tail = text[:inside], text[inside:]
        tail_line = line + head.count("\n") if has_lines else line
        halves = (head, tail), (line, tail_line), (pieces.starts[at], True), (True, pieces.ends[at])
        for column, values in zip(pieces, halves):
            column[at : at + 1] = values
    return [0] * (at + 1) + [1] * (len(pieces.texts) - at - 1)


def batches(pieces: Pieces) -> Iterator[Pieces]:
    """The pieces some MiB at a time, however large the row they come from: encoding takes many times their memory."""
    ends = np.cumsum(list(map(len, pieces.texts)))
    start = 0
    while start < len(pieces.texts):
        stop = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + 2 * BLOCK, side="right"))
        stop = max(stop, start + 1)
        yield Pieces(*(column[start:stop] for column in pieces))
        start = stop


def encode(pieces: Pieces, file: str, tokenizer: Tokenizer) -> tuple[np.ndarray, list[int]]:
    """(ids of all pieces, bos and eos included; how many of each piece)."""
    try:
        encoded = encode_pieces(pieces, tokenizer)
    except ValueError:
        for text, line in zip(pieces.texts, pieces.lines):
            try:
                tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{file}:{line}: {error}") from None
        raise
    bos, eos = np.array([tokenizer.bos_id]), np.array([tokenizer.eos_id])
    parts: list[np.ndarray] = []
    for ids, starts, ends in zip(encoded, pieces.starts, pieces.ends):
        if starts:
            parts.append(bos)
        parts.append(ids)
        if ends:
            parts.append(eos)
    lengths = [len(ids) + starts + ends for ids, starts, ends in zip(encoded, pieces.starts, pieces.ends)]
    return np.concatenate(parts), lengths


def encode_pieces(pieces: Pieces, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of each piece; one that does not start its document gets no space before it."""
    if not tokenizer.adds_space or all(pieces.starts):
        return tokenizer.encode_arrays(pieces.texts)
    return [
        tokenizer.encode_arrays([text])[0] if starts else tokenizer.encode_inside(text)
        for text, starts in zip(pieces.texts, pieces.starts)
    ]


def refuse_ids(pieces: Pieces, file: str, tokenizer: Tokenizer) -> None:
    for text, line in zip(pieces.texts, pieces.lines):
        wrong = [id for id in tokenizer.encode(text) if not 0 <= id < tokenizer.vocab_size]
        if wrong:
            raise ValueError(f"{file}:{line}: token id {wrong[0]} is beyond the vocabulary of {tokenizer.vocab_size}")
    raise ValueError(f"{file}: bos or eos is beyond the vocabulary of {tokenizer.vocab_size}")


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
