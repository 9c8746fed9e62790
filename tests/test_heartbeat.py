"""Ranks that watch each other: who raised, died or sleeps is named, and nobody waits for ever."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as torch_dist

from minillm.distributed import context, heartbeat
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


def outcome(forks, *words):
    ranks = forks.start(2, "test_heartbeat:steps", words)
    codes = ranks.wait(60)
    return codes, [ranks.said(0), ranks.said(1)], max(ranks.seconds)


def test_ranks_that_end_well_wait_for_each_other_no_longer_than_they_need(forks):
    codes, said, _ = outcome(forks, "late", "30")
    assert codes == [0, 0]
    assert said == ["done\n", "done\n"]


def test_the_mistake_of_one_rank_ends_all_and_is_told_by_both(forks):
    codes, said, seconds = outcome(forks, "raise", "30")
    assert codes == [1, 1]
    for rank, failed in enumerate(("failed ", "")):
        found = rf"^error: rank 1 \(\S+\) {failed}at `step 1: reading batches`: text.jsonl:7: no text$"
        assert re.search(found, said[rank], re.M)
    assert "Traceback" not in said[0] + said[1]
    assert seconds < 15


def test_a_bug_on_one_rank_shows_its_traceback_and_no_other(forks):
    codes, said, seconds = outcome(forks, "bug", "30", "--debug")
    assert codes == [1, 1]
    assert "failed at `step 1: reading batches`: KeyError: 'text'\n" in said[0]
    assert 'raise KeyError("text")' in said[0], "under --debug the end of the traceback too"
    assert 'raise KeyError("text")' in said[1]
    assert "Traceback" in said[1]
    assert "Traceback" not in said[0], "that rank 0 lost its connection is no news"
    assert seconds < 15


def test_a_rank_that_sleeps_is_named_with_its_place_and_line(forks):
    codes, said, seconds = outcome(forks, "sleep", "4")
    assert codes == [1, 1]
    assert re.search(
        r"^error: rank 1 \(\S+\) has been at `step 1: reading batches` \(test_heartbeat\.py:\d+ in steps\) for \d+ s; "
        r"the others wait no longer than 4 s \(parallel\.timeout\)$",
        said[0],
        re.M,
    )
    assert "Traceback" not in said[0] + said[1]
    assert seconds < 4 + 5 + 10  # of which 10 for a busy machine


def test_a_process_that_is_killed_is_missed(forks):
    codes, said, seconds = outcome(forks, "SIGKILL", "30")
    assert codes == [1, -9]
    found = r"^error: rank 1 \(\S+\) died \(process \d+\), last seen at `step 1: reading batches`: killed from outside"
    assert re.search(found, said[0], re.M)
    assert "Traceback" not in said[0]
    assert seconds < 15


def test_a_request_to_stop_before_training_ends_all_well_also_while_rank_0_prepares(forks):
    codes, said, _ = outcome(forks, "SIGTERM", "30")
    assert codes == [0, 0]
    assert said[0] in ("SIGTERM: stopped\n", "stopped, as another rank was\n")
    assert said[1] == ""
    ranks = forks.start(2, "test_heartbeat:steps", ["prepare", "30"])
    time.sleep(2)
    ranks.signal(1, signal.SIGTERM)
    assert ranks.wait(30) == [0, 0]


def test_a_rank_waits_at_the_store_for_rank_0_no_longer_than_it_lives(forks):
    ranks = forks.start(2, "test_heartbeat:steps", ["prepare", "30"])
    time.sleep(2)
    ranks.signal(0, signal.SIGKILL)  # and the store with it
    assert ranks.wait(30) == [-9, 1]
    assert re.search(r"^error: rank 1 \(\S+\): torchrun is gone|^error: rank 0 \(\S+\) died", ranks.said(1), re.M)


def elsewhere(words):
    """Two ranks on machines of one name: the number of rank 1's process means nothing on that of rank 0."""
    if os.environ["RANK"] == "1":
        context.this_process = lambda: heartbeat.Process(socket.gethostname(), "another", 2**22 + 1)  # Linux gives none
        heartbeat.is_running = lambda number: number == 2**22 + 1
    with connect("cpu", 30) as dist:
        time.sleep(2 * heartbeat.PERIOD + heartbeat.GRACE + 1)  # to be missed, and to be ended
        dist.barrier()
    return 0


