"""Runs on several ranks that are stopped, killed, or break: nobody hangs, nothing is lost, the cause is named."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import write_small
from torch.distributed.run import get_args_parser

import train
from minillm import checkpoint
from minillm.data.loader import Loader
from minillm.distributed import launch
from minillm.log import read_metrics
from minillm.objectives import NextToken
from minillm.recipe import wiring

RUN = Path("runs/small")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with a small corpus and a small config."""
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path)
    return tmp_path


def start(forks, *words, ranks=2, fault=None, **environment):
    """Start train.py on some ranks; a fault is where, on which rank, at which call, and what happens there."""
    words = [json.dumps(fault), "small.toml", "--train.micro_batch_size", "2", *map(str, words)]
    return forks.start(ranks, "test_faults:faulty", words, **environment)


def faulty(words):
    """train.py, but something happens to one rank in one place."""
    fault, *argv = words
    fault = json.loads(fault)
    if fault and os.environ.get("RANK", "0") == str(fault["rank"]):
        inject(**fault)
    wiring.peak_flops = lambda *_: 1e10  # measuring takes longer than the run
    return train.main(argv)


PLACES = {
    "reading batches": (Loader, "batches"),
    "evaluation": (NextToken, "__call__"),
    "saving": (checkpoint.series, "write_pieces"),
    "preparing the text": (train, "open_corpus"),
}


