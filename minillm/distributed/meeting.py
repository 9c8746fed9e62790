"""How the ranks of one start find each other, also where it is not the first start.

torchrun keeps one store for as long as it lives, over all its restarts. What a start that failed wrote there is still
there for the next one, and a process group made from it waits for processes that are dead (torch 2.13 does so for
ever). So the ranks of each start first agree on a name under which nothing has been written yet.
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as torch_dist

POLL_SECONDS = 0.02


def store_of_torchrun(timeout: float) -> torch_dist.Store | None:
    """The store that torchrun's own process keeps, which outlives the processes it starts; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch_dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))


def meet(store: torch_dist.Store, rank: int, world_size: int, timeout: float) -> torch_dist.Store:
    """The part of a store that belongs to this start alone. Raises TimeoutError where ranks do not come.

    Each rank says hello with a number of its own, which replaces that of an earlier start. Rank 0 answers whatever
    number it sees, with the name of its start; who is dead does not read that, and who lives says that it has.
    """
    number, end = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"minillm/hello/{rank}", number)
    if rank:
        number = answered(store, number, end)
        store.set(f"minillm/{number}/came/{rank}", "")
    else:
        answer(store, number, range(1, world_size), end)
    return torch_dist.PrefixStore(f"minillm/{number}", store)


def answered(store: torch_dist.Store, number: str, end: float) -> str:
    """What rank 0 has answered to a number. (Asked for again and again: a store that waits hears no signal.)"""
    while not store.check([f"minillm/answer/{number}"]):
        if time.monotonic() > end:
            raise TimeoutError("rank 0 did not come")
        time.sleep(POLL_SECONDS)
    return store.get(f"minillm/answer/{number}").decode()


def answer(store: torch_dist.Store, name: str, others: range, end: float) -> None:
    """What rank 0 does until all others have come."""
    missing, answered = set(others), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"minillm/{name}/came/{rank}"]):
                missing.remove(rank)
            elif store.check([f"minillm/hello/{rank}"]):
                number = store.get(f"minillm/hello/{rank}").decode()
                if number not in answered:
                    store.set(f"minillm/answer/{number}", name)
                    answered.add(number)
        if missing and time.monotonic() > end:
            raise TimeoutError(f"{', '.join(f'rank {rank}' for rank in sorted(missing))} did not come")
        time.sleep(POLL_SECONDS if missing else 0)
