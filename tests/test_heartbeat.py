"""Ranks that watch each other: who raised, died or sleeps is named, and nobody waits for ever."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as torch_dist
from forks import Forks

from minillm.distributed.context import connect
from minillm.distributed.heartbeat import OtherRankError, follows_from_another, is_running, sleepers, whereabouts


def steps(words):
    """A program of two ranks, of which rank 1 does what is asked for while the other waits for it."""
    what, timeout = words
    with connect("cpu", float(timeout)) as dist:
        dist.barrier()
        dist.at("step 1: reading batches")
        if dist.rank == 1:
            if what == "raise":
                raise ValueError("text.jsonl:7: no text")
            if what == "bug":
                raise KeyError("text")
            if what == "sleep":
                time.sleep(600)
            if what in ("SIGKILL", "SIGTERM", "SIGINT"):
                time.sleep(1.5)  # for a beat
                os.kill(os.getpid(), signal.Signals[what])
                time.sleep(600)
        dist.at("step 1: forward")
        if what == "prepare":
            with dist.main_first("preparing the text"):
                if dist.is_main:
                    time.sleep(600)
        dist.sum(1.0)
        if dist.rank == 0 and what == "late":
            time.sleep(2)
    print("done")
    return 0


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


def outcome(forks, *words):
    ranks = forks.start(2, "test_heartbeat:steps", words)
    codes = ranks.wait(60)
    return codes, [ranks.said(0), ranks.said(1)], max(ranks.seconds)


def test_ranks_that_end_well_wait_for_each_other_no_longer_than_they_need(forks):
    codes, said, _ = outcome(forks, "late", "30")
    assert codes == [0, 0]
    assert said == ["done\n", "done\n"]
