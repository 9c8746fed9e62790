"""What can happen to the checkpoints of two ranks: damage, crashes and refusals at every step of a save."""

import errno
import fcntl
import itertools
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from minillm import checkpoint
from minillm.distributed.context import connect
from minillm.tensors import is_sharded, local_part

SHAPES = {"weight": (7, 5), "bias": (7,), "optim.exp_avg.weight": (7, 5), "optim.exp_avg.bias": (7,), "optim.step": ()}


def numbers(step: int) -> dict[str, torch.Tensor]:
    """What one process has at a step."""
    return {name: torch.full(shape, float(step)) for name, shape in SHAPES.items()}


def sharded(step: int) -> dict[str, torch.Tensor]:
    """What this rank has of it: rows of the parameters and moments, and the whole of the number of steps."""
    tensors = {}
    for prefix in ("", "optim.exp_avg."):
        layer = nn.Linear(5, 7)
        fully_shard(layer)
        tensors |= {f"{prefix}{name}": parameter for name, parameter in layer.named_parameters()}
    tensors["optim.step"] = torch.zeros(())
    with torch.no_grad():
        for tensor in tensors.values():
            local_part(tensor)[0].fill_(step)
    return tensors


def step_of(path: Path) -> int:
    """The step whose numbers a checkpoint holds: all of them the same, or it would be a mixture."""
    into = numbers(-1)
    state = checkpoint.load_tensors(path, into)
    found = {float(value) for tensor in into.values() for value in tensor.flatten()}
    assert found == {float(state["step"])}
    return state["step"]


