"""Functions run in several processes at once, as torchrun would start them.

Four workers live for the whole session, because starting one takes seconds; each call makes a process group of its own.
"""

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

MOST = 4
SECONDS = 120  # a call that takes longer hangs
workers: list[tuple[multiprocessing.Process, Connection]] = []


def run_ranks(n: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """The results of `function(*args)` on each of n ranks, whose environment is torchrun's.

    Raises AssertionError with the tracebacks of the ranks that raised, and TimeoutError where some do not come back.
    """
    assert 1 <= n <= MOST, n
    while len(workers) < n:
        start_worker()
    port = free_port()
    for rank, (_, connection) in enumerate(workers[:n]):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        connection.send((function, args, {name: str(value) for name, value in place.items()}))
    waiting = {connection: rank for rank, (_, connection) in enumerate(workers[:n])}
    results, failures = [None] * n, {}
    while waiting:
        ready = wait(list(waiting), timeout=5 if failures else seconds)  # who waits for a rank that raised is let go
        if not ready:
            stop_workers()
            if failures:
                break
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {n} did not come back within {seconds:g} s")
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = False, "the process died"
            if ok:
                results[rank] = value
            else:
                failures[rank] = value
    if failures:
        stop_workers()
        raise AssertionError("\n".join(f"rank {rank} of {n}:\n{text}" for rank, text in failures.items()))
    return results


def start_worker() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    workers.append((process, ours))


def stop_workers() -> None:
    """End all of them: the next call starts new ones."""
    for process, connection in workers:
        process.kill()
        connection.close()
    workers.clear()


atexit.register(stop_workers)


def serve(connection: Connection) -> None:
    """What a worker does: call what it is sent, and send back what comes out."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, place = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        os.environ.update(place)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        if "torch.distributed.tensor" in sys.modules:  # whose cache holds the meshes of the process group that is gone
            from torch.distributed.tensor.debug import _clear_sharding_prop_cache

            _clear_sharding_prop_cache()
        connection.send(answer)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