def inject(place, rank, call, what):
    """Let the `call`-th call of what is done at a place begin with a signal, an error or a nap."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def sabotaged(*args, **keywords):
        training = place == "evaluation" and torch.is_grad_enabled()
        if not training and next(calls) == call:
            if what == "raise":
                raise ValueError("the disk is on fire")
            if what == "sleep":
                time.sleep(600)
            os.kill(os.getpid(), signal.Signals[what])
            time.sleep(0.3)
        return original(*args, **keywords)

    setattr(owner, name, sabotaged)


def fault_at(place, what, rank=1, call=1):
    return {"place": place, "rank": rank, "call": call, "what": what}


def newest(directory=RUN):
    path = checkpoint.latest(directory / "checkpoints")
    return checkpoint.read(path)[0]["progress"] if path else None


@pytest.mark.parametrize(("place", "call", "step"), [("reading batches", 3, 3), ("evaluation", 2, 6), ("saving", 1, 6)])
def test_sigterm_to_one_rank_saves_the_same_step_on_all(workplace, forks, place, call, step):
    ranks = start(forks, fault=fault_at(place, "SIGTERM", call=call))
    assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    assert f"stopped by SIGTERM at step {step}" in ranks.said(0)
    assert ranks.said(1) == "", "rank 0 alone speaks"
    assert newest()["step"] == step


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_to_stop_while_rank_0_prepares_the_text_ends_all_with_exit_code_0(workplace, forks, n):
    """Nothing is there to be saved; the same command begins again."""
    ranks = start(forks, ranks=n, fault=fault_at("preparing the text", "sleep", rank=0))
    while not RUN.exists():
        time.sleep(0.02)
    time.sleep(1)
    ranks.signal(n - 1, signal.SIGTERM)
    assert ranks.wait() == [0] * n, ranks.said(0)
    assert newest() is None
    assert start(forks, "--train.max_steps", 2, ranks=n).wait() == [0] * n
    assert newest()["step"] == 2


@pytest.mark.parametrize(("place", "rank"), [("reading batches", 1), ("evaluation", 0), ("saving", 1)])
def test_a_rank_that_raises_ends_all_and_is_named(workplace, forks, place, rank):
    ranks = start(forks, fault=fault_at(place, "raise", rank, call=2), **{"--log.ranks": "true"})
    assert ranks.wait() == [1, 1]
    assert re.search(r"^error: .*the disk is on fire$", ranks.said(0), re.M), ranks.said(0)
    assert "Traceback" not in ranks.said(0) + ranks.said(1)
    if place != "saving":  # where all agree on what went wrong, and it does not matter who says it
        assert re.search(rf"rank 1 \(\S+\).*`step 2: {place}`", ranks.said(0)) or rank == 0, ranks.said(0)
        found = [abs(ranks.seconds[rank] - ranks.seconds[1 - rank])]
        assert max(found) < 15


def test_a_rank_that_sleeps_ends_all_within_the_timeout_and_is_named(workplace, forks):
    words = ["--parallel.timeout", 10, "--log.ranks", "true"]
    ranks = start(forks, *words, fault=fault_at("reading batches", "sleep", call=3))
    assert ranks.wait() == [1, 1]
    found = (
        r"error: rank 1 \(\S+\) has been at `step 3: reading batches` \(test_faults\.py:\d+ in sabotaged\) for \d+ s"
    )
    assert re.search(found, ranks.said(0)), ranks.said(0)
    assert "Traceback" not in ranks.said(0) + ranks.said(1)
    for rank in range(2):
        assert re.search(found.removeprefix("error: "), (RUN / f"logs/rank-{rank:04d}.log").read_text())


def test_a_second_run_in_the_same_directory_is_refused_on_all_ranks_with_one_line(workplace, forks):
    assert start(forks, "--train.max_steps", 2).wait() == [0, 0]
    ranks = start(forks)
    assert ranks.wait(60) == [1, 1]
    assert re.fullmatch(r"(chosen.*\n)?error: run.dir: runs/small holds a run already; .*\n", ranks.said(0))
    assert ranks.said(1) == ""


def test_a_mistake_that_all_ranks_make_is_told_once(workplace, forks):
    ranks = start(forks, "--train.max_step", 2)
    assert ranks.wait(60) == [1, 1]
    assert re.fullmatch(r"error: .*train\.max_step is not .*\n", ranks.said(0)), ranks.said(0)
    assert ranks.said(1) == ""


def apart(words):
    """train.py, but each rank in a directory of its own, as on machines that share no disk."""
    launch.APPEARS_WITHIN = 1.0
    rank = os.environ["RANK"]
    os.mkdir(rank)
    for name in ("small.toml", "text.txt"):
        os.link(name, f"{rank}/{name}")
    os.chdir(rank)
    return train.main(words)


def test_a_run_directory_that_is_not_shared_is_refused(workplace, forks):
    ranks = forks.start(2, "test_faults:apart", ["small.toml"])
    assert ranks.wait(60) == [1, 1]
    assert re.search(
        r"run\.dir: runs/small is not shared: what rank 0 writes there on \S+ is not seen on", ranks.said(0)
    )
    assert not Path("0/runs/small/config.json").exists()


def differing(words):
    """train.py, but rank 1 finds a file with other content: its config, or the text."""
    what, place = words
    argv = ["small.toml", "--run.dir", str(Path("runs/small").resolve())]
    if os.environ["RANK"] == "1":
        os.mkdir("elsewhere")
        for name in ("small.toml", "text.txt"):
            old, new = place.split(" -> ") if name == what else ("", "")
            Path("elsewhere", name).write_text(Path(name).read_text().replace(old, new))
        os.chdir("elsewhere")
    return train.main(argv)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("small.toml", "lr = 1e-2 -> lr = 2e-2", r"optim\.lr: 0\.01 on rank 0 \(\S+\), but 0\.02 on rank 1 \(\S+\)"),
        ("text.txt", "cat -> cow", r"data_hash: \S+ on rank 0 \(\S+\), but \S+ on rank 1 \(\S+\)"),
    ],
)
def test_ranks_that_read_different_files_are_told_what_differs(workplace, forks, file, change, said):
    ranks = forks.start(2, "test_faults:differing", [file, change])
    assert ranks.wait(60) == [1, 1]
    assert re.search(rf"^error: {said}; give all machines the same files$", ranks.said(0), re.M), ranks.said(0)
    assert ranks.said(1) == ""
    assert not (RUN / "config.json").exists()


def test_numbers_that_make_no_layout_are_refused_before_the_text_is_prepared(workplace, forks):
    ranks = start(forks, "--parallel.dp_shard", 3, fault=fault_at("preparing the text", "raise", rank=0))
    assert ranks.wait(60) == [1, 1]
    assert "dp_replicate 1 x dp_shard 3 x tp 1 are 3 ranks, but 2 were started" in ranks.said(0)


def test_a_run_goes_on_on_fewer_ranks_than_its_numbers_say_unless_they_are_given_again(workplace, forks):
    words = ["--parallel.strategy", "fsdp", "--parallel.dp_shard", 2]
    assert start(forks, *words, "--train.max_steps", 1).wait() == [0, 0]
    again = ["--run.resume", "auto", "--train.max_steps", 2]
    ranks = start(forks, *words, *again, ranks=1)
    assert ranks.wait(60) == [1]
    assert "dp_replicate 1 x dp_shard 2 x tp 1 are 2 ranks, but 1 were started" in ranks.said(0)
    ranks = start(forks, *again, ranks=1)
    assert ranks.wait() == [0], ranks.said(0)
    assert "there are now 1 ranks, so not taken over from runs/small/config.json: parallel.dp_shard 2\n" in ranks.said(
        0
    )
    assert newest()["step"] == 2


def test_in_an_evaluation_before_the_first_step_ranks_say_that_they_move_on(workplace, forks):
    """Or a long one would be taken for sleep."""
    assert start(forks, "--train.max_steps", 1, ranks=1).wait() == [0]
    words = ["--model.path", RUN, "--run.dir", "runs/new", "--train.max_steps", 1]
    ranks = start(forks, *words, fault=fault_at("evaluation", "raise", call=2))
    assert ranks.wait() == [1, 1]
    assert re.search(r"rank 1 \(\S+\).*`step 0: evaluation`: the disk is on fire", ranks.said(0)), ranks.said(0)


# --- restarts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun():
    """The environment that torchrun gives to the processes it starts for the n-th time; its store is here."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda n: {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": n,
        "MASTER_PORT": store.port,
    }