def save_each(directory: str, steps: list[int]) -> None:
    with connect("cpu") as dist:
        for step in steps:
            checkpoint.save(directory, step, sharded(step), {"step": step}, dist=dist)


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2, each by two ranks. Not to be changed: `copied` is."""
    directory = tmp_path_factory.mktemp("series")
    run_ranks(2, save_each, str(directory), [1, 2])
    return directory


@pytest.fixture
def copied(series, tmp_path) -> Path:
    return shutil.copytree(series, tmp_path / "copied")


FILES = [
    "manifest.json",
    "state.json",
    *(f"{part}-0000{rank}.safetensors" for part in ("model", "optim") for rank in "01"),
]


# --- damage -----------------------------------------------------------------------------------------------------------


def damages(seed: int, flips: int) -> Iterator[tuple[str, Callable[[bytes], bytes | None]]]:
    """(file, its bytes -> what becomes of them): gone, truncated, and with one byte changed."""
    for file in FILES:
        yield file, lambda data: None
        yield file, lambda data: b""
        yield file, lambda data: data[: len(data) // 2]
        yield file, lambda data: data[:-1]
    random.seed(seed)
    for file in random.choices(FILES, k=flips):
        yield file, partial(with_a_byte_changed, where=random.random(), to=random.randrange(1, 256))


def with_a_byte_changed(data: bytes, where: float, to: int) -> bytes:
    at = int(where * len(data))
    return data[:at] + bytes([data[at] ^ to]) + data[at + 1 :]


def assert_found_out(directory: Path, file: str, damage: Callable, caplog) -> None:
    """Loading names the file and changes nothing; the previous checkpoint is used, with a warning that names it too."""
    newest = directory / "step-00000002"
    whole = (newest / file).read_bytes()
    damaged = damage(whole)
    if damaged is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(damaged)
    into = numbers(-1)
    with pytest.raises(ValueError, match=file):
        checkpoint.load_tensors(newest, into)
    assert all((tensor == -1).all() for tensor in into.values())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="minillm"):
        assert step_of(checkpoint.latest(directory)) == 1
    assert f"step-00000002/{file}" in caplog.text
    (newest / file).write_bytes(whole)


def test_damage_to_any_file_is_found_out_before_anything_is_loaded(copied, caplog):
    for file, damage in damages(seed=0, flips=20):
        assert_found_out(copied, file, damage, caplog)
    assert step_of(checkpoint.latest(copied)) == 2


@pytest.mark.soak
def test_two_hundred_changed_bytes_are_found_out(copied, caplog):
    for file, damage in damages(seed=1, flips=200):
        assert_found_out(copied, file, damage, caplog)


def load_what_is_damaged(directory: str) -> list[str]:
    """What this rank is told of each damaged file, having loaded nothing; and which checkpoint all then use."""
    said = []
    with connect("cpu") as dist:
        newest = Path(directory) / "step-00000002"
        for file in FILES:
            whole = (newest / file).read_bytes()
            dist.barrier()
            if dist.is_main:
                (newest / file).write_bytes(with_a_byte_changed(whole, 0.9, 1))
            dist.barrier()
            into = sharded(-1)
            try:
                checkpoint.load_tensors(newest, into, dist=dist)
            except ValueError as error:
                said.append(str(error))
            assert all((local_part(tensor)[0] == -1).all() for tensor in into.values())
            said.append(checkpoint.latest(directory, dist=dist).name)
            if dist.is_main:
                (newest / file).write_bytes(whole)
            dist.barrier()
        into = sharded(-1)
        assert checkpoint.load_tensors(newest, into, dist=dist) == {"step": 2}
        full = [t.full_tensor() if is_sharded(t) else t for t in into.values()]
        assert all((tensor == 2).all() for tensor in full)
    return said


def test_damage_to_any_file_is_found_out_by_all_ranks(copied):
    for said in run_ranks(2, load_what_is_damaged, str(copied)):
        assert len(said) == 2 * len(FILES)
        for file, refused, used in zip(FILES, said[::2], said[1::2]):
            assert f"step-00000002/{file}: " in refused
            assert used == "step-00000001"


# --- crashes and refusals at every step of a save ---------------------------------------------------------------------

OPERATIONS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (checkpoint.folder, "write_shard"),
    (Path, "write_bytes"),
    (Path, "write_text"),
]


@contextmanager
def watched(before: Callable[[str, tuple], None], lock: Path) -> Iterator[None]:
    """`before` is called ahead of everything that a save does to the disk; of the ranks only one at a time does any."""
    originals = [getattr(owner, name) for owner, name in OPERATIONS]
    inside = False

    def watch(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            with open(lock, "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                inside = True
                try:
                    before(name, args)
                    if name != "write_shard":
                        return original(*args, **kwargs)
                finally:
                    inside = False
            return original(*args, **kwargs)  # which flushes, and so comes here again

        return call

    for (owner, name), original in zip(OPERATIONS, originals):
        setattr(owner, name, watch(name, original))
    try:
        yield
    finally:
        for (owner, name), original in zip(OPERATIONS, originals):
            setattr(owner, name, original)


def save_and_keep_every_moment(directory: str, step: int) -> list[int]:
    """Save over step 1, with a copy of the directory made before each operation; the files that were flushed."""
    flushed, moments = [], itertools.count()
    lock = Path(directory).with_suffix(".lock")
    with connect("cpu") as dist:

        def keep(name: str, args: tuple) -> None:
            if name == "fsync":
                flushed.append(os.fstat(args[0]).st_ino)
            shutil.copytree(directory, f"{directory}-{dist.rank}-{next(moments):03d}")

        checkpoint.save(directory, 1, sharded(1), {"step": 1}, dist=dist)
        tensors = sharded(2)
        with watched(keep, lock):
            checkpoint.save(directory, step, tensors, {"step": 2}, keep_last=1, dist=dist)
    return flushed


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_whenever_all_ranks_are_killed_the_old_checkpoint_or_the_new_one_is_there(tmp_path, step):
    directory = tmp_path / "checkpoints"
    flushed = run_ranks(2, save_and_keep_every_moment, str(directory), step)
    (saved,) = directory.iterdir()
    assert {path.stat().st_ino for path in [saved, *saved.iterdir()]} <= {*flushed[0], *flushed[1]}
    found = {0: [], 1: []}
    for moment in sorted(tmp_path.glob("checkpoints-*")):
        found[int(moment.name.split("-")[1])].append(step_of(checkpoint.latest(moment)))
    assert min(map(len, found.values())) >= 4  # two shards and a directory flushed, on rank 1 too
    assert sum(map(len, found.values())) > 20
    assert set(found[1]) == {1}  # what rank 1 does, it does before the commit
    assert found[0] == sorted(found[0])
    assert set(found[0]) == {1, 2}


def save_with_failures(directory: str) -> int:
    """Every operation of a save fails once, on one rank and then on the other; how often that was."""
    failures = 0
    with connect("cpu") as dist:
        for victim, step in itertools.product((0, 1), (2, 1)):
            for at in itertools.count(1):
                place = Path(directory) / f"{victim}-{step}-{at}"
                checkpoint.save(place, 1, sharded(1), {"step": 1}, dist=dist)
                calls = itertools.count(1)

                def fail(*_: object, calls=calls, at=at) -> None:
                    if next(calls) == at:
                        raise OSError(errno.ENOSPC, "No space left on device")

                error = None
                with watched(fail if dist.rank == victim else lambda *_: None, Path(f"{place}.lock")):
                    try:
                        checkpoint.save(place, step, sharded(2), {"step": 2}, keep_last=1, dist=dist)
                    except ValueError as problem:
                        error = str(problem)
                told = dist.gather(error)
                if any(told):
                    assert all("cannot be written: the disk is full" in text for text in told), told
                if dist.is_main:
                    assert step_of(checkpoint.latest(place)) in ((1, 2) if error else (2,))
                    assert not list(place.glob(".*")), list(place.iterdir())
                if not dist.any(dist.rank == victim and next(calls) > at):
                    break
                failures += 1
                dist.barrier()
    return failures


def test_what_is_refused_at_any_step_of_a_save_is_heard_of_by_all_and_leaves_a_checkpoint(tmp_path):
    failures = run_ranks(2, save_with_failures, str(tmp_path))
    assert failures[0] == failures[1] > 30
