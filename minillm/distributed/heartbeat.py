"""Ranks that watch each other, so that none waits for ever for one that raised, died or sleeps.

In each process a thread tells the ranks' common store about once a second where the rank is, and looks there for the
first failure. Once there is one it ends its process, because the main thread may hang in a collective for good:

    a rank raises                   it tells the store before it leaves
    a process dies without a word   the ranks of its machine miss it
    a rank comes no further         the first and the last rank, who watch all, find who is behind
    the store itself is gone        every rank finds that by itself
"""

import json
import logging
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as torch_dist

from minillm.files import is_alive, machine
from minillm.log import LOGGER, TOLD, one_line

PERIOD = 1.0  # seconds between two beats
GRACE = 2.0  # seconds in which a process may come to its end by itself
LATER = 5.0  # seconds by which collectives give up after the heartbeat, which knows the cause
LAST_LINES = 12  # of a traceback, told under --debug
LIBRARIES = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib"))
COMMUNICATION = f"{os.sep}torch{os.sep}distributed{os.sep}"
STORE_IS_GONE = RuntimeError  # what every operation of a store raises then, DistError being one


class Process(NamedTuple):
    """Where a rank runs."""

    host: str
    machine: str  # on which its number means this process
    number: int


class OtherRankError(ValueError):
    """Raised on a rank because of what happened on another, which tells of it itself."""