def test_torchrun_goes_on_with_what_it_began_and_with_nothing_else(workplace, forks, torchrun):
    """A rank is killed between two saves; nothing is said of resuming."""
    assert start(forks, "--run.dir", "runs/whole").wait() == [0, 0]
    ranks = start(forks, fault=fault_at("reading batches", "SIGKILL", call=8), **torchrun(0))
    assert ranks.wait() == [1, -9]
    assert newest()["step"] == 5
    ranks = start(forks, **torchrun(1))
    assert ranks.wait() == [0, 0], ranks.said(0)
    assert "resumed from" in ranks.said(0)
    assert_same(RUN, Path("runs/whole"))
    ranks = start(forks, "--run.dir", "runs/whole", **torchrun(2))
    assert ranks.wait() == [1, 1]
    assert "holds a run already" in ranks.said(0)


def test_a_restart_is_known_on_a_machine_that_mounts_the_disk_elsewhere(tmp_path, monkeypatch, torchrun):
    for name, value in torchrun(0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert not launch.began(RUN)
    launch.note_begun(RUN)
    monkeypatch.chdir(tmp_path / "there")
    assert launch.began(RUN)
    assert not launch.began(Path("runs/other"))


def assert_same(one, other):
    """Bitwise the same weights, moments and losses."""
    hashes, rows = [], []
    for directory in (one, other):
        manifest = checkpoint.read(checkpoint.latest(directory / "checkpoints"))[1]
        hashes.append({name: file["sha256"] for name, file in manifest["files"].items() if "safetensors" in name})
        keys = ("step", "tokens", "loss", "grad_norm", "val_loss")
        rows.append([{key: row.get(key) for key in keys} for row in read_metrics(directory / "metrics.jsonl")])
    assert hashes[0] == hashes[1]
    assert rows[0] == rows[1]


def children(process):
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_torchrun_itself_restarts_the_ranks_of_which_one_was_killed(workplace):
    """The real thing, once: a process is killed from outside, and one command ends with a finished run."""
    if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not list the children of a process")
    words = ["small.toml", "--train.max_steps", "60", "--train.save_every", "5", "--train.eval_every", "60"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1"]
    with open("said", "w") as said:
        process = subprocess.Popen([*command, str(ROOT / "train.py"), *words], stdout=said, stderr=said)
    while process.poll() is None and not list(RUN.glob("checkpoints/step-*")):
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    code, said = process.wait(240), Path("said").read_text()
    assert code == 0, said
    assert re.search(r"rank [01] \(\S+\) died \(process \d+\), last seen at `", said), said
    assert "resumed from" in said
    assert [row["step"] for row in read_metrics(RUN / "metrics.jsonl")] == list(range(1, 61))


def test_the_files_that_launch_runs_are_understood_by_their_shell_and_by_torchrun():
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    files = sorted((ROOT / "configs" / "launch").iterdir())
    assert [file.name for file in files] == ["multi-node.sh", "one-node.sh", "slurm.sbatch"]
    for file in files:
        subprocess.run(["bash", "-n", file], check=True)
        command = re.search(r"torchrun (--.*?)train\.py", file.read_text().replace("\\\n", ""), re.S)[1]
        assert set(re.findall(r"--[a-z_-]+", command)) <= known


# --- kills ------------------------------------------------------------------------------------------------------------


def kill_and_resume(forks, torchrun, kills, seed):
    """Kill all ranks or one at random moments, resume each time, and compare with a run that was left alone.

    `kills` says of each whether all are killed; where one is, the other is asked to end, as torchrun does. About half
    of them are counted from the start, of the others half wait for a save. Returns how many fell inside one.
    """
    moments, every, inside, start_up = random.Random(seed), 2, 0, 1.0
    end = ["--train.max_steps", 30, "--train.save_every", every, "--train.eval_every", 10]
    assert start(forks, "--run.dir", "runs/whole", *end).wait() == [0, 0]
    for number, kill_all in enumerate(kills):
        before = logged()
        ranks, begin = start(forks, *end, **torchrun(number)), time.monotonic()
        if moments.random() < 0.5:
            time.sleep(moments.uniform(0, start_up))
        else:
            while logged() <= before and not ranks.ended(0):
                time.sleep(0.005)
            start_up = time.monotonic() - begin
            time.sleep(moments.uniform(0, 0.2))
            wait = moments.random() < 0.5
            while wait and not list(RUN.glob("checkpoints/.step-*.tmp")) and not ranks.ended(0):
                pass
        victims = [0, 1] if kill_all else [moments.randrange(2)]
        for rank in victims:
            ranks.signal(rank, signal.SIGKILL)
        inside += any(RUN.glob("checkpoints/.step-*.tmp"))
        time.sleep(0.1)
        for rank in {0, 1}.difference(victims):
            ranks.signal(rank, signal.SIGTERM)
        codes = ranks.wait(60)
        if codes == [0, 0]:  # they were faster than the kill
            end[1] += 10
            assert start(forks, "--run.dir", "runs/whole", "--run.resume", "auto", *end).wait() == [0, 0]
        else:
            assert all(codes[rank] in (-9, 0) for rank in victims)
            assert all(code in (-9, -15, 0, 1) for code in codes), codes  # -15: before the program could hear it
        assert logged() - (newest() or {"step": 0})["step"] <= every, "at most one save interval is lost"
    assert start(forks, "--run.resume", "auto", *end).wait() == [0, 0]
    assert_same(RUN, Path("runs/whole"))
    return inside


def logged():
    """The last step that has a row."""
    rows = read_metrics(RUN / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def test_killed_twice_two_ranks_end_bitwise_like_those_left_alone(workplace, forks, torchrun):
    kill_and_resume(forks, torchrun, [True, False], seed=1)


@pytest.mark.soak
def test_killed_fifty_times_two_ranks_end_bitwise_like_those_left_alone(workplace, forks, torchrun):
    kills = [True] * 30 + [False] * 20
    random.Random(3).shuffle(kills)
    assert kill_and_resume(forks, torchrun, kills, seed=2) >= 5
