"""Rows of files prepared once: read, checked, encoded by a template, and stored with a byte of marks a token.

The first reading checks every row, so that a bad one is named before anything is tokenised, and counts them, so that
the place of the split is known; the second encodes and writes. A stored document is what a row says; a row of training
packs whole ones.

    files --> rows --> examples --> workers: render, cut, mark --> train and val: tokens, marks, offsets, sources

What the rows hold is a `Kind`: conversations, or preferences.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minillm.data.config import ConversationsConfig
from minillm.data.formats import Layout, layout_of, read_columns
from minillm.data.masked import Masked
from minillm.data.records import records
from minillm.data.shards import (
    SHARD_TOKENS,
    SMALL_CORPUS,
    changed_files,
    check_ends,
    corpus_files,
    identify,
    made_once,
    with_fraction,
)
from minillm.data.store import Prepared, is_prepared, json_hash, open_prepared
from minillm.data.tokenise import hash_side, utf8_length
from minillm.data.workers import Workers, count_workers
from minillm.data.writing import GrowingArray, SplitWriter, Written
from minillm.files import atomic_directory, explained, write_atomically
from minillm.tokenizer import Tokenizer

logger = logging.getLogger("minillm")

TOGETHER = 256  # examples that a worker encodes at a time
SHOWN = 3  # bad rows that are named where they are skipped

Example = Any  # what a kind makes of a row


class Kind(NamedTuple):
    """What rows hold, and all in which that differs."""

    name: str  # of several; also where the index has what is counted
    section: str  # of the command line that has on_bad
    marks: str  # one of store.MARKS
    settings: dict[str, Any]  # what decides, beside the data section, what is stored; on_bad among them
    depends_on: Any  # more of that, too long to be shown
    read: Callable[[object, Layout | None], Example]  # raises ValueError for a row that cannot be learned from
    said_in: Callable[[Example], str]
    told_apart_by: Callable[[Example], str]  # what decides in data.val = 'hash F' which side it is on
    encode: Callable[[Tokenizer, int, Sequence[Example]], Masked]  # with data.seq_len; by a worker
    agreed: Sequence[str]  # of the settings: what a folder that is prepared already has to have been prepared with
    reasons: Mapping[str, str]  # why examples that are counted under that name are not stored
    arranged: Callable[[Iterator["Found"]], Iterator["Found"]] = iter  # what is said by rows beside one another


class Found(NamedTuple):
    """An example and where it was found."""

    example: Example
    file: int  # its number
    line: int


def prepare_records(config: ConversationsConfig, tokenizer: Tokenizer, *, kind: Kind) -> Prepared:
    """The tokens and marks of `config.path`, from `config.cache_dir` where nothing they depend on has changed.

    A path that is prepared already has to suit the run.
    """
    paths = config.entries()
    if len(paths) == 1 and is_prepared(paths[0]):
        return suited(open_prepared(paths[0], tokenizer.hash), config.seq_len, kind)
    if config.seq_len is None:
        raise ValueError(f"data.seq_len: {kind.name} are cut to rows of so many tokens; give it")
    check_ends(tokenizer)
    config = with_fraction(config)
    files = corpus_files(config)
    columns = read_columns(config.columns, config.formats)
    layouts = {file["path"]: layout_of(file["path"], columns, config.formats) for file in files}
    read_as = {path: layout and layout._asdict() for path, layout in layouts.items()}
    decides = json.dumps([kind.depends_on, read_as], default=dict, sort_keys=True)
    settings = kind.settings | {
        "seq_len": config.seq_len,
        "max_samples": config.max_samples,
        "val": str(config.val),
        "definition": hashlib.sha256(decides.encode()).hexdigest()[:16],
    }
    identity = identify(settings, files, tokenizer, SHARD_TOKENS)
    reading = Reading(files, layouts, config, kind)
    return made_once(config.cache_dir, identity, tokenizer, partial(write, reading, tokenizer, identity))


def suited(prepared: Prepared, seq_len: int | None, kind: Kind) -> Prepared:
    """What was prepared. Raises ValueError where it was for another purpose, or in another way."""
    settings = prepared.info["settings"]
    if kind.name not in prepared.info:
        raise ValueError(f"{prepared.directory}: what was prepared there are no {kind.name}")
    if settings["seq_len"] > (seq_len or settings["seq_len"]):
        raise ValueError(
            f"{prepared.directory}: prepared for rows of {settings['seq_len']}, which data.seq_len {seq_len} would cut "
            f"in the middle of {kind.name}; prepare the files again"
        )
    for name in kind.agreed:
        if settings[name] != kind.settings[name]:
            other = f"prepared with {name} {settings[name]}, and {kind.settings[name]} is wanted"
            raise ValueError(f"{prepared.directory}: {other}; prepare the files again")
    return prepared


# --- reading ----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What is read, and how."""

    files: list[dict]  # as `corpus_files` says
    layouts: dict[str, Layout | None]
    config: ConversationsConfig
    kind: Kind


def examples(reading: Reading, bad: list[str]) -> Iterator[Found]:
    """The examples of all files, in order; what is wrong with rows that are skipped joins `bad`."""
    return reading.kind.arranged(found_rows(reading, bad))