class Heartbeat:
    """Says for one rank where it is, and ends its process when another has failed.

    Args: store: of all ranks. timeout: seconds that ranks may wait for another.
    """

    def __init__(self, store: torch_dist.Store, rank: int, timeout: float):
        self.rank, self.timeout = rank, timeout
        self.store, self.own_store = connection(store, timeout), connection(store, timeout)  # one for each thread
        self.processes: list[Process] = []
        self.place, self.patience, self.turn, self.moves = "the start", 0.0, 0, 0
        self.main_thread = threading.get_ident()
        self.leaving = threading.Event()  # the main thread is on its way out
        self.seen: dict[int, tuple[int, float]] = {}  # moves of each rank, and since when
        self.thread = threading.Thread(target=self.run, name="heartbeat", daemon=True)
        self.beat()

    # --- the main thread ----------------------------------------------------------------------------------------------

    def start(self, processes: Sequence[Sequence[Any]]) -> None:
        """Begin to watch, given `this_process()` of each rank; all ranks have been made before."""
        self.processes = [Process(*process) for process in processes]
        self.thread.start()

    def at(self, place: str, patience: float = 0.0) -> None:
        """Say where this rank is: all ranks the same in the same order; once more the same, to say that it moves on.

        The others wait for it there for at least `patience` seconds.
        """
        if place != self.place:
            self.place, self.patience = place, patience
            self.turn += 1
        self.moves += 1

    def leave(self) -> None:
        """This rank is done. Where it keeps the store of all, it stays until the others are done with it too."""
        self.leaving.set()
        self.thread.join()
        with suppress(STORE_IS_GONE):
            self.store.set(f"beat/{self.rank}", json.dumps({"left": True}))
            self.go(self.store, self.timeout)

    def fail(self, error: BaseException) -> None:
        """This rank leaves because of an error, or of a request to stop, which the others are told.

        An error that only follows from what happened on another rank is marked, so that it is not printed too. Raises
        SystemExit, with code 0, in place of one that follows from a request to stop.
        """
        follows = follows_from_another(error)
        try:
            if follows:
                self.wait_for_cause()
            self.leaving.set()
            if self.thread.is_alive():
                self.thread.join(GRACE)
            if follows and self.store.check(["stop"]):
                LOGGER.info("stopped, as another rank was")
                self.go(self.store, GRACE + 2 * PERIOD)
                raise SystemExit(0)
            asked = is_request_to_stop(error)
            if asked and not self.thread.is_alive():
                self.look_for_dead()  # torchrun asks those to end of whom one has died
            if asked and not self.store.check(["failure"]):
                self.store.set("stop", "")
            elif not asked and self.tell(self.store, self.rank, f"failed at `{self.place}`: {described(error)}"):
                if self.rank:  # rank 0 speaks for all
                    error.add_note(f"{self.name(self.rank)} at `{self.place}`")
            else:
                error.add_note(TOLD)
                self.say(self.store)
            self.go(self.store, GRACE + 2 * PERIOD)
        except STORE_IS_GONE:
            if follows:
                error.add_note(TOLD)
                self.say_that_store_is_gone()

    def wait_for_cause(self) -> None:
        """Leave the rank that failed first, or was asked to stop, the time to say so."""
        end = time.monotonic() + GRACE + 2 * PERIOD
        while not any(self.store.check([key]) for key in ("failure", "stop")) and time.monotonic() < end:
            time.sleep(PERIOD / 10)

    # --- both threads, each with its own connection to the store ------------------------------------------------------

    def go(self, store: torch_dist.Store, seconds: float) -> None:
        """Count this rank as gone; the process that keeps the store waits that long for the others to go too."""
        gone = store.add("gone", 1)
        end = time.monotonic() + seconds
        while self.keeps_store() and gone < len(self.processes) and time.monotonic() < end:
            time.sleep(PERIOD / 50)
            gone = store.add("gone", 0)

    def keeps_store(self) -> bool:
        """Whether the store ends with this process: torchrun keeps it in a process of its own."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)

    def name(self, rank: int) -> str:
        host = self.processes[rank].host if self.processes else socket.gethostname()
        return f"rank {rank} ({host})"

    def tell(self, store: torch_dist.Store, rank: int, what: str) -> bool:
        """Make it known as what ends the run; False where something else was first."""
        failure = json.dumps({"rank": rank, "by": self.rank, "text": f"{self.name(rank)} {what}"})
        return store.compare_set("failure", "", failure).decode() == failure

    def say(self, store: torch_dist.Store) -> None:
        """Log what ended the run; of each machine one rank brings it to the screen, unless the failed one does."""
        failure = json.loads(store.get("failure"))
        here = self.ranks_here()
        if failure["by"] != failure["rank"] and failure["rank"] in here:  # it does not speak any more
            here.remove(failure["rank"])
        LOGGER.log(logging.ERROR if here[:1] == [self.rank] else logging.INFO, "%s", failure["text"])

    def say_that_store_is_gone(self) -> None:
        LOGGER.error("%s: torchrun is gone, or the process that kept the ranks' store", self.name(self.rank))

    def ranks_here(self) -> list[int]:
        """The ranks of this machine."""
        here = self.processes[self.rank].machine
        return [rank for rank, process in enumerate(self.processes) if process.machine == here]

    # --- the heartbeat's thread ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Beat, and look how the others are, until the main thread leaves."""
        while not self.leaving.wait(PERIOD):
            try:
                self.beat()
                self.look()
            except STORE_IS_GONE:
                if not self.leaving.wait(GRACE):
                    self.say_that_store_is_gone()
                    leave_at_once(1)

    def beat(self) -> None:
        """Publish where this rank is: what it said, and the line at which its main thread really is."""
        frame = sys._current_frames().get(self.main_thread)
        said = {"place": self.place, "patience": self.patience, "turn": self.turn, "moves": self.moves}
        self.own_store.set(f"beat/{self.rank}", json.dumps(said | whereabouts(frame)))

    def look(self) -> None:
        """End this process where the run has failed or was stopped; make known what is seen here first."""
        if self.own_store.check(["stop"]):
            os.kill(os.getpid(), signal.SIGTERM)  # before training begins that ends the process, once it can be heard
            if not self.leaving.wait(2 * GRACE):
                leave_at_once(0)
            return
        self.look_for_dead()
        if self.rank in (0, len(self.processes) - 1):
            self.look_for_sleepers()
        if self.own_store.check(["failure"]) and not self.leaving.wait(GRACE):
            self.say(self.own_store)
            self.go(self.own_store, GRACE + 2 * PERIOD)
            leave_at_once(1)

    def look_for_dead(self) -> None:
        """Tell of a process of this machine that is gone without having said why."""
        for rank in self.ranks_here():
            process = self.processes[rank].number
            if not is_running(process):
                beat = self.beats([rank])[rank]
                if "left" not in beat:
                    why = "killed from outside, or by the system for want of memory"
                    self.tell(self.own_store, rank, f"died (process {process}), last seen at `{beat['place']}`: {why}")

    def look_for_sleepers(self) -> None:
        """Tell of a rank that others have waited for longer than the timeout."""
        now, beats = time.monotonic(), self.beats(range(len(self.processes)))
        for rank, beat in beats.items():
            moves, _ = self.seen.get(rank, (None, now))
            if moves != beat.get("moves"):
                self.seen[rank] = beat.get("moves"), now
        still = {rank: now - since for rank, (_, since) in self.seen.items()}
        for rank in sleepers(beats, still, self.timeout):
            beat = beats[rank]
            what = f"has been at `{beat['place']}` ({beat['line']}) for {still[rank]:.0f} s; the others wait"
            limit = max(self.timeout, beat["patience"])
            self.tell(self.own_store, rank, f"{what} no longer than {limit:g} s (parallel.timeout)")

    def beats(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The last beat of each of these ranks."""
        found = self.own_store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: json.loads(beat) for rank, beat in zip(ranks, found)}


def connection(store: torch_dist.Store, timeout: float) -> torch_dist.Store:
    """Another connection to a store: two threads may not share one."""
    new = torch_dist.PrefixStore("minillm", store.clone())
    new.set_timeout(timedelta(seconds=timeout))
    return new


def sleepers(beats: Mapping[int, dict[str, Any]], still: Mapping[int, float], timeout: float) -> list[int]:
    """The ranks that others wait for, those and the others having been still for longer than the timeout.

    A rank is behind another that has had more turns, or that has had as many and already communicates.
    """
    order = {rank: (beat["turn"], beat["communicates"]) for rank, beat in beats.items() if "left" not in beat}
    last = min(order.values(), default=None)
    ahead = max((still[rank] for rank in order if order[rank] > last), default=0.0)
    limits = {rank: max(timeout, beats[rank]["patience"]) for rank in order if order[rank] == last}
    return [rank for rank, limit in limits.items() if still[rank] > limit and ahead > limit]


def whereabouts(frame: FrameType | None) -> dict[str, Any]:
    """The innermost line of a thread that is not of a library, and whether it communicates there."""
    communicates = frame is not None and COMMUNICATION in frame.f_code.co_filename
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    code = frame.f_code if frame else None
    line = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}" if code else "ended"
    return {"line": line, "communicates": communicates}


def follows_from_another(error: BaseException) -> bool:
    """Whether an error only says that another rank is no longer there, or has failed."""
    backends = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return backends or isinstance(error, (OtherRankError, torch_dist.DistError))


def is_request_to_stop(error: BaseException) -> bool:
    """Whether an error is how a program ends that was asked to."""
    return isinstance(error, SystemExit) and not error.code


def described(error: BaseException) -> str:
    """An error in a line; under --debug with the end of its traceback."""
    said = one_line(error) or "".join(traceback.format_exception_only(error)).strip()
    if LOGGER.isEnabledFor(logging.DEBUG):
        lines = "".join(traceback.format_tb(error.__traceback__)).splitlines()
        said = "\n".join([said, *lines[-LAST_LINES:]])
    return said


def this_process() -> Process:
    """The process that asks."""
    return Process(socket.gethostname(), machine(), os.getpid())


def is_running(process: int) -> bool:
    """Whether a process is there and has not ended, also where nobody has asked yet how."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return is_alive(process)


def leave_at_once(code: int) -> None:
    """End this process, whatever its other threads do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
