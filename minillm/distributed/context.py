"""Who this process is among the others, and how numbers are summed over ranks.

One process is the case of one rank of the same code: nothing else in the package asks how many there are.
"""

import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minillm.distributed.device import find_device
from minillm.distributed.heartbeat import (
    GRACE,
    LATER,
    Heartbeat,
    OtherRankError,
    is_request_to_stop,
    leave_at_once,
    this_process,
)
from minillm.distributed.meeting import meet, store_of_torchrun
from minillm.log import LOGGER
from minillm.signals import exit_on_request, handlers

Number = TypeVar("Number", int, float, torch.Tensor)

AXES = ("dp_replicate", "dp_shard", "tp")
LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.2  # between two looks at the store
FIRST_REPORT = 60.0  # seconds of waiting for rank 0; the next ones come after twice as long each


@dataclass(frozen=True)
class Context:
    """This process's place among the ranks, and its device.

    The mesh has the axes dp_replicate, dp_shard and tp; ranks along tp compute one batch together, all others are
    data-parallel. Numbers that live on the host are reduced on the host, so that nobody waits for a device.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    mesh: DeviceMesh | None = None  # None for one process, and until the strategy is known
    dp_group: torch_dist.ProcessGroup | None = None  # the data-parallel ranks; None: all ranks
    group: torch_dist.ProcessGroup | None = None  # all ranks; None: over the links that training uses
    heartbeat: Heartbeat | None = None  # None for one process, which nobody waits for

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes what is written once."""
        return self.rank == 0

    def at(self, place: str, patience: float = 0.0) -> None:
        """Say where this rank is, for the others to name where they wait for it; costs next to nothing.

        All ranks say the same in the same order; the same words once more only say that it moves on. `patience`:
        seconds that the others wait there, where that is more than the timeout.
        """
        if self.heartbeat:
            self.heartbeat.at(place, patience)

    def sum(self, value: Number) -> Number:
        """The sum over the data-parallel ranks, of the kind that it is given: int, float or tensor."""
        return value if self.dp_size == 1 else self.reduced(value, torch_dist.ReduceOp.SUM, self.dp_group)

    def max(self, value: Number) -> Number:
        """The largest over all ranks."""
        return value if self.world_size == 1 else self.reduced(value, torch_dist.ReduceOp.MAX, self.group)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return bool(self.max(int(flag)))

    def reduced(
        self, value: Number, op: torch_dist.ReduceOp.RedOpType, group: torch_dist.ProcessGroup | None = None
    ) -> Number:
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
            torch_dist.all_reduce(value, op, group)
            return value
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        found = torch.tensor(value, dtype=dtype)
        torch_dist.all_reduce(found, op, group)
        return found.item()

    def gather(self, value: Any) -> list[Any]:
        """What JSON can spell, of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        data = as_bytes(value)
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.world_size)]
        torch_dist.all_gather(sizes, torch.tensor(len(data)), self.group)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in sizes]
        torch_dist.all_gather(found, padded, self.group)
        return [from_bytes(one[: int(size)]) for one, size in zip(found, sizes)]

    def broadcast(self, value: Any) -> Any:
        """What JSON can spell, of rank 0, on every rank."""
        if self.world_size == 1:
            return value
        data = as_bytes(value if self.is_main else None)
        size = torch.tensor(len(data))
        torch_dist.broadcast(size, 0, self.group)
        data = data if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        torch_dist.broadcast(data, 0, self.group)
        return from_bytes(data)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.max(0)

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Rank 0 runs the block, then the others do: for what is made once and found there by the rest.

        They wait at the store, not in a collective, so that it may take hours; the heartbeat ends them where rank 0
        dies. Raises OtherRankError, a ValueError, on them where the block fails on rank 0. `what` names the work; a
        name is used once a run.
        """
        if self.world_size == 1:
            yield
            return
        store, key = torch_dist.distributed_c10d._get_default_store(), f"minillm/main_first/{what}"
        self.at(what)
        if not self.is_main:
            self.wait_for_main(store, key, what)
            if failure := store.get(key).decode():
                raise OtherRankError(f"rank 0 failed at {what}: {failure}")
            yield
            return
        try:
            yield
        except SystemExit:  # asked to stop, as the others soon are: nothing has failed
            raise
        except BaseException as error:
            store.set(key, f"{type(error).__name__}: {error}")
            raise
        store.set(key, "")

    def wait_for_main(self, store: torch_dist.Store, key: str, what: str) -> None:
        """Wait until rank 0 has set the key, and say now and then, on a machine without it, what is waited for."""
        start, report = time.monotonic(), FIRST_REPORT
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
            waited = time.monotonic() - start
            if waited > report and self.local_rank == 0:
                host = socket.gethostname()
                print(f"{host}: waiting for rank 0 since {waited:.0f} s: {what}", file=sys.stderr, flush=True)
            report *= 2 if waited > report else 1


