"""Conversations prepared once: read, checked, rendered by a template, and stored with a mask of what is learned.

The first reading checks every row, so that a bad one is named before anything is tokenised, and counts them, so that
the place of the split is known; the second renders and writes. A stored document is a conversation; a row of training
packs whole ones.

    files --> rows --> conversations --> workers: render, cut, mask --> train and val: tokens, trained, offsets, sources
"""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minillm.data.chat import check_places
from minillm.data.chat_templates import ChatTemplate
from minillm.data.config import ConversationsConfig
from minillm.data.conversations import Conversation, Layout, conversation_of, layout_of, read_columns
from minillm.data.corpus import open_sources
from minillm.data.masked import Masked, TurnsConfig, encode_conversations
from minillm.data.mixture import Source
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

TOGETHER = 256  # conversations that a worker renders at a time
SHOWN = 3  # bad rows that are named where they are skipped


def open_conversations(
    data: ConversationsConfig, turns: TurnsConfig, template: ChatTemplate, tokenizer: Tokenizer
) -> list[Source]:
    """The sources of conversations, prepared, with their places in the mixture: what the Loader takes.

    Raises ValueError naming file and row for what cannot be learned from.
    """
    return open_sources(data, tokenizer, partial(prepare_conversations, turns=turns, template=template))


def prepare_conversations(
    config: ConversationsConfig, tokenizer: Tokenizer, *, turns: TurnsConfig, template: ChatTemplate
) -> Prepared:
    """The tokens and masks of `config.path`, from `config.cache_dir` where nothing they depend on has changed."""
    paths = config.entries()
    if len(paths) == 1 and is_prepared(paths[0]):
        return open_prepared(paths[0], tokenizer.hash)
    if config.seq_len is None:
        raise ValueError("data.seq_len: conversations are cut to rows of so many tokens; give it")
    check_ends(tokenizer)
    config = with_fraction(config)
    files = corpus_files(config)
    columns = read_columns(config.columns)
    layouts = {file["path"]: layout_of(file["path"], columns) for file in files}
    read_as = {path: layout and layout._asdict() for path, layout in layouts.items()}
    decides = json.dumps([dataclasses.asdict(template), read_as], default=dict, sort_keys=True)
    settings = {
        "template": template.name,
        "train_on": turns.train_on,
        "long": turns.long,
        "on_bad": turns.on_bad,
        "seq_len": config.seq_len,
        "max_samples": config.max_samples,
        "val": str(config.val),
        "definition": hashlib.sha256(decides.encode()).hexdigest()[:16],
    }
    identity = identify(settings, files, tokenizer, SHARD_TOKENS)
    reading = Reading(files, layouts, config, turns, template)
    return made_once(config.cache_dir, identity, tokenizer, partial(write, reading, tokenizer, identity))


# --- reading ----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What is read, and how."""

    files: list[dict]  # as `corpus_files` says
    layouts: dict[str, Layout | None]
    config: ConversationsConfig
    turns: TurnsConfig
    template: ChatTemplate


class Found(NamedTuple):
    """A conversation and where it was found."""

    conversation: Conversation
    file: int  # its number
    line: int


def conversations(reading: Reading, bad: list[str]) -> Iterator[Found]:
    """The conversations of all files, in order; what is wrong with rows that are skipped joins `bad`."""
    left = reading.config.max_samples
    for number, file in enumerate(reading.files):
        counted = left is not None and file["split"] == "train"
        for line, row in records(file["path"]):
            if counted and left == 0:
                break
            try:
                conversation = conversation_of(row, reading.layouts[file["path"]])
                check_places(reading.template, conversation.messages)
            except ValueError as error:
                bad.append(f"{file['path']}:{line}: {error}")
                if reading.turns.on_bad == "error":
                    hint = "fix the row, or leave out such rows with --sft.on_bad skip"
                    raise ValueError(f"{bad[-1]}; {hint}") from None
                continue
            left = left - 1 if counted else left
            yield Found(conversation, number, line)


class Job(NamedTuple):
    """Conversations of one file to render, and which of them are held out."""

    conversations: list[Conversation]
    file: int
    lines: list[int]
    in_val: list[bool]


