"""Files that are whole or not there: atomic writes, locks that die with their holder, hashes.

The order is always the same: write beside the target, fsync, rename, fsync the parent directory. A reader, or a
restart after a power cut, sees the old content or the new, never a part.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from weakref import WeakSet

TEMPORARY = re.compile(r"\..+\.([A-Za-z0-9-]+)\.(\d+)\.tmp")  # .NAME.MACHINE.PROCESS.tmp
DAY = 24 * 60 * 60.0  # seconds


class BusyError(ValueError):
    """Another live process holds the lock."""


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, read a block at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file and line when it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; the file is damaged") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def fsync_directory(path: str | Path) -> None:
    """Make the names in a directory (files created, renamed, removed) survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(path: str | Path) -> None:
    """Make a directory and all that it holds survive a power cut."""
    for file in sorted(Path(path).rglob("*")):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        else:
            fsync_directory(file)
    fsync_directory(path)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Replace a file's content in one step. Raises ValueError when the disk is full or the place read-only."""
    path = Path(path)
    remove_leftovers(path)
    temporary = temporary_for(path)
    try:
        with explained(path), open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        with suppress(OSError):  # what went wrong is already on its way
            temporary.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove what writers of a file that died before their rename have left beside it."""
    for leftover in leftovers(path):
        with suppress(OSError):  # it is in nobody's way
            leftover.unlink()


def leftovers(path: Path) -> Iterator[Path]:
    """What writers of a file or directory that are dead have left beside it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_abandoned(leftover):
            yield leftover


def free_directory(path: str | Path) -> Path:
    """The path of a directory to write for the first time, without what killed processes have left of it.

    Raises ValueError where it is not empty, or a file.
    """
    path = Path(path)
    for leftover in leftovers(path):
        shutil.rmtree(leftover, ignore_errors=True)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"out: {path} is {'not empty' if path.is_dir() else 'a file'}; choose another folder")
    return path


def temporary_for(path: Path) -> Path:
    """Where this process writes a file or directory before it gets its name: on a shared disk no other does."""
    return path.with_name(f".{path.name}.{machine()}.{os.getpid()}.tmp")


def is_abandoned(temporary: Path) -> bool:
    """Whether the process that wrote it is dead. Of another machine's nothing is known, so its file stays for a day."""
    name = TEMPORARY.fullmatch(temporary.name)
    if name is None:
        return False
    if name[1] == machine():
        return not is_alive(int(name[2]))
    with suppress(OSError):
        return time.time() - temporary.stat().st_mtime > DAY
    return False


def machine() -> str:
    """What processes that know each other by number have in common: a machine since it was started, or a container.

    It is a word for names of files. The host's name, with which it begins, does not tell: machines made from one image
    may all have the same, and so may containers on one of them.
    """
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())
    with suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbers = f"{started} {os.readlink('/proc/self/ns/pid')}"
        return f"{host}-{hashlib.sha256(numbers.encode()).hexdigest()[:8]}"
    return host


def is_alive(process: int) -> bool:
    """True when a process of that id exists."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and is removed when it does not.

    An existing `path` is replaced: set aside, whole, for the moment between two renames, and removed after them.
    Raises ValueError when the disk is full or the place read-only.
    """
    path = Path(path)
    temporary, aside = temporary_for(path), temporary_for(path.with_name(f"{path.name}.old"))
    with explained(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            fsync_tree(temporary)
            if path.exists():
                os.replace(path, aside)
            try:
                os.replace(temporary, path)
            except BaseException:
                if aside.exists():
                    os.replace(aside, path)
                raise
            fsync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into one line a person can act on."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space, nothing was changed",
        errno.EFBIG: "the file would be larger than this process may write (ulimit -f); nothing was changed",
        errno.EDQUOT: "the disk quota is used up; free some space, nothing was changed",
        errno.EROFS: "the file system is read-only; choose another directory",
        errno.EACCES: "no permission to write there; choose another directory",
        errno.EPERM: "no permission to write there; choose another directory",
        errno.ENOTDIR: "a file is where a directory is needed; choose another directory",
        errno.EEXIST: "a file is where a directory is needed; choose another directory",  # what mkdir says
    }
    try:
        yield
    except OSError as error:
        if error.errno not in advice or not concerns(error, path):
            raise
        raise ValueError(f"{path}: cannot be written: {advice[error.errno]}") from error


def concerns(error: OSError, path: str | Path) -> bool:
    """Whether an error may be about `path`: it names no file, or one beside, above or inside `path`."""
    if not isinstance(error.filename, str):
        return True
    target, named = Path(os.path.abspath(path)), Path(os.path.abspath(error.filename))
    return named.is_relative_to(target.parent) or target.is_relative_to(named)


# The lock files that are open, in one set for the whole process: a forked child inherits them all, and must close them
# so as not to hold a lock when we are dead. Weak, so that a file is here no longer than it is anywhere.
OPEN_LOCKS: WeakSet[IO[str]] = WeakSet()


def close_locks() -> None:
    """Close what a forked child has inherited."""
    for file in list(OPEN_LOCKS):
        file.close()


os.register_at_fork(after_in_child=close_locks)


@contextmanager
def locked(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. The kernel lets go of it when the holder dies, so a lock is never stale.

    Raises BusyError, naming the holder, when another live process has it and `wait` is false.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below; closing is what releases the lock)
    OPEN_LOCKS.add(file)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{path.parent}: in use by {holder}; wait for it, or choose another directory") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