def as_bytes(value: Any) -> torch.Tensor:
    """What JSON can spell, as the bytes that ranks send each other."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(data: torch.Tensor) -> Any:
    """What `as_bytes` was given."""
    return json.loads(bytes(data.numpy()))


def ranks_started() -> int:
    """How many processes torchrun, or another launcher that sets its variables, started together with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def connect(device: str = "auto", timeout: float = 600.0) -> Iterator[Context]:
    """The context of this process, from torchrun's environment; the process group ends with the block.

    Until the ranks have left, each has a heartbeat, which ends all where one raises, dies or lets the others wait for
    longer than the timeout. SIGTERM ends the block, with exit code 0, wherever nothing handles it as fit does.

    Args:
        device: "auto" (the accelerator if there is one, else the CPU) or a torch device name such as "cuda:1". Of
            several processes on a machine each takes the accelerator of its local rank.
        timeout: seconds after which ranks that wait for another give up.

    Raises ValueError for a device that is not there, for an environment that is not whole, and for ranks that do not
    find each other.
    """
    with exit_on_request(lambda name: LOGGER.info("%s: stopped", name)):
        world_size = ranks_started()
        if world_size == 1:
            yield Context(find_device(device))
            return
        missing = [name for name in LAUNCHED_WITH if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start with torchrun, "
                "which sets them all, or unset WORLD_SIZE to train on one process"
            )
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if not torch.accelerator.device_count():
            find_device(device)  # what no rank of a machine finds is told by its first, as other mistakes are
        try:
            place = find_local_device(device, local_rank)
            start_process_group(backends_of(place), rank, world_size, timeout)
        except ValueError as error:
            error.add_note(f"rank {rank} ({socket.gethostname()})")  # it may be about this rank alone
            raise
        store = torch_dist.distributed_c10d._get_default_store()
        heartbeat = Heartbeat(store, rank, timeout)
        dist = Context(place, rank, world_size, local_rank, dp_rank=rank, dp_size=world_size, heartbeat=heartbeat)
        try:
            heartbeat.start(dist.gather(this_process()))
            yield dist
        except BaseException as error:
            with handlers(lambda *_: None, signal.SIGTERM, signal.SIGUSR1):  # it ends already
                try:
                    heartbeat.fail(error)
                finally:  # fail may have raised a request to stop in its place
                    end_process_group(at_most=GRACE, code=0 if is_request_to_stop(sys.exception()) else 1)
            raise
        heartbeat.leave()
        end_process_group(at_most=timeout, code=0)


def start_process_group(backends: str, rank: int, world_size: int, timeout: float) -> None:
    """Let the ranks find each other. Collectives give up a little later than the heartbeat, which knows the cause."""
    limit = timedelta(seconds=timeout + LATER)
    try:
        store = store_of_torchrun(timeout)
        if store is None:
            torch_dist.init_process_group(backends, timeout=limit)
        else:
            store = meet(store, rank, world_size, timeout)
            torch_dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=limit)
    except (RuntimeError, TimeoutError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = str(error).partition("\n")[0]
        raise ValueError(f"the {world_size} ranks did not all meet at {place} within {timeout:g} s: {said}") from error


def end_process_group(at_most: float, code: int) -> None:
    """Close the connections; where a backend takes longer than so many seconds, the program ends with the exit code."""
    timer = threading.Timer(at_most, leave_at_once, [code])
    timer.daemon = True
    timer.start()
    torch_dist.destroy_process_group()
    timer.cancel()


def backends_of(device: torch.device) -> str:
    """The backends for numbers on the host and for tensors on the device."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{torch_dist.get_default_backend_for_device(device)}"


def find_local_device(name: str, local_rank: int) -> torch.device:
    """The device of one of several processes on a machine: of several accelerators, that of its local rank."""
    count = torch.accelerator.device_count()
    index = device_index(local_rank, count, torch_dist.is_torchelastic_launched())
    if index < count:
        torch.accelerator.set_device_index(index)  # first of all, or each rank takes memory on the first one too
    device = find_device(name)
    if device.type == "cpu":
        return device
    if index >= count:
        raise ValueError(
            f"run.device: {device.type} has {count} devices here, but this is local rank {local_rank}: "
            f"start with --nproc_per_node {count}, or with --run.device cpu"
        )
    return torch.device(device.type, index)


def device_index(local_rank: int, count: int, by_torchrun: bool) -> int:
    """Which of the accelerators that a process sees is its own: that of its local rank, or the only one.

    torchrun shows all processes of a machine the same; Slurm with --gpus-per-task 1 shows each its own.
    """
    return 0 if count == 1 and not by_torchrun else local_rank


def with_mesh(dist: Context, dp_replicate: int, dp_shard: int, tp: int) -> Context:
    """The context with its ranks laid out: tp innermost, where links are fastest, then dp_shard, then dp_replicate."""
    assert dp_replicate * dp_shard * tp == dist.world_size, (dp_replicate, dp_shard, tp, dist.world_size)
    if dist.world_size == 1:
        return dist
    mesh = init_device_mesh(dist.device.type, (dp_replicate, dp_shard, tp), mesh_dim_names=AXES)
    dp_group = mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
    groups = (dp_group, *map(mesh.get_group, AXES)) if dist.heartbeat else ()  # none: ranks that are only thought of
    for group in groups:  # they do not take over the timeout of the group of all
        torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=dist.heartbeat.timeout + LATER), group)
    dp_rank, tp_rank = divmod(dist.rank, tp)
    sizes = {"dp_rank": dp_rank, "dp_size": dp_replicate * dp_shard, "tp_rank": tp_rank, "tp_size": tp}
    return dataclasses.replace(dist, **sizes, mesh=mesh, dp_group=dp_group)


def beside_training(dist: Context, timeout: float) -> Context:
    """The same ranks with links of their own, on the host: to agree in a thread while training communicates."""
    if dist.world_size == 1:
        return dist
    return dataclasses.replace(dist, group=torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
