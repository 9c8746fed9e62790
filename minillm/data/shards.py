"""Prepared tokens: made once from text, tokenizer and settings, found again as long as none of them has changed."""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minillm.data.config import DataConfig, val_fraction
from minillm.data.partial import name_leftovers, partial_folder, partial_work
from minillm.data.store import FORMAT, Prepared, is_prepared, json_hash, open_prepared
from minillm.data.store import verify as verify_tokens
from minillm.data.text import named_files
from minillm.data.tokenise import Reading, counted, tokenise
from minillm.data.workers import Workers, count_workers
from minillm.data.writing import StaleError
from minillm.files import BusyError, explained, locked, sha256, write_atomically
from minillm.tokenizer import Tokenizer

logger = logging.getLogger("minillm")

Section = TypeVar("Section", bound=DataConfig)
PACKED_RATIO = 3  # text is about this much larger than its .gz or .parquet
SHARD_TOKENS = 2**28  # 512 MiB of uint16
SMALL_CORPUS = 2**24  # bytes: 16 MiB are tokenised here in the time it takes to start processes
# What the index counts of the rows of each kind that are not stored, or not whole.
LEFT_OUT = {
    "conversations": {
        "bad": "skipped {} rows that are no conversation",
        "cut": "cut {} conversations after the last answer that fits in data.seq_len",
        "dropped": "dropped {} conversations, of which not even the first answer fits in data.seq_len",
    },
    "preferences": {
        "bad": "skipped {} rows that are no preference",
        "equal": "dropped {} whose answers are equal",
        "empty": "dropped {} with an empty answer",
        "dropped": "dropped {} that are longer than data.seq_len",
        "emptied": "dropped {} that have no room for an answer in data.seq_len",
        "alike": "dropped {} whose answers differ only after what fits in data.seq_len",
        "cut_prompts": "cut the beginning of {} prompts to fit in data.seq_len",
        "cut_answers": "cut the end of {} answers, or pairs of them alike, to fit in data.seq_len",
    },
}
HASHED_CORPUS = 2**26  # bytes: up to 64 MiB, content decides whether a file has changed; beyond, size and mtime


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, progress: bool | None = None, shard_tokens: int = SHARD_TOKENS
) -> Prepared:
    """Tokenise `config.path` into `config.cache_dir`, or open what is there from the same text and settings.

    To be called before a process group exists; of several processes one prepares and the others wait. A path that is
    itself a folder of prepared tokens is opened. `progress` None shows a bar where there is a terminal.
    A call that was interrupted is continued by the next. Raises ValueError, naming file and line, for text that cannot
    be used; nothing half-written is left where it could be taken for whole.
    """
    paths = [config.path] if isinstance(config.path, str) else config.path or []
    if len(paths) == 1 and is_prepared(paths[0]):
        logger.info("%s: prepared tokens; data.val and how documents are cut are as they were then", paths[0])
        return open_prepared(paths[0], tokenizer.hash)
    check_ends(tokenizer)
    config = with_fraction(config)
    settings = {"document": config.document, "text_field": config.text_field, "val": str(config.val)}
    identity = identify(settings, corpus_files(config), tokenizer, shard_tokens)
    return made_once(
        config.cache_dir, identity, tokenizer, lambda directory: write(directory, identity, config, tokenizer, progress)
    )


def with_fraction(config: Section) -> Section:
    """The section with what `val = auto` stands for."""
    if config.val_split().kind != "auto":
        return config
    size = size_of_text(named_files("data.path", config.entries()))
    return dataclasses.replace(config, val=str(val_fraction(size)))


def made_once(cache_dir: str, identity: dict, tokenizer: Tokenizer, write: Callable[[Path], dict]) -> Prepared:
    """Open the folder of that identity; `write` makes it, and gives its index, where it is not there yet.

    Of several processes one makes it and the others wait.
    """
    stem = re.sub(r"[^\w.-]+", "-", Path(identity["files"][0]["path"]).name).strip("-.") or "text"
    directory = Path(cache_dir).expanduser() / f"{stem}-{identity['fingerprint'][:16]}"
    if not directory.exists() or partial_folder(directory).exists():
        lock = directory.with_name(f"{directory.name}.lock")
        try:
            with locked(lock):
                make(directory, write)
        except BusyError:
            logger.info("%s: another process is preparing it; waiting", directory)
            with locked(lock, wait=True):
                make(directory, write)
    return open_prepared(directory, tokenizer.hash)


