"""train.py on several ranks: the run of one, and the same figures of it."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from small import write_small

import minillm
import train
from minillm.log import read_metrics, rows
from minillm.recipe import wiring

PEAK = 1e6  # FLOP/s of each device: so few that each digit of MFU counts


def train_by_ticks(directory, words):
    """train.py, by a clock that each look at it moves on by a second, so that each step takes equally long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(rows, "time", SimpleNamespace(perf_counter=partial(next, itertools.count())))
        patch.setattr(wiring, "peak_flops", lambda *_: PEAK)
        return train.main(["small.toml", "--run.device", "cpu", "--model.dropout", "0", *words])


def figures(directory, names):
    """A list for each of the names: what the rows of metrics say."""
    found = read_metrics(directory / "metrics.jsonl")
    return {name: [row[name] for row in found if name in row] for name in names}


def test_a_run_on_two_ranks_is_that_of_one_in_weights_and_figures(tmp_path):
    """Tokens are those of all ranks, and MFU is a share of what all devices could do."""
    write_small(tmp_path)
    runs = {"one": [], "ddp": ["--parallel.strategy", "ddp"], "fsdp": ["--parallel.strategy", "fsdp"]}
    for name, words in runs.items():
        n = 1 if name == "one" else 2
        assert run_ranks(n, train_by_ticks, tmp_path, ["--run.dir", name, *words]) == [0] * n
    one = tmp_path / "one"
    weights = minillm.load(one)[0].state_dict()
    for other in (tmp_path / "ddp", tmp_path / "fsdp"):
        for name in ("loss", "grad_norm", "val_loss", "val_bpb"):
            assert figures(other, [name]) == {name: pytest.approx(figures(one, [name])[name], rel=1e-5)}
        exact = ("step", "tokens", "tokens_per_second")
        assert figures(other, exact) == figures(one, exact)
        assert figures(other, ["mfu"])["mfu"] == pytest.approx([x / 2 for x in figures(one, ["mfu"])["mfu"]], rel=1e-3)
        for name, tensor in minillm.load(other)[0].state_dict().items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5)
