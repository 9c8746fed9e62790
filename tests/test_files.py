"""Files are whole or not there, whatever happens in between."""

import errno
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minillm import files
from minillm.files import BusyError, atomic_directory, locked, machine, read_json, sha256, write_atomically

# files.py needs nothing else of the package, so the processes that are killed here import it alone, which is quick
PREAMBLE = f"import os, sys, time; sys.path.insert(0, {str(Path(files.__file__).parent)!r}); import files\n"


def start(code, *arguments):
    """A process that runs `code` and says on its output when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def failing(function, number, filename=None):
    """`function`, but the operating system refuses with this errno."""

    def refuse(*arguments, **keywords):
        raise OSError(number, os.strerror(number), filename)

    return refuse


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    for content in ("first\n", "zwölf 十二\n", b"\x00\xff", ""):
        write_atomically(tmp_path / "a.txt", content)
        assert (tmp_path / "a.txt").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    write_atomically(tmp_path / "a.txt", "old")
    monkeypatch.setattr(files.os, step, failing(step, errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only; choose another directory"),
        (errno.EACCES, "no permission to write there; choose another directory"),
    ],
)
def test_a_refusal_to_write_names_the_place_and_what_to_do(tmp_path, monkeypatch, number, advice):
    write_atomically(tmp_path / "a.txt", "old")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    monkeypatch.setattr(files.os, "fsync", failing("fsync", number))
    with pytest.raises(ValueError, match=rf"a\.txt: cannot be written: {advice}"):
        write_atomically(tmp_path / "a.txt", "new")
    with pytest.raises(ValueError, match=f"d: cannot be written: {advice}"), atomic_directory(tmp_path / "d") as new:
        (new / "new").write_text("new")
    assert names(tmp_path) == ["a.txt", "d"]
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "d" / "old").read_text() == "old"


def test_a_full_disk_is_named(tmp_path):
    """A real one: nothing can be written to /dev/full."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(ValueError, match="the disk is full; free some space, nothing was changed"),
        atomic_directory(tmp_path / "d"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert names(tmp_path) == []


def test_a_file_where_a_directory_should_be_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    for write in (lambda: write_atomically(tmp_path / "a" / "b", ""), lambda: locked(tmp_path / "a" / "b").__enter__()):
        with pytest.raises(ValueError, match="a file is where a directory is needed"):
            write()
    for path in ("a", "a/b", "a/b/c"):
        with (
            pytest.raises(ValueError, match="a file is where a directory is needed"),
            atomic_directory(tmp_path / path),
        ):
            pass
    assert (tmp_path / "a").is_file()


def test_a_refusal_that_is_not_about_the_target_is_not_blamed_on_it(tmp_path):
    """Reading an input that may not be read, while a directory is written, is another mistake than a full disk."""
    with pytest.raises(OSError, match="elsewhere"), atomic_directory(tmp_path / "d"):
        failing("open", errno.EACCES, "/elsewhere/input.txt")()
    assert names(tmp_path) == []


def test_a_directory_appears_whole_with_parents_and_replaces_another(tmp_path):
    path = tmp_path / "deep" / "d"
    for content in ("old", "new"):
        with atomic_directory(path) as temporary:
            assert temporary.parent == path.parent
            (temporary / content).write_text(content)
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(content)
            assert not (path / content).exists()
        assert names(path) == [content, "sub"]
        assert (path / "sub" / "file").read_text() == content
        assert names(path.parent) == ["d"]


def write_and_raise(path, error):
    with atomic_directory(path) as temporary:
        (temporary / "new").write_text("new")
        raise error


def test_a_directory_whose_making_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    for error in (KeyError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_and_raise(tmp_path / "d", error)
        assert names(tmp_path) == ["d"]
        assert names(tmp_path / "d") == ["old"]


def test_a_directory_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    replace = os.replace

    def refuses_the_new_one(source, target):
        if (Path(source) / "new").exists():
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuses_the_new_one)
    with pytest.raises(OSError, match="Input/output error"), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["old"]


def test_all_is_on_disk_before_a_name_appears(tmp_path, monkeypatch):
    """fsync of each file and folder, then the rename, then fsync of the parent: the order that survives a power cut."""
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def record_replace(source, target):
        events.append(("replace", Path(target).name))
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(files.os, "replace", record_replace)
    write_atomically(tmp_path / "a.txt", "x")
    temporary = f".a.txt.{machine()}.{os.getpid()}.tmp"
    assert events == [("fsync", temporary), ("replace", "a.txt"), ("fsync", tmp_path.name)]
    events.clear()
    with atomic_directory(tmp_path / "d") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("x")
    *synced, renamed, parent = events
    assert sorted(name for _, name in synced) == [f".d.{machine()}.{os.getpid()}.tmp", "file", "sub"]
    assert (renamed, parent) == (("replace", "d"), ("fsync", tmp_path.name))


def test_killed_at_any_moment_a_file_is_the_old_or_the_new_one(tmp_path):
    code = """
content = "0"
files.write_atomically(sys.argv[1], content)
print("ready", flush=True)
for i in range(1, 10**9):
    files.write_atomically(sys.argv[1], str(i % 10) * 300_000)
"""
    rng = random.Random(0)
    for _ in range(5):
        process = start(code, tmp_path / "a.txt")
        for _ in range(20):
            time.sleep(rng.random() / 100)
            content = (tmp_path / "a.txt").read_text()
            assert content == "0" or content == content[0] * 300_000
        end(process)
        content = (tmp_path / "a.txt").read_text()
        assert content == "0" or content == content[0] * 300_000


def test_killed_at_any_moment_a_directory_is_whole(tmp_path):
    code = """
from pathlib import Path
print("ready", flush=True)
for i in range(10**9):
    with files.atomic_directory(sys.argv[1]) as temporary:
        for j in range(20):
            (temporary / f"{j}").write_text(str(i))
"""
    rng = random.Random(0)
    for _ in range(5):
        process = start(code, tmp_path / "d")
        time.sleep(0.05 + rng.random() / 20)
        end(process)
        if (tmp_path / "d").exists():
            assert len(names(tmp_path / "d")) == 20
            assert len({path.read_text() for path in (tmp_path / "d").iterdir()}) == 1
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "last").write_text("")
    assert names(tmp_path / "d") == ["last"]


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs = [f".a.txt.{machine()}.{os.getppid()}.tmp", f".b.txt.{machine()}.{dead.pid}.tmp", ".a.txt.notes.tmp"]
    for name in (*theirs, f".a.txt.{machine()}.{dead.pid}.tmp"):
        (tmp_path / name).write_text("half")
    write_atomically(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == sorted([*theirs, "a.txt"])


def test_what_a_process_of_another_machine_writes_is_left_alone_for_a_day(tmp_path):
    """Its id says nothing here: there may be no such process on this machine, or another one."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = machine().rpartition("-")[0]  # a name that another machine may have too
    for process in (f"another-{machine()}.{dead.pid}", f"{host}.{dead.pid}", f"node-7.{os.getpid()}"):
        path = tmp_path / f".a.txt.{process}.tmp"
        path.write_text("half")
        write_atomically(tmp_path / "a.txt", "whole")
        assert path.exists()
        os.utime(path, (time.time(), time.time() - 25 * 60 * 60))
        write_atomically(tmp_path / "a.txt", "whole")
        assert not path.exists()


HOLD = """
with files.locked(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_others_out_and_names_its_holder(tmp_path):
    process = start(HOLD, tmp_path / "run" / "lock")
    try:
        with pytest.raises(BusyError, match=rf"run: in use by process {process.pid} on \S+; wait for it, or choose"):
            locked(tmp_path / "run" / "lock").__enter__()
    finally:
        end(process)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_dies_with_its_holder(tmp_path, ending):
    process = start(HOLD, tmp_path / "lock")
    process.send_signal(ending)
    process.wait()
    process.stdout.close()
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_dies_with_its_holder_even_where_a_forked_child_lives_on(tmp_path):
    code = """
lock = files.locked(sys.argv[1])
lock.__enter__()
if os.fork() == 0:
    os.write(1, str(os.getpid()).encode() + b"\\n")
    time.sleep(60)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        with pytest.raises(BusyError):
            locked(tmp_path / "lock").__enter__()
        end(process)
        os.kill(child, 0)  # it lives
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_many_locks_leave_nothing_behind(tmp_path):
    for _ in range(5):
        with locked(tmp_path / "lock"):
            assert len(files.OPEN_LOCKS) == 1
        gc.collect()
        assert len(files.OPEN_LOCKS) == 0


def test_a_lock_is_free_again_after_its_block_also_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    with locked(tmp_path / "lock"), pytest.raises(BusyError), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):
        pass


def test_those_that_wait_for_a_lock_enter_one_by_one(tmp_path):
    inside, most = [], []

    def enter(_):
        with locked(tmp_path / "lock", wait=True):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1] * 8


def test_a_hash_is_that_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True], "八": "ü"}
    write_atomically(tmp_path / "a.json", json.dumps(value))
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1,\n "b": }', r"a\.json:2: not valid JSON"),
        (b"", r"a\.json:1: not valid JSON"),
        (b"[1]", r"a\.json: a JSON object is expected, found list"),
        (b'{"a": "\xff"}', r"a\.json: not UTF-8 at byte 7"),
        (None, r"a\.json: cannot be read: No such file or directory"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_json(tmp_path / "a.json")
