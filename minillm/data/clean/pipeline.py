"""`minillm data clean`: from text files to JSONL without what should not be trained on, and a report of every document.

    files --- sift (a share of them, on any machine) ---> shard: rows, hashes, signatures, report
    shards -- merge (all of them, once) ----------------> rows without duplicates, report

The documents of one shard are judged without the others; whether one is a duplicate can only be told when all are
there. Cleaning on one machine is one shard, merged at once. A directory is there when it is complete, or not at all.
"""

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minillm.config import to_dict
from minillm.data.clean import report as reports
from minillm.data.clean.config import CleanConfig
from minillm.data.clean.contamination import NgramIndex, index_tests
from minillm.data.clean.merge import find_shards, merge_shards
from minillm.data.clean.minhash import N_PERM
from minillm.data.clean.output import RECORDS, SIGNATURES, DroppedRows, Parts, bar
from minillm.data.clean.report import Report
from minillm.data.clean.sift import groups, sift, whole_texts
from minillm.data.config import SharedTextConfig
from minillm.data.text import Block, blocks, named_files
from minillm.data.workers import Workers, count_workers
from minillm.files import atomic_directory, free_directory

logger = logging.getLogger("minillm")

SMALL = 2**22  # bytes: 4 MiB are cleaned here in the time it takes to start processes


class Share(NamedTuple):
    """The i-th of n shares of the corpus, from 1."""

    number: int = 1
    count: int = 1


def clean(data: SharedTextConfig, config: CleanConfig, out: str | Path, *, progress: bool | None = None) -> Report:
    """Clean the text of `data.path` into a new directory. Raises ValueError for text that cannot be read.

    `progress` None shows a bar where there is a terminal.
    """
    refuse_inside(out, data)
    out = free_directory(out)
    with atomic_directory(out) as temporary:
        shard = temporary / "shard"
        shard.mkdir()
        write_shard(data, config, Share(), shard, progress)
        total = merge_shards([shard], temporary, progress)
        shutil.rmtree(shard)
    return total


def clean_shard(
    data: SharedTextConfig, config: CleanConfig, out: str | Path, share: str, *, progress: bool | None = None
) -> tuple[Path, Report]:
    """Clean share `i/n` of the text into out/shard-i-of-n, duplicates left in; one that is there is not made again."""
    part = parse_share(share)
    refuse_inside(out, data)
    directory = Path(out) / f"shard-{part.number}-of-{part.count}"
    if directory.exists():
        made, settings = reports.load(directory)
        if settings != identity(data, config, part):
            raise ValueError(f"{directory}: made with other settings or of other files; choose another folder")
        logger.info("%s: there already", directory)
        return directory, made
    with atomic_directory(free_directory(directory)) as temporary:
        return directory, write_shard(data, config, part, temporary, progress)


def merge(folder: str | Path, out: str | Path, *, progress: bool | None = None) -> Report:
    """Write the shards in a folder as one, duplicates among all of them removed, into a new directory."""
    shards = find_shards(Path(folder))
    out = free_directory(out)
    with atomic_directory(out) as temporary:
        return merge_shards(shards, temporary, progress)


# --- one shard --------------------------------------------------------------------------------------------------------


def write_shard(
    data: SharedTextConfig, config: CleanConfig, share: Share, directory: Path, progress: bool | None
) -> Report:
    """Sift a share of the corpus into a directory."""
    settings = identity(data, config, share)
    tests = test_index(data, config) if config.against else None
    total = Report(skipped_tests=len(tests.skipped) if tests else 0)
    files = [(path, size) for path, size in settings["files"]]
    start, stop = bounds(files, share)
    work = partial(sift, data, config, tests, N_PERM if config.near else 0)
    with (
        Workers(count_workers(data.workers, stop - start, SMALL)) as workers,
        Parts(directory, config.compress) as parts,
        open(directory / RECORDS, "wb") as records,
        open(directory / SIGNATURES, "wb") as marks,
        DroppedRows(directory, config.keep_dropped) as dropped,
        bar("cleaning", stop - start, "B", progress) as shown,
    ):
        stream = groups(share_of_blocks(files, data, start, stop), config.max_bytes)
        for sifted in workers.map(work, stream):
            parts.write(sifted.rows)
            records.write(sifted.records.tobytes())
            marks.write(sifted.signatures.tobytes())
            dropped.write(sifted.dropped)
            total.add(sifted.report)
            shown.update(sifted.end - start - shown.n)
    reports.save(total, directory, settings)
    return total


def share_of_blocks(
    files: list[tuple[str, int]], data: SharedTextConfig, start: int, stop: int
) -> Iterator[tuple[Block, int, int]]:
    """The blocks of the documents that begin in a range of the corpus's bytes, the number of their file, their ends.

    A file that lies outside is not opened; of one that reaches into it the blocks before are read, but not looked at.
    """
    base = 0
    for number, (path, size) in enumerate(files):
        if size and base < stop and base + size > start:
            at, ours = base, False
            for block in blocks(path, data):
                ours = start <= at < stop if block.starts else ours
                if at >= stop and not ours:
                    break
                end = max(at, min(at + block.n_read, base + size - 1))
                if ours:
                    yield block, number, end
                at = end
        base += size


def bounds(files: list[tuple[str, int]], share: Share) -> tuple[int, int]:
    """Where a share of the bytes of the corpus begins and ends."""
    size = sum(size for _, size in files)
    return size * (share.number - 1) // share.count, size * share.number // share.count


def identity(data: SharedTextConfig, config: CleanConfig, share: Share) -> dict[str, Any]:
    """What a shard is made of: settings and files."""
    if data.path is None:
        raise ValueError("data.path: name the text to be cleaned")
    files = [[str(path), os.path.getsize(path)] for path in named_files("data.path", data.path)]
    settings = {**to_dict(config), "document": data.document, "text_field": data.text_field}
    return {"share": [share.number, share.count], "settings": settings, "files": files}


def test_index(data: SharedTextConfig, config: CleanConfig) -> NgramIndex:
    """The n-grams of the test files, which are read as the text is. Raises ValueError where they have no text."""
    data = dataclasses.replace(data, text_field=config.against_field or data.text_field)
    try:
        tests = index_tests(whole_texts(named_files("clean.against", config.against), data))
    except ValueError as error:
        raise ValueError(str(error).replace("data.text_field", "clean.against_field")) from None
    if not tests.places:
        raise ValueError(f"clean.against: no text in {config.against}, so nothing would be found")
    return tests


def refuse_inside(out: str | Path, data: SharedTextConfig) -> None:
    """Raises ValueError where the output would be text of the same corpus when that is read the next time."""
    entries = [data.path] if isinstance(data.path, str) else data.path or []
    for entry in entries:
        folder = Path(entry).expanduser()
        if folder.is_dir() and Path(out).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"out: {out} lies in data.path {entry}, and would be read with it; choose a folder beside")


def parse_share(text: str) -> Share:
    """`2/8` read. Raises ValueError for what is no share."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard: {text!r} is no share; give i/n with i from 1 to n, such as 1/4")
    return Share(int(match[1]), int(match[2]))