def found_rows(reading: Reading, bad: list[str]) -> Iterator[Found]:
    """What each row of all files says."""
    left = reading.config.max_samples
    for number, file in enumerate(reading.files):
        counted = left is not None and file["split"] == "train"
        for line, row in records(file["path"]):
            if counted and left == 0:
                break
            try:
                example = reading.kind.read(row, reading.layouts[file["path"]])
            except ValueError as error:
                bad.append(f"{file['path']}:{line}: {error}")
                if reading.kind.settings["on_bad"] == "error":
                    hint = f"fix the row, or leave out such rows with --{reading.kind.section}.on_bad skip"
                    raise ValueError(f"{bad[-1]}; {hint}") from None
                continue
            left = left - 1 if counted else left
            yield Found(example, number, line)


class Job(NamedTuple):
    """Examples of one file to encode, and which of them are held out."""

    examples: list[Example]
    file: int
    lines: list[int]
    in_val: list[bool]


def jobs(reading: Reading, n_train: int) -> Iterator[Job]:
    """The examples, some at a time; those from the n_train-th on are held out, or those that their hash says."""
    split = reading.config.val_split()
    together: list[tuple[Found, bool]] = []

    def made() -> Job:
        found, in_val = zip(*together)
        return Job([one.example for one in found], found[0].file, [one.line for one in found], list(in_val))

    for number, found in enumerate(examples(reading, [])):
        if together and (len(together) == TOGETHER or together[0][0].file != found.file):
            yield made()
            together = []
        if split.kind == "hash":
            in_val = hash_side(reading.kind.told_apart_by(found.example), split.fraction)
        else:
            in_val = reading.files[found.file]["split"] == "val" or (split.kind == "tail" and number >= n_train)
        together.append((found, in_val))
    if together:
        yield made()


def check(reading: Reading) -> tuple[int, list[str]]:
    """(how many examples there are, what is wrong with the rows that are none)."""
    bad: list[str] = []
    found = Counter(reading.files[one.file]["split"] for one in examples(reading, bad))
    for split, field in (("train", "data.path"), ("val", "data.val")):
        paths = [file["path"] for file in reading.files if file["split"] == split]
        if split == "train" and not paths:
            raise ValueError(f"{field}: no {reading.kind.name} besides those of data.val; the dataset is empty")
        if paths and not found[split]:
            wrong = f": {len(bad)} rows are none, the first is {bad[0]}" if bad else ""
            raise ValueError(f"{field}: no {reading.kind.name} in {', '.join(paths[:5])}; the dataset is empty{wrong}")
    return found.total(), bad


# --- writing ----------------------------------------------------------------------------------------------------------


def write(reading: Reading, tokenizer: Tokenizer, identity: dict, directory: Path) -> dict:
    """Write the folder of prepared examples; its index."""
    config, kind = reading.config, reading.kind
    n_found, bad = check(reading)
    for problem in bad[:SHOWN]:
        logger.warning("skipped: %s", problem)
    split = config.val_split()
    n_train = n_found - max(1, round(n_found * split.fraction)) if split.kind == "tail" else n_found
    splits = ["train"] if split.kind == "none" else ["train", "val"]
    size = sum(file["size"] for file in reading.files)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    counts = Counter(found=n_found, bad=len(bad))
    with (
        explained(directory),
        atomic_directory(directory) as folder,
        Workers(count_workers(config.workers, size, SMALL_CORPUS)) as workers,
        tqdm(total=n_found, desc="tokenising", disable=None, leave=False) as bar,
    ):
        writers = {name: SplitWriter(folder, name, dtype, identity["shard_tokens"]) for name in splits}
        marks = {name: GrowingArray(folder / f"{name}-{kind.marks}.npy", "|u1") for name in splits}
        given, kept = tee(jobs(reading, n_train))
        tasks = (job.examples for job in given)
        for job, masked in zip(kept, workers.map(partial(kind.encode, tokenizer, config.seq_len), tasks)):
            counts.update(masked.counts)
            in_val = np.array(job.in_val)[masked.numbers]
            for name, mine in (("train", ~in_val), ("val", in_val)):
                if mine.any():
                    writers[name].append(written(masked, job, dtype, kind).where(mine), job.file)
                    marks[name].append(masked.marks[np.repeat(mine, masked.lengths)])
            bar.update(len(job.examples))
        for name, writer in writers.items():
            if not writer.n_tokens:
                why = "".join(
                    f", {counts[reason]} {said.format(seq_len=config.seq_len)}"
                    for reason, said in kind.reasons.items()
                    if counts[reason]
                )
                all_in_val = name == "train" and not n_train and writers["val"].n_tokens > 0
                advice = ": all is held out; --data.val 0 holds nothing out" * all_in_val
                raise ValueError(f"data.path: of {n_found} {kind.name} none is left for {name}{why}{advice}")
        entries = {name: writer.close() | {kind.marks: marks[name].close()} for name, writer in writers.items()}
        if changed := changed_files(identity):
            raise ValueError(f"data.path: {', '.join(changed[:5])} changed while being read; prepare again")
        index = identity | {"skipped": {"blank_documents": 0, "empty_files": []}}
        index |= {kind.name: dict(counts), "splits": entries}
        write_atomically(folder / "index.json", json.dumps(index | {"hash": json_hash(index)}, indent=1) + "\n")
    return index


def written(masked: Masked, job: Job, dtype: np.dtype, kind: Kind) -> Written:
    """What a SplitWriter takes: each document whole."""
    texts = [kind.said_in(job.examples[number]) for number in masked.numbers.tolist()]
    whole = np.ones(len(texts), dtype=bool)
    return Written(
        masked.tokens.astype(dtype),
        masked.lengths,
        whole,
        whole,
        np.array(job.lines, dtype=np.int64)[masked.numbers],
        np.array(list(map(len, texts)), dtype=np.int64),
        np.array(list(map(utf8_length, texts)), dtype=np.int64),
    )
