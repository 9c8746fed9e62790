"""The checkpoints of one run: saved atomically, the newest that holds found again, old ones evicted."""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minillm.checkpoint.folder import verify, write
from minillm.files import atomic_directory, explained, fsync_directory, is_alive

CHECKPOINT = re.compile(r"step-(\d{8,})(\.old)?")
TEMPORARY = re.compile(r"\.step-\d{8,}(?:\.old)?\.(\d+)\.tmp")

logger = logging.getLogger("minillm")


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict,
    keep_last: int = 0,
    best_step: int | None = None,
) -> Path:
    """Write `directory/step-XXXXXXXX` atomically and return it; then keep only the newest `keep_last` (0: all).

    That of `best_step` is kept beside them.

    Only checkpoints that verify count towards `keep_last`. What the new one replaces is removed: that of the same
    step, and those of later steps, which belong to a history that was given up by resuming before them. Nothing is
    removed until the new one is on the disk. One process at a time may write to `directory` (the run's lock).
    Raises ValueError, leaving the earlier ones as they were, when the disk is full or the place read-only.
    """
    path = folder_of(directory, step)
    old = path.with_name(f"{path.name}.old")
    with explained(path):
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            fsync_directory(path.parent.parent)
        remove_leftovers(path.parent)
        try:
            with atomic_directory(path) as folder:
                write(folder, tensors, state, step)
                if path.exists():  # set aside under a name that `latest` reads: a good one is there at every moment
                    shutil.rmtree(old, ignore_errors=True)
                    path.rename(old)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    evict(path, keep_last, best_step)
    return path


def folder_of(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return Path(directory) / f"step-{step:08d}"


def latest(directory: str | Path, skip: str | None = None) -> Path | None:
    """The newest checkpoint that verifies; the log names those passed over, and why."""
    return next((path for path in candidates(directory) if is_valid(path, skip)), None)


def candidates(directory: str | Path) -> list[Path]:
    """What its name says is a checkpoint, newest first, not verified."""
    if not Path(directory).is_dir():
        return []
    named = [(CHECKPOINT.fullmatch(path.name), path) for path in Path(directory).iterdir()]
    found = [(int(name[1]), name[2] is None, path) for name, path in named if name and path.is_dir()]
    return [path for *_, path in sorted(found, reverse=True)]


def is_valid(path: Path, skip: str | None = None) -> bool:
    """True when a checkpoint verifies; what is wrong with it goes to the log."""
    try:
        verify(path, skip)
    except ValueError as error:
        logger.warning("passed over a broken checkpoint: %s", error)
        return False
    return True


def evict(newest: Path, keep_last: int, best_step: int | None = None) -> None:
    """Remove what `newest` replaces, and what is beyond the last `keep_last` that verify, but not that of `best_step`.

    `newest` counts unread, having been hashed as it was written.
    """
    found = candidates(newest.parent)
    for path in found[: found.index(newest)]:
        logger.info("%s: removed, the run went on from before it", path)
        remove(path)
    kept, best = 1, None if best_step is None else f"step-{best_step:08d}"
    for path in found[found.index(newest) + 1 :]:
        if path.name == best:
            continue
        if path.name == f"{newest.name}.old" or kept == keep_last:
            remove(path)
        elif keep_last:
            kept += is_valid(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a half removed one is never taken for a checkpoint."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("%s: an old checkpoint could not be removed: %s", path, error.strerror)


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that died have left behind: unfinished saves, half removed checkpoints."""
    for path in directory.iterdir():
        name = TEMPORARY.fullmatch(path.name)
        if name and (int(name[1]) == os.getpid() or not is_alive(int(name[1]))):
            logger.info("%s: removed, the save that it belongs to never finished", path)
            shutil.rmtree(path, ignore_errors=True)
