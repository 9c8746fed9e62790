"""What ranks tell each other: numbers, decisions, JSON, and who goes first."""

import io
import os
import re
import time
from contextlib import redirect_stderr

import pytest
import torch
from ranks import run_ranks

from minillm.distributed import context
from minillm.distributed.context import AXES, Context, connect, device_index, with_mesh


def seconds_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def collectives(work):
    """The kinds of messages between ranks that it takes."""
    with torch.profiler.profile() as seen:
        work()
    return {event.name for event in seen.events() if event.name.startswith("gloo:")}


def told():
    with connect("cpu", timeout=20) as dist:
        mesh = with_mesh(dist, 1, 2, 2)
        tensor = torch.tensor([1.0, dist.rank])
        return {
            "place": (mesh.rank, mesh.dp_rank, mesh.tp_rank, mesh.is_main),
            "sum": (dist.sum(dist.rank), dist.sum(0.5), dist.sum(tensor).tolist()),
            "kinds": (type(dist.sum(1)), type(dist.sum(1.0)), tensor.tolist()),
            "data-parallel sum": mesh.sum(mesh.rank),
            "max": (dist.max(dist.rank), mesh.max(float(mesh.rank))),
            "any": (dist.any(dist.rank == 2), dist.any(False)),
            "gather": dist.gather({"ж" * dist.rank: dist.rank}),
            "broadcast": dist.broadcast(["from", dist.rank]),
            "sent": collectives(lambda: dist.broadcast("ж" * 1000 * dist.rank)),
            "big": dist.sum(2**53 + dist.rank),
            "timeouts": {seconds_of(group) for group in (mesh.dp_group, *map(mesh.mesh.get_group, AXES))},
        }


def test_ranks_agree_on_numbers_and_json():
    results = run_ranks(4, told)
    assert [one["place"] for one in results] == [(0, 0, 0, True), (1, 0, 1, False), (2, 1, 0, False), (3, 1, 1, False)]
    for rank, one in enumerate(results):
        assert one["sum"] == (6, 2.0, [4.0, 6.0])
        assert one["kinds"] == (int, float, [1.0, rank]), "what is summed stays as it was"
        assert one["data-parallel sum"] == (2 if rank % 2 == 0 else 4), "ranks along tp are not summed over"
        assert (one["max"], one["any"]) == ((3, 3.0), (True, False))
        assert one["gather"] == [{"ж" * other: other} for other in range(4)]
        assert one["broadcast"] == ["from", 0]
        assert one["sent"] == {"gloo:broadcast"}, "one rank's value is not asked of all"
        assert one["big"] == 2**55 + 6, "whole numbers are exact"
        assert one["timeouts"] == {25.0}, "of every group, and a little after the heartbeat"


def prepare_twice(path):
    with connect("cpu", timeout=5) as dist:
        with dist.main_first("prepare"):
            if dist.is_main:
                time.sleep(6)  # longer than others may be waited for
                path.write_text("made")
            found = path.read_text()
        try:
            with dist.main_first("prepare again"):
                if dist.is_main:
                    raise ValueError("no text")
        except ValueError as error:
            return found, str(error)


def test_the_first_rank_may_take_its_time_and_its_failure_is_everybodys(tmp_path):
    assert run_ranks(2, prepare_twice, tmp_path / "text") == [
        ("made", "no text"),
        ("made", "rank 0 failed at prepare again: ValueError: no text"),
    ]


def wait_on_another_machine():
    os.environ["LOCAL_RANK"] = "0"
    context.FIRST_REPORT, said = 0.3, io.StringIO()
    with connect("cpu", timeout=20) as dist, redirect_stderr(said), dist.main_first("preparing the text"):
        if dist.is_main:
            time.sleep(2)
    return re.findall(r"^\S+: waiting for rank 0 since \d+ s: preparing the text$", said.getvalue(), re.M)


def test_another_machine_says_now_and_then_what_it_waits_for():
    ours, theirs = run_ranks(2, wait_on_another_machine)
    assert ours == []
    assert 1 <= len(theirs) <= 3, "after 0.3, 0.6 and 1.2 seconds"


def test_one_process_needs_no_process_group():
    dist = Context(torch.device("cpu"))
    with dist.main_first("anything"):
        assert (dist.sum(3), dist.max(2.5), dist.any(True), dist.broadcast("x")) == (3, 2.5, True, "x")
    dist.barrier()
    assert dist.gather({"a": 1}) == [{"a": 1}]
    assert not torch.distributed.is_initialized()


def test_one_process_is_rank_zero_of_one():
    with connect("cpu") as dist:
        assert (dist.dp_rank, dist.dp_size, dist.is_main, dist.device) == (0, 1, True, torch.device("cpu"))
        assert dist.sum(7) == 7


def test_several_processes_are_refused_in_words(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="WORLD_SIZE is 8"), connect():
        pass


def test_each_local_rank_has_a_device_of_its_own_also_where_it_is_shown_no_other():
    assert [device_index(rank, 8, by_torchrun=True) for rank in range(8)] == list(range(8))
    assert [device_index(rank, 8, by_torchrun=False) for rank in range(8)] == list(range(8))
    assert device_index(5, 1, by_torchrun=False) == 0, "Slurm shows each task one"
    assert device_index(1, 1, by_torchrun=True) == 1, "two processes, one device: refused"


def test_half_of_torchruns_environment_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        connect("cpu").__enter__()