def jobs(reading: Reading, n_train: int) -> Iterator[Job]:
    """The conversations, some at a time; those from the n_train-th on are held out, or those that their hash says."""
    split = reading.config.val_split()
    together: list[tuple[Found, bool]] = []

    def made() -> Job:
        found, in_val = zip(*together)
        return Job([one.conversation for one in found], found[0].file, [one.line for one in found], list(in_val))

    for number, found in enumerate(conversations(reading, [])):
        if together and (len(together) == TOGETHER or together[0][0].file != found.file):
            yield made()
            together = []
        if split.kind == "hash":
            in_val = hash_side(said_in(found.conversation), split.fraction)
        else:
            in_val = reading.files[found.file]["split"] == "val" or (split.kind == "tail" and number >= n_train)
        together.append((found, in_val))
    if together:
        yield made()


def said_in(conversation: Conversation) -> str:
    """All that was said."""
    said = (part for message in conversation.messages for part in (message.content, *message.calls))
    return "\n".join(said) or conversation.text


def check(reading: Reading) -> tuple[int, list[str]]:
    """(how many conversations there are, what is wrong with the rows that are none)."""
    bad: list[str] = []
    found = Counter(reading.files[one.file]["split"] for one in conversations(reading, bad))
    for split, field in (("train", "data.path"), ("val", "data.val")):
        paths = [file["path"] for file in reading.files if file["split"] == split]
        if paths and not found[split]:
            wrong = f": {len(bad)} rows are none, the first is {bad[0]}" if bad else ""
            raise ValueError(f"{field}: no conversation in {', '.join(paths[:5])}; the dataset is empty{wrong}")
    return found.total(), bad


# --- writing ----------------------------------------------------------------------------------------------------------


def write(reading: Reading, tokenizer: Tokenizer, identity: dict, directory: Path) -> dict:
    """Write the folder of prepared conversations; its index."""
    config, turns = reading.config, reading.turns
    n_found, bad = check(reading)
    for problem in bad[:SHOWN]:
        logger.warning("skipped: %s", problem)
    split = config.val_split()
    n_train = n_found - max(1, round(n_found * split.fraction)) if split.kind == "tail" else n_found
    splits = ["train"] if split.kind == "none" else ["train", "val"]
    size = sum(file["size"] for file in reading.files)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    options = (reading.template, tokenizer, turns.train_on, turns.long, config.seq_len)
    counts = Counter(found=n_found, bad=len(bad))
    with (
        explained(directory),
        atomic_directory(directory) as folder,
        Workers(count_workers(config.workers, size, SMALL_CORPUS)) as workers,
        tqdm(total=n_found, desc="tokenising", disable=None, leave=False) as bar,
    ):
        writers = {name: SplitWriter(folder, name, dtype, identity["shard_tokens"]) for name in splits}
        masks = {name: GrowingArray(folder / f"{name}-trained.npy", "|u1") for name in splits}
        given, kept = tee(jobs(reading, n_train))
        tasks = (job.conversations for job in given)
        for job, masked in zip(kept, workers.map(partial(encode_conversations, *options), tasks)):
            counts.update(masked.counts)
            in_val = np.array(job.in_val)[masked.numbers]
            for name, mine in (("train", ~in_val), ("val", in_val)):
                if mine.any():
                    writers[name].append(written(masked, job, dtype).where(mine), job.file)
                    masks[name].append(masked.trained[np.repeat(mine, masked.lengths)])
            bar.update(len(job.conversations))
        for name, writer in writers.items():
            if not writer.n_tokens:
                dropped = f", {counts['dropped']} are longer than data.seq_len {config.seq_len}" * bool(
                    counts["dropped"]
                )
                all_in_val = ": all is held out; --data.val 0 holds nothing out" * (name == "train" and not n_train)
                raise ValueError(f"data.path: of {n_found} conversations none is left for {name}{dropped}{all_in_val}")
        entries = {name: writer.close() | {"trained": masks[name].close()} for name, writer in writers.items()}
        if changed := changed_files(identity):
            raise ValueError(f"data.path: {', '.join(changed[:5])} changed while being read; prepare again")
        index = identity | {"skipped": {"blank_documents": 0, "empty_files": []}}
        index |= {"conversations": dict(counts), "splits": entries}
        write_atomically(folder / "index.json", json.dumps(index | {"hash": json_hash(index)}, indent=1) + "\n")
    return index


def written(masked: Masked, job: Job, dtype: np.dtype) -> Written:
    """What a SplitWriter takes: each document whole."""
    texts = [said_in(job.conversations[number]) for number in masked.numbers.tolist()]
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