def test_a_process_of_another_machine_is_not_looked_for_here_though_both_have_one_name(forks):
    ranks = forks.start(2, "test_heartbeat:elsewhere", [])
    assert ranks.wait(60) == [0, 0], ranks.said(0)


def slow_to_close(words):
    """Two ranks whose connections do not close; the end of the block is good, a request to stop, or a mistake."""
    context.GRACE, context.torch_dist.destroy_process_group = 0.5, lambda: time.sleep(600)
    with connect("cpu", 5) as dist:
        dist.barrier()
        if words == ["stop"]:
            os.kill(os.getpid(), signal.SIGTERM)
        if words == ["mistake"]:
            raise ValueError("no text")
    return 0


@pytest.mark.parametrize(("end", "code"), [("well", 0), ("stop", 0), ("mistake", 1)])
def test_connections_that_do_not_close_change_no_exit_code(forks, end, code):
    ranks = forks.start(2, "test_heartbeat:slow_to_close", [end])
    assert ranks.wait(60) == [code, code]


def on_an_accelerator(words):
    with connect("cuda", 30):
        return 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
def test_a_device_that_no_rank_has_is_told_once(forks):
    ranks = forks.start(2, "test_heartbeat:on_an_accelerator", [])
    assert ranks.wait(60) == [1, 1]
    assert re.fullmatch(r"error: run\.device: 'cuda' cannot be used here .*\n", ranks.said(0)), ranks.said(0)
    assert ranks.said(1) == ""


# --- who is behind ----------------------------------------------------------------------------------------------------


def beat(turn, communicates=False, patience=0.0):
    return {"turn": turn, "communicates": communicates, "patience": patience}


def test_who_is_behind_is_who_had_fewer_turns_or_does_not_communicate():
    still = dict.fromkeys(range(3), 61.0)
    assert sleepers({0: beat(5), 1: beat(4), 2: beat(5)}, still, 60) == [1]
    assert sleepers({0: beat(5, True), 1: beat(5), 2: beat(5, True)}, still, 60) == [1]
    assert sleepers({0: beat(5, True), 1: beat(5, True), 2: beat(4)}, still, 60) == [2]
    assert sleepers({0: beat(4), 1: beat(4), 2: beat(5)}, still, 60) == [0, 1]


def test_nobody_sleeps_whom_nobody_waits_for_long_or_who_moves():
    still = dict.fromkeys(range(3), 61.0)
    assert sleepers({0: beat(5), 1: beat(5), 2: beat(5)}, still, 60) == [], "all work, and none is further"
    assert sleepers({0: beat(5), 1: beat(4), 2: {"left": True}}, still | {0: 3.0}, 60) == [], "0 has just come there"
    assert sleepers({0: beat(5), 1: beat(4), 2: beat(5)}, still | {1: 3.0}, 60) == [], "1 moves"
    assert sleepers({0: beat(4), 1: {"left": True}, 2: {"left": True}}, still, 60) == [], "the others are gone"
    assert sleepers({0: beat(5, True), 1: beat(5, patience=600.0), 2: beat(5, True)}, still, 60) == [], "it saves"
    assert sleepers({}, {}, 60) == []


def test_the_line_where_a_thread_waits_is_one_of_ours():
    waiting, started = Future(), threading.Event()

    def wait_here():
        started.set()
        waiting.result()

    thread = threading.Thread(target=wait_here)
    thread.start()
    started.wait()
    time.sleep(0.05)
    found = whereabouts(sys._current_frames()[thread.ident])
    waiting.set_result(None)
    thread.join()
    assert found["line"].endswith(" in wait_here")
    assert found["line"].startswith("test_heartbeat.py:")
    assert not found["communicates"]
    assert whereabouts(None)["line"] == "ended"


def test_a_process_that_nobody_has_buried_yet_does_not_run():
    assert is_running(os.getpid())
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_running(process.pid)
    assert not is_running(process.pid)


def test_what_follows_from_another_rank_is_told_from_what_happens_here():
    assert follows_from_another(OtherRankError("rank 0 failed"))
    assert follows_from_another(torch_dist.DistBackendError("NCCL communicator was aborted"))
    assert follows_from_another(RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not follows_from_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not follows_from_another(ValueError("no text"))
