"""Work that every rank does its part of, and that has succeeded on all of them or failed on all of them."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from minillm.distributed.context import Context
from minillm.distributed.heartbeat import OtherRankError
from minillm.files import explained

ALONE = Context(torch.device("cpu"))


def on_every_rank(dist: Context, work: Callable[[], Any], at: Path | None = None) -> list[Any]:
    """What `work` returns on each rank, which JSON must be able to spell; nobody goes on before all are done.

    Where it raises on some rank, it raises on all: there its own error, elsewhere one that names the rank. `at`: the
    place that is written; where the operating system refuses that, the error says what to do about it.
    """
    result = error = None
    try:
        with explained(at) if at is not None else nullcontext():
            result = work()
    except Exception as problem:
        error = problem
    told = None if error is None else [isinstance(error, ValueError), f"{error}" or type(error).__name__]
    answers = dist.gather([told, None if told else result])
    if error is not None:
        raise error
    for rank, (problem, _) in enumerate(answers):
        if problem is not None:
            is_users, text = problem
            raise (OtherRankError if is_users else RuntimeError)(f"rank {rank}: {text}")
    return [result for _, result in answers]


def on_main(dist: Context, work: Callable[[], Any], at: Path | None = None) -> Any:
    """What `work` returns on rank 0, the only one to do it, on every rank; where it raises, it raises on all."""
    return on_every_rank(dist, work if dist.is_main else lambda: None, at)[0]