def check_ends(tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer that cannot say where a document ends."""
    if tokenizer.eos_id is None:
        raise ValueError(
            "tokenizer: it has no token to end a document with; name one of its vocabulary as eos_token in the "
            "tokenizer_config.json beside it"
        )


def size_of_text(files: list[Path]) -> int:
    """About how many bytes of text the files hold, from their sizes."""
    packed = (".gz", ".parquet")
    return sum(file.stat().st_size * (PACKED_RATIO if file.suffix.lower() in packed else 1) for file in files)


def identify(settings: dict, files: list[dict], tokenizer: Tokenizer, shard_tokens: int) -> dict:
    """All that the tokens depend on, and its hash, the fingerprint."""
    identity = {
        "format": FORMAT,
        "tokenizer": {"hash": tokenizer.hash, "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "settings": settings,
        "shard_tokens": shard_tokens,
        "files": files,
    }
    return identity | {"fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}


def corpus_files(config: DataConfig) -> list[dict]:
    """The files to read, each with its split and what tells whether it has changed.

    That is the content where hashing takes no time, so that a copy or a touch changes nothing; the size and the time
    of the last change otherwise.
    """
    if not config.path:
        raise ValueError("data.path: no path given; name files, folders or globs of text")
    split = config.val_split()
    paths = [(path, "train") for path in named_files("data.path", config.path)]
    if split.kind == "path":
        held_out = named_files("data.val", split.path, "; a fraction, 'hash F', a path or 0 is expected")
        same = {path.resolve() for path in held_out}
        paths = [(path, split) for path, split in paths if path.resolve() not in same]
        paths += [(path, "val") for path in held_out]
    total = sum(path.stat().st_size for path, _ in paths)
    return [{"path": str(path), "split": split} | state(path, total <= HASHED_CORPUS) for path, split in paths]


def state(path: Path, hashed: bool) -> dict:
    """A file's size, and its sha256 or the time of its last change."""
    try:
        stat = path.stat()
        return {"size": stat.st_size} | ({"sha256": sha256(path)} if hashed else {"mtime_ns": stat.st_mtime_ns})
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def changed_files(info: dict) -> list[str]:
    """Of the files that tokens were prepared from, those that are gone or are not as they were."""
    changed = []
    for file in info["files"]:
        path = Path(file["path"])
        if not path.is_file() or not state(path, "sha256" in file).items() <= file.items():
            changed.append(file["path"])
    return changed


def make(directory: Path, write: Callable[[Path], dict]) -> None:
    """Write the folder, unless it appeared while we waited for its lock, which the caller holds."""
    if directory.exists():
        shutil.rmtree(partial_folder(directory), ignore_errors=True)  # of a process killed when it was done
        return
    name_leftovers(directory)
    try:
        index = write(directory)
    except StaleError as error:
        logger.info("%s: cannot be resumed, begun again: %s", directory, error)
        index = write(directory)
    logger.info("%s: prepared %d tokens to train on", directory, index["splits"]["train"]["n_tokens"])
    for line in skipped(index):
        logger.info("%s: %s", directory, line)


def write(directory: Path, identity: dict, config: DataConfig, tokenizer: Tokenizer, progress: bool | None) -> dict:
    """Write the folder, or the rest of it; its index."""
    files = [(file["path"], file["split"]) for file in identity["files"]]
    size = sum(file["size"] for file in identity["files"])
    n_workers = count_workers(config.workers, size, SMALL_CORPUS)
    with explained(directory), partial_work(directory) as work, Workers(n_workers) as workers:
        reading = Reading(files, size, config, workers, progress)
        counts = counted(reading, work)
        splits = tokenise(reading, counts, tokenizer, identity["shard_tokens"], work)
        changed = changed_files(identity)
        if changed:
            raise ValueError(f"data.path: {', '.join(changed[:5])} changed while being read; prepare again")
        assert sum(split["n_chars"] for split in splits.values()) == sum(counts.n_chars), (splits, sum(counts.n_chars))
        index = identity | {"skipped": {"blank_documents": counts.n_blank, "empty_files": counts.empty}}
        index |= {"splits": splits}
        write_atomically(work.tokens / "index.json", json.dumps(index | {"hash": json_hash(index)}, indent=1) + "\n")
    return index


# --- what there is ----------------------------------------------------------------------------------------------------


def describe(prepared: Prepared, verify: bool = False) -> str:
    """What `minillm data info` prints; with `verify` after every token has been read and every hash compared."""
    if verify:
        verify_tokens(prepared.directory)
    info = prepared.info
    lines = [f"{'':8}{'documents':>14}{'tokens':>16}{'bytes':>18}{'bytes/token':>13}"]
    for store in filter(None, (prepared.train, prepared.val)):
        numbers = f"{store.n_documents:>14,}{store.n_tokens:>16,}{store.n_bytes:>18,}"
        lines.append(f"{store.split:8}{numbers}{store.n_bytes / store.n_tokens:>13.2f}")
    tokenizer, settings = info["tokenizer"], info["settings"]
    lines.append(f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, hash {tokenizer['hash']}")
    lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    shards = sum(len(split["shards"]) for split in info["splits"].values())
    dtype = info["splits"]["train"]["shards"][0]["dtype"]
    lines.append(
        f"{shards} shard{'s' * (shards > 1)} of {dtype}, fingerprint {info['fingerprint']}{', verified' * verify}"
    )
    lines += skipped(info) + learned(info)
    changed = set(changed_files(info))
    files = info["files"]
    lines.append(f"{len(files)} file{'s' * (len(files) > 1)}:")
    for file in files[:20]:
        note = "  (changed since, or gone)" if file["path"] in changed else ""
        held_out = "  (val)" if file["split"] == "val" else ""
        lines.append(f"  {file['size']:>14,} bytes  {file['path']}{held_out}{note}")
    if len(files) > 20:
        more = f"; changed since, or gone: {len(changed)}" if changed else ""
        lines.append(f"  and {len(files) - 20} more{more}")
    return "\n".join(lines)


def skipped(info: dict) -> list[str]:
    """What of the corpus had no text, a line each."""
    blank, empty = info["skipped"]["blank_documents"], info["skipped"]["empty_files"]
    lines = [f"skipped {blank:,} blank document{'s' * (blank > 1)}"] if blank else []
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        lines.append(f"skipped {len(empty)} file{'s' * (len(empty) > 1)} without text: {', '.join(empty[:5])}{more}")
    for kind, said in LEFT_OUT.items():
        counts = info.get(kind, {})
        lines += [what.format(f"{counts[name]:,}") for name, what in said.items() if counts.get(name)]
    return lines


def learned(info: dict) -> list[str]:
    """What is learned of conversations or preferences, in lines; none for other text."""
    kind = next((kind for kind in LEFT_OUT if kind in info), None)
    if kind is None:
        return []
    counts = Counter(info[kind])
    stored, trained = counts["stored"], counts["trained"]
    tokens = f"{trained:,} tokens trained ({trained / stored:.1%}), {stored - trained:,} masked"
    ends = f"{counts['ended']:,} of {counts['answers']:,} answers learned with their end"
    line = f"{counts['found']:,} {kind}: {tokens}, {counts['truncated']:,} truncated; {ends}"
    return [line, *lengths(counts)] if kind == "preferences" else [line]


def lengths(counts: Counter) -> list[str]:
    """How long the answers are that are preferred, and those that are not."""
    means = [
        f"{counts[side]:,} {side}, of {counts[f'{side}_tokens'] / counts[side]:,.1f} tokens on average"
        for side in ("chosen", "rejected")
        if counts[side]
    ]
    line = f"answers: {'; '.join(means)}"
    if not counts["pairs"]:
        return [line]
    longer = [f"{counts[f'{side}_longer'] / counts['pairs']:.1%}" for side in ("chosen", "rejected")]
    return [f"{line}; of {counts['pairs']:,} pairs the chosen one is longer in {longer[0]}, shorter in {longer[1]}"]
