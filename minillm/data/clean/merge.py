"""The second half of cleaning: shards, each judged by itself, become one corpus without duplicates among them.

What decides is small, the hash and the signature of each document; the text is read once, to be copied. The first
document of a group of duplicates is kept, in the order of the corpus, so that the result is that of a single machine.
"""

import gzip
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minillm.data.clean import report as reports
from minillm.data.clean.duplicates import exact_duplicates, near_duplicates, open_signatures
from minillm.data.clean.minhash import N_PERM, choose_bands
from minillm.data.clean.output import DROPPED, RECORDS, SIGNATURES, DroppedRows, Parts, bar
from minillm.data.clean.report import Report
from minillm.data.clean.sift import RECORD

logger = logging.getLogger("minillm")

SHARD_NAME = re.compile(r"shard-(\d+)-of-(\d+)")


def find_shards(folder: Path) -> list[Path]:
    """The shards in a folder, in order. Raises ValueError where one is missing or made otherwise than the first."""
    names = [match for path in sorted(folder.glob("shard-*-of-*")) if (match := SHARD_NAME.fullmatch(path.name))]
    if not names:
        raise ValueError(f"{folder}: no shards there (shard-1-of-4 and so on); --shard i/n makes them")
    counts = sorted({int(name[2]) for name in names})
    if len(counts) > 1:
        raise ValueError(f"{folder}: shards of {' and of '.join(map(str, counts))} parts; leave those of one number")
    shards = [folder / f"shard-{i}-of-{counts[0]}" for i in range(1, counts[0] + 1)]
    missing = [shard.name for shard in shards if not shard.is_dir()]
    if missing:
        raise ValueError(f"{folder}: {', '.join(missing)} is missing; make it with --shard i/{counts[0]}")
    first = reports.load(shards[0])[1]
    for shard in shards:
        settings = reports.load(shard)[1]
        different = [key for key in ("settings", "files") if settings[key] != first[key]]
        if different:
            raise ValueError(f"{shard}: its {' and '.join(different)} are not those of {shards[0]}; make it again")
    return shards


def merge_shards(shards: Sequence[Path], directory: Path, progress: bool | None) -> Report:
    """Write the rows of shards into a directory, in order, but for duplicates of rows before.

    Raises ValueError where no document was read.
    """
    settings = reports.load(shards[0])[1]
    total = Report()
    for shard in shards:
        total.add(reports.load(shard)[0])
    records = np.concatenate([np.fromfile(shard / RECORDS, RECORD) for shard in shards])
    files = [path for path, _ in settings["files"]]
    if not total.documents:
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        raise ValueError(f"data.path: no text in {', '.join(files[:5])}{more}: the corpus is empty")
    rules = duplicates(shards, records["hash"], settings["settings"], directory)

    def source(number: int) -> str:
        return f"{files[records['file'][number]]}:{records['line'][number]}"

    keep_dropped, compress = (settings["settings"][name] for name in ("keep_dropped", "compress"))
    with (
        Parts(directory, compress) as parts,
        DroppedRows(directory, keep_dropped) as dropped,
        bar("writing", len(records), " documents", progress) as shown,
    ):
        for shard in shards if keep_dropped else []:
            with open(shard / DROPPED, "rb") as rows:
                dropped.write(rows)
        for number, row in enumerate(rows_of(shards)):
            rule = next((name for name, first in rules.items() if first[number] != number), None)
            if rule is None:
                parts.write([row])
            else:
                first = source(rules[rule][number])
                record = records[number]
                total.drop_kept(rule, int(record["read"]), int(record["written"]), source(number), first)
                dropped.write([with_rule(row, rule, first)] if keep_dropped else [])
            shown.update()
    if not total.kept:
        logger.warning("no document is left; the report says which rule dropped how many")
    reports.save(total, directory, {**settings, "share": [1, 1]})
    return total


def duplicates(
    shards: Sequence[Path], hashes: np.ndarray, settings: dict[str, Any], directory: Path
) -> dict[str, np.ndarray]:
    """For each rule about duplicates that is in use the first document of each one's group."""
    found = {}
    if settings["exact"]:
        found["duplicate"] = exact_duplicates(np.ascontiguousarray(hashes))
    if settings["near"]:
        with all_signatures(shards, directory) as path:
            bands, rows = choose_bands(settings["near"], N_PERM)
            signatures = open_signatures(path, N_PERM)
            found["near_duplicate"] = near_duplicates(signatures, bands, rows, settings["near"], directory)
    return found


@contextmanager
def all_signatures(shards: Sequence[Path], directory: Path) -> Iterator[Path]:
    """One file with the signatures of all shards: that of a single one, or a copy of them, removed at the end."""
    if len(shards) == 1:
        yield shards[0] / SIGNATURES
        return
    path = directory / SIGNATURES
    try:
        with open(path, "wb") as together:
            for shard in shards:
                with open(shard / SIGNATURES, "rb") as file:
                    shutil.copyfileobj(file, together)
        yield path
    finally:
        path.unlink()


def rows_of(shards: Sequence[Path]) -> Iterator[bytes]:
    """The rows of shards as they were written."""
    for shard in shards:
        for part in sorted(shard.glob("part-*.jsonl*")):
            with gzip.open(part) if part.suffix == ".gz" else open(part, "rb") as file:
                yield from file


def with_rule(row: bytes, rule: str, value: str) -> bytes:
    """A row of dropped.jsonl."""
    return (json.dumps({**json.loads(row), "rule": rule, "value": value}, ensure_ascii=False) + "\n").encode()
