"""The files that cleaning writes: rows of JSONL in parts of a bounded size, and the rows that were dropped."""

import gzip
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from tqdm import tqdm

PART = 2**28  # bytes of a part, before it is packed
RECORDS, SIGNATURES, DROPPED = "records.bin", "signatures.bin", "dropped.jsonl"


class Parts:
    """part-00000.jsonl and so on, or .jsonl.gz: a new one where the next row would make the last too large."""

    def __init__(self, directory: Path, compress: bool):
        self.directory, self.compress = directory, compress
        self.count = self.size = 0
        self.stack = ExitStack()
        self.file: IO[bytes] | None = None

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def write(self, rows: Iterable[bytes]) -> None:
        """Append rows, each a line with its end."""
        for row in rows:
            if self.file is None or self.size + len(row) > PART:
                self.file = self.open_next()
            self.file.write(row)
            self.size += len(row)

    def open_next(self) -> IO[bytes]:
        self.stack.close()
        path = self.directory / f"part-{self.count:05d}.jsonl{'.gz' if self.compress else ''}"
        self.count, self.size = self.count + 1, 0
        file = self.stack.enter_context(open(path, "wb"))  # noqa: SIM115 (the stack closes it)
        if self.compress:  # without name and time, so that the same rows are the same bytes
            file = self.stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        return file


class DroppedRows:
    """dropped.jsonl, where it is asked for."""

    def __init__(self, directory: Path, wanted: bool):
        self.path = directory / DROPPED if wanted else None

    def __enter__(self) -> "DroppedRows":
        self.file = open(self.path, "wb") if self.path else None
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()

    def write(self, rows: Iterable[bytes]) -> None:
        """Append rows."""
        if self.file:
            self.file.writelines(rows)


def bar(title: str, total: int, unit: str, progress: bool | None) -> tqdm:
    """A progress bar; None: where there is a terminal."""
    disable = None if progress is None else not progress
    return tqdm(total=total, unit=unit, unit_scale=True, desc=title, disable=disable, leave=False)
