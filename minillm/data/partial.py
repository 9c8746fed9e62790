"""What an interrupted preparation leaves for the next call: the tokens so far, and how far that is.

    .NAME.partial/        beside NAME, the folder that is being prepared
        tokens/           the files that it will consist of
        counts.json       what the first reading found
        progress.json     how many blocks are written, and the length of each file then

Every KEEP_EVERY seconds the files are synced, then progress.json is replaced, so it never promises more than there is;
what a file has beyond it is cut off by the next call. What takes less time than that leaves nothing and is done again.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minillm.data.store import json_hash
from minillm.data.writing import StaleError
from minillm.files import BusyError, fsync_directory, fsync_tree, locked, read_json, write_atomically

logger = logging.getLogger("minillm")

VERSION = 1  # raise it when files are cut into other blocks or pieces, so that nothing is continued in another way
KEEP_EVERY = 30  # seconds of work that may be lost; syncing the files takes some hundredths of one


class Partial:
    """The partial work on one folder; the caller holds its lock."""

    def __init__(self, directory: Path):
        self.directory, self.folder = directory, partial_folder(directory)
        self.tokens = self.folder / "tokens"
        self.last_kept = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to keep something."""
        return time.monotonic() - self.last_kept >= KEEP_EVERY

    def keep(self, name: str, content: dict) -> None:
        """Replace counts.json or progress.json; all that it speaks of is synced."""
        fsync_directory(self.tokens)
        content = content | {"version": VERSION}
        write_atomically(self.folder / name, json.dumps(content | {"hash": json_hash(content)}))
        self.last_kept = time.monotonic()

    def kept(self, name: str) -> dict | None:
        """What was kept under that name, if anything. Raises StaleError where it is damaged or of another version."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content = read_json(path)
        except ValueError as error:
            raise StaleError(str(error)) from None
        if content.get("hash") != json_hash(content) or content["version"] != VERSION:
            raise StaleError(f"{path}: damaged, or of another version")
        return content

    def holds_work(self) -> bool:
        return any((self.folder / name).exists() for name in ("counts.json", "progress.json"))

    def publish(self) -> None:
        """Give the finished tokens their name."""
        fsync_tree(self.tokens)
        os.replace(self.tokens, self.directory)
        fsync_directory(self.directory.parent)
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


@contextmanager
def partial_work(directory: Path) -> Iterator[Partial]:
    """The partial work on a folder, which appears when the block ends well; else what was kept stays for the next."""
    work = Partial(directory)
    if not (work.folder / "progress.json").exists():
        shutil.rmtree(work.tokens, ignore_errors=True)  # files that nothing speaks of
    work.tokens.mkdir(parents=True, exist_ok=True)
    try:
        yield work
        work.publish()
    except BaseException as error:
        if isinstance(error, StaleError) or not work.holds_work():
            shutil.rmtree(work.folder, ignore_errors=True)
        else:
            logger.info("%s: interrupted; what is done stays in %s, for the same call again", directory, work.folder)
        raise


def name_leftovers(directory: Path) -> None:
    """Say what interrupted preparations of the same name, but other text or settings, have left."""
    stem, _, fingerprint = directory.name.rpartition("-")
    for folder in sorted(directory.parent.glob(f".{stem}-{'?' * len(fingerprint)}.partial")):
        other = directory.with_name(folder.name.removeprefix(".").removesuffix(".partial"))
        if other != directory:
            with suppress(BusyError), locked(other.with_name(f"{other.name}.lock")):  # else it is being worked on
                megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
                logger.info("%s: %.1f MB of interrupted work on other text or settings", folder, megabytes)
