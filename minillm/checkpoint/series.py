"""The checkpoints of one run: saved atomically, the newest that holds found again, old ones evicted."""

import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from minillm.checkpoint.folder import verify, write_pieces
from minillm.checkpoint.layout import Layout, held_here, lay_out, own_pieces
from minillm.checkpoint.manifest import spell
from minillm.checkpoint.ranks import ALONE, on_main
from minillm.distributed.context import Context
from minillm.files import atomic_directory, fsync_directory, is_abandoned, temporary_for

CHECKPOINT = re.compile(r"step-(\d{8,})(\.old)?")
TEMPORARY = re.compile(r"\.(step-\d{8,}(?:\.old)?)\..+\.tmp")

logger = logging.getLogger("minillm")


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict,
    keep_last: int = 0,
    best_step: int | None = None,
    dist: Context = ALONE,
) -> Path:
    """Write `directory/step-XXXXXXXX` atomically and return it; then keep only the newest `keep_last` (0: all).

    That of `best_step` is kept beside them.

    Every rank calls it and writes its share of what it holds; rank 0's state is saved, and rank 0 commits when the
    files of all are on the disk. What fails on one rank fails on all.

    Only checkpoints that verify count towards `keep_last`. What the new one replaces is removed: that of the same
    step, and those of later steps, which belong to a history that was given up by resuming before them. Nothing is
    removed until the new one is on the disk. One run at a time may write to `directory` (the run's lock).
    Raises ValueError, leaving the earlier ones as they were, when the disk is full or the place read-only.
    """
    layout = lay_out(held_here(tensors), dist)
    spelled = on_main(dist, lambda: spell(state))
    return commit(directory, step, layout, own_pieces(layout, tensors, dist.rank), spelled, keep_last, best_step, dist)


def commit(
    directory: str | Path,
    step: int,
    layout: Layout,
    own: Mapping[str, Tensor],
    state: str,
    keep_last: int,
    best_step: int | None,
    dist: Context,
) -> Path:
    """`save`, of what was laid out before; `own` is what this rank writes of it, `state` the spelled state."""
    path = folder_of(directory, step)
    old = path.with_name(f"{path.name}.old")
    temporary = ExitStack()  # of rank 0: closing it well is the commit

    def begin() -> str:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            fsync_directory(path.parent.parent)
        remove_leftovers(path.parent)
        return str(temporary.enter_context(atomic_directory(path)))

    def end() -> None:
        try:
            if path.exists():  # set aside under a name that `latest` reads: a good one is there at every moment
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            temporary.close()
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise

    with temporary:
        folder = Path(on_main(dist, begin, at=path))
        write_pieces(folder, layout, own, state, step, dist, at=path)
        on_main(dist, end, at=path)
    evict(path, keep_last, best_step, dist)
    return path


def folder_of(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return Path(directory) / f"step-{step:08d}"


def latest(directory: str | Path, skip: str | None = None, dist: Context = ALONE) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; the log names those passed over, and why."""
    return next((path for path in candidates(directory, dist) if is_valid(path, skip, dist)), None)


def candidates(directory: str | Path, dist: Context = ALONE) -> list[Path]:
    """What its name says is a checkpoint, newest first, not verified; what rank 0 sees, on all ranks."""
    return [Path(directory) / name for name in on_main(dist, lambda: names_in(Path(directory)))]


def names_in(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    named = [(CHECKPOINT.fullmatch(path.name), path) for path in directory.iterdir()]
    found = [(int(name[1]), name[2] is None, path.name) for name, path in named if name and path.is_dir()]
    return [name for *_, name in sorted(found, reverse=True)]


def is_valid(path: Path, skip: str | None = None, dist: Context = ALONE) -> bool:
    """True when a checkpoint verifies; what is wrong with it goes to the log."""
    try:
        verify(path, skip, dist)
    except ValueError as error:
        if dist.is_main:
            logger.warning("passed over a broken checkpoint: %s", error)
        return False
    return True


def evict(newest: Path, keep_last: int, best_step: int | None = None, dist: Context = ALONE) -> None:
    """Remove what `newest` replaces, and what is beyond the last `keep_last` that verify, but not that of `best_step`.

    `newest` counts unread, having been hashed as it was written. All ranks verify; rank 0 removes.
    """
    found = candidates(newest.parent, dist)
    doomed = found[: found.index(newest)]
    if dist.is_main:
        for path in doomed:
            logger.info("%s: removed, the run went on from before it", path)
    kept, best = 1, None if best_step is None else f"step-{best_step:08d}"
    for path in found[found.index(newest) + 1 :]:
        if path.name == best:
            continue
        if path.name == f"{newest.name}.old" or kept == keep_last:
            doomed.append(path)
        elif keep_last:
            kept += is_valid(path, dist=dist)
    if dist.is_main:
        for path in doomed:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a half removed one is never taken for a checkpoint."""
    doomed = temporary_for(path)
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("%s: an old checkpoint could not be removed: %s", path, error.strerror)


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that died have left behind: unfinished saves, half removed checkpoints."""
    for path in directory.iterdir():
        name = TEMPORARY.fullmatch(path.name)
        if name and (path == temporary_for(directory / name[1]) or is_abandoned(path)):
            logger.info("%s: removed, the save that it belongs to never finished", path)
            shutil.rmtree(path, ignore_errors=True)
