"""The same function over a stream of tasks, by several processes, results in order.

A worker is a fresh Python process that knows nothing of the program that asks: no fork (which is unsafe once a
library has threads), no second run of the main script, so it needs no `if __name__ == "__main__"`. It waits at a
socket; when the program that started it is gone, however that happened, the socket closes and the worker ends.
"""

import gc
import os
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, TypeVar

from minillm.data import wire

Task = TypeVar("Task")
Result = TypeVar("Result")

PACKAGE = Path(__file__).parent.parent
AHEAD = 4  # results per worker that may be ready before their turn: bounds memory when one task takes long
FUNCTION, TASK = b"function", b"task"  # what a worker is sent: what to do from now on, or something to do it to
# A worker leaves out the package's __init__, which imports torch: seconds and hundreds of MB a process.
START = """
import sys, types
sys.path[:] = {path!r}
sys.modules["minillm"] = types.ModuleType("minillm")
sys.modules["minillm"].__path__ = [{package!r}]
from minillm.data.workers import serve
serve({handle})
"""


def count_workers(wanted: int | None, size: int, small: int) -> int:
    """How many processes work on so many bytes: as many as are wanted; else one up to `small`, then one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or (1 if size <= small else cores)


class Outcome(NamedTuple):
    """What became of a task: its result, or the error to raise when its turn comes."""

    result: object = None
    error: Exception | None = None


class Answer(NamedTuple):
    """What a worker sends back: the result of a task, or what is wrong with it or with us."""

    result: object = None
    users_error: str | None = None
    our_error: str | None = None


class Workers:
    """Processes for as long as the `with` block lasts; with one, everything happens in this process."""

    def __init__(self, count: int):
        self.count = count
        self.processes: dict[Connection, subprocess.Popen] = {}

    def __enter__(self) -> "Workers":
        try:
            for _ in range(self.count if self.count > 1 else 0):
                ours, theirs = socket.socketpair()
                with theirs:
                    code = START.format(path=sys.path, package=str(PACKAGE), handle=theirs.fileno())
                    process = subprocess.Popen(
                        [sys.executable, "-c", code],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        process_group=0,  # Ctrl-C in the terminal reaches us alone, and we tell them
                    )
                self.processes[Connection(ours.detach())] = process
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self.processes.items():
            connection.close()
            process.terminate()
        for process in self.processes.values():
            process.wait()
        self.processes.clear()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """function(task) for each task, in order; the first error, in order of the tasks, is raised.

        The function, the tasks and the results must be what `wire` can spell. Raises ValueError when a worker dies.
        """
        if not self.processes:
            yield from map(function, tasks)
            return
        packed = wire.pack(function)
        for connection in self.processes:
            self.send(connection, FUNCTION, packed)
        upcoming = guarded(tasks)
        queue: deque[tuple[int, object]] = deque()  # read ahead, so that a worker that is done gets its next at once
        idle = list(self.processes)
        working: dict[Connection, int] = {}
        done: dict[int, Outcome] = {}
        read = yielded = 0
        while True:
            while len(queue) < self.count and read - yielded < AHEAD * self.count:
                outcome = next(upcoming, None)
                if outcome is None:
                    break
                if outcome.error is None:
                    queue.append((read, outcome.result))
                else:
                    done[read] = outcome
                read += 1
                if idle and queue:
                    self.hand_over(idle.pop(), queue, working)
            if not working and not queue and yielded == read:
                return
            for connection in wait(list(working)) if working else ():
                index = working.pop(connection)
                done[index] = self.receive(connection)
                idle.append(connection)
                if queue:
                    self.hand_over(idle.pop(), queue, working)
            while yielded in done:
                outcome = done.pop(yielded)
                yielded += 1
                if outcome.error is not None:
                    raise outcome.error
                yield outcome.result

    def hand_over(self, connection: Connection, queue: deque, working: dict[Connection, int]) -> None:
        index, task = queue.popleft()
        self.send(connection, TASK, wire.pack(task))
        working[connection] = index

    def send(self, connection: Connection, kind: bytes, frames: wire.Frames) -> None:
        try:
            wire.send(connection, [kind, *frames])
        except OSError:
            raise self.death(connection) from None

    def receive(self, connection: Connection) -> Outcome:
        try:
            answer = wire.unpack(wire.receive(connection))
        except (EOFError, OSError):
            raise self.death(connection) from None
        if answer.users_error is not None:
            return Outcome(error=ValueError(answer.users_error))
        if answer.our_error is not None:
            return Outcome(error=RuntimeError(answer.our_error))
        return Outcome(answer.result)

    def death(self, connection: Connection) -> ValueError:
        code = self.processes[connection].wait()
        reason = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        memory = "; perhaps memory ran out: try fewer data.workers" if code == -9 else ""
        return ValueError(f"a worker process {reason}{memory}")


def guarded(tasks: Iterable[Task]) -> Iterator[Outcome]:
    """Each task, and last the error that ends the tasks, if one does, to be raised when its turn comes."""
    try:
        for task in tasks:
            yield Outcome(task)
    except Exception as error:
        yield Outcome(error=error)


def serve(handle: int) -> None:
    """What a worker does: for each task that arrives, send its answer; end when the socket closes."""
    gc.freeze()  # what was imported stays: the garbage collector need not look through it again and again
    connection = Connection(handle)
    packed, function = [], None
    try:
        while True:
            kind, *frames = wire.receive(connection)
            if kind == FUNCTION:
                packed, function = frames, None
                continue
            try:
                function = function or find_function(packed)
                answer = wire.pack(Answer(function(wire.unpack(frames))))
            except ValueError as error:
                answer = wire.pack(Answer(users_error=str(error)))
            except Exception:
                answer = wire.pack(Answer(our_error=f"in a worker process:\n{traceback.format_exc()}"))
            wire.send(connection, answer)
    except (EOFError, OSError):  # the program that asked is gone
        os._exit(0)


def find_function(frames: list[bytes]) -> Callable:
    try:
        return wire.unpack(frames)
    except (ImportError, AttributeError):  # a tokenizer of the user's own, whose module needs the package's __init__
        sys.modules.pop("minillm")
        return wire.unpack(frames)
