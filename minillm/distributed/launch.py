"""What holds only because many processes were started together: the same files for all, a restart by torchrun."""

import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minillm.distributed.context import Context
from minillm.distributed.heartbeat import OtherRankError
from minillm.distributed.meeting import store_of_torchrun

APPEARS_WITHIN = 20.0  # seconds until a new file is seen on another machine: NFS looks again after 3 to 60 by default
ANSWERS_WITHIN = 30.0  # seconds


def check_shared(dist: Context, directory: Path, field: str) -> None:
    """See that all ranks mean the same place by a directory. Raises ValueError naming the hosts that do not see it."""
    if dist.world_size == 1:
        return
    if dist.is_main:
        probe = directory / f".shared-{secrets.token_hex(8)}"
        probe.touch()
        dist.broadcast(probe.name)
    else:
        probe = directory / dist.broadcast(None)
    try:
        blind = sorted({host for host in dist.gather(None if appears(probe) else socket.gethostname()) if host})
    finally:
        if dist.is_main:
            probe.unlink()
    if blind:
        raise ValueError(
            f"{field}: {directory} is not shared: what rank 0 writes there on {dist.broadcast(socket.gethostname())} "
            f"is not seen on {', '.join(blind)}; give a directory on a disk that all machines mount"
        )


def check_same(dist: Context, values: Mapping[str, Any]) -> None:
    """See that all ranks have read the same. Raises ValueError naming the first value that one of them has otherwise.

    They may not: each machine may have a file of its own under a name, and what differs ends in collectives that do not
    fit together.
    """
    found = dist.gather([socket.gethostname(), dict(values)])
    host, ours = found[0]
    for rank, (other, theirs) in enumerate(found):
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                kind = ValueError if dist.is_main else OtherRankError  # rank 0 says it for all
                raise kind(
                    f"{name}: {ours.get(name)} on rank 0 ({host}), but {theirs.get(name)} on rank {rank} ({other}); "
                    "give all machines the same files"
                )


def appears(path: Path) -> bool:
    """Whether a file is there, now or soon."""
    end = time.monotonic() + APPEARS_WITHIN
    while not os.access(path, os.F_OK):
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # makes a client of NFS look again
        time.sleep(0.2)
    return True


def began(directory: Path) -> bool:
    """Whether the torchrun that started this process has begun a run in the directory before, and now restarts it."""
    store = store_of_torchrun(ANSWERS_WITHIN)
    return store is not None and store.check([key_of(directory)])


def note_begun(directory: Path) -> None:
    """Remember for as long as torchrun lives that it has begun a run in the directory."""
    store = store_of_torchrun(ANSWERS_WITHIN)
    if store is not None:
        store.set(key_of(directory), "")


def key_of(directory: Path) -> str:
    """By the words that all ranks were given: where a shared disk is mounted may differ from machine to machine."""
    return f"minillm/begun/{directory}"
