"""The harness that starts ranks: what comes back, what fails, what hangs."""

import os
import time

import pytest
from ranks import run_ranks

from minillm.distributed.context import connect


def place():
    return os.environ["RANK"], os.environ["WORLD_SIZE"]


def raise_on(rank):
    with connect("cpu", timeout=20) as dist:
        if dist.rank == rank:
            raise ValueError("of all ranks this one")
        dist.barrier()


def sleep_on(rank):
    if os.environ["RANK"] == str(rank):
        time.sleep(60)


def test_each_rank_gives_its_result_in_order():
    assert run_ranks(3, place) == [("0", "3"), ("1", "3"), ("2", "3")]
    assert run_ranks(2, place) == [("0", "2"), ("1", "2")]


def test_a_rank_that_raises_fails_the_call_and_one_that_sleeps_ends_it():
    with pytest.raises(AssertionError, match=r"rank 1 of 2:\n(.|\n)*of all ranks this one"):
        run_ranks(2, raise_on, 1)
    with pytest.raises(TimeoutError, match=r"ranks \[(0, )?1\] of 2"):
        run_ranks(2, sleep_on, 1, seconds=1)
