"""A run on several ranks that stops and goes on is the run that did not stop."""

import os
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from minillm import checkpoint
from minillm.data.loader import Loader
from minillm.distributed import context, heartbeat
from minillm.distributed.config import Layout
from minillm.distributed.context import connect, with_mesh
from minillm.distributed.parallelize import parallelize
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.recipe import starting_point
from minillm.run import RunConfig, RunDirectory
from minillm.tensors import local_part
from minillm.trainer import TrainConfig, Trainer

STEPS, T, ROWS = 40, 8, 6
DDP, FSDP, ONE = Layout("ddp", 2, 1, 1), Layout("fsdp", 1, 2, 1), Layout("ddp", 1, 1, 1)


class Numbers:
    """A text whose k-th token is k: a row tells where it is from."""

    n_tokens = 17 * ROWS * T  # an epoch ends every 17 steps
    document_offsets = np.array([0, n_tokens])

    def tokens(self, start, stop):
        return np.arange(start, stop)

    def source(self, document):
        return "numbers"


def make(dist, chosen: Layout, path: Path, rows: int = 2, dropout: float = 0.1) -> Trainer:
    dist = with_mesh(dist, chosen.dp_replicate, chosen.dp_shard, chosen.tp)
    shape = ModelConfig(vocab_size=Numbers.n_tokens, dim=16, n_layers=1, n_heads=2, max_seq_len=T, dropout=dropout)
    with torch.device("meta"):
        model = Transformer(shape)
    model = parallelize(model, dist=dist, layout=chosen, init=partial(init_weights, seed=1))
    place = {"dp_rank": dist.dp_rank, "dp_size": dist.dp_size, "prefetch": False}
    return Trainer(
        model,
        build_optimizer(model, OptimConfig(name="muon", lr=1e-2)),
        NextToken(),
        Loader(Numbers(), seq_len=T, packing=False, micro_batch_size=rows, samples_per_step=ROWS, seed=0, **place),
        TrainConfig(precision="fp32"),
        steps=STEPS,
        lr_at=lambda step: 1e-2 / (1 + step),
        dist=dist,
        run=RunDirectory(path),
    )


def end_of(trainer: Trainer, last: int) -> tuple[list[float | None], dict[str, torch.Tensor]]:
    """What the steps up to the last one give."""
    losses = [trainer.step()["loss"] for _ in range(trainer.progress.step, last)]
    return losses, {name: local_part(tensor)[0].clone() for name, tensor in trainer.tensors().items()}


def compare_resumed(chosen: Layout, path: Path, steps: list[int], last: int) -> list[int]:
    """The steps from which the run, saved there and resumed, is not bitwise the one that went through."""
    wrong = []
    with connect("cpu", timeout=60) as dist:
        whole = make(dist, chosen, path)
        losses = []
        for step in range(last):
            if step in steps:
                whole.save(keep_last=0)
            losses.append(whole.step()["loss"])
        _, tensors = end_of(whole, last)
        for step in steps:
            again = make(dist, chosen, path)
            again.resume(checkpoint.folder_of(path / "checkpoints", step))
            its_losses, its_tensors = end_of(again, last)
            same = its_losses == losses[step:] and all(
                torch.equal(tensors[name], its_tensors[name]) for name in tensors
            )
            if not same:
                wrong.append(step)
    return wrong


@pytest.mark.parametrize("chosen", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, chosen):
    """Also at the edge of an epoch and on both sides of it."""
    steps = sorted({0, 16, 17, 18, *random.Random(0).sample(range(1, 22), 2)})
    assert run_ranks(2, compare_resumed, chosen, tmp_path, steps, 22) == [[], []]


@pytest.mark.soak
@pytest.mark.parametrize("chosen", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_run_resumed_at_any_step_is_bitwise_the_uninterrupted_one(tmp_path, chosen):
    found = run_ranks(2, compare_resumed, chosen, tmp_path, list(range(STEPS)), STEPS, seconds=1200)
    assert found == [[], []]


def resume_from_a_slow_disk(path: Path) -> tuple[int, list[str]]:
    """Find and load a checkpoint while rank 1 needs longer for a file than the timeout; the files that it hashed."""
    hashed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "LATER", 0.0)
        for name in ("PERIOD", "GRACE"):
            patch.setattr(heartbeat, name, 0.1)
        for name in ("file_hash", "fill"):
            original, naps = getattr(checkpoint.folder, name), iter([3.5])

            def slow(file, *rest, original=original, naps=naps):
                if os.environ["RANK"] == "1":
                    time.sleep(next(naps, 0.0))
                hashed.extend([file.name] * (original.__name__ == "file_hash"))
                return original(file, *rest)

            patch.setattr(checkpoint.folder, name, slow)
        with connect("cpu", timeout=2.5) as dist:
            start = starting_point(RunConfig(dir=str(path), resume="auto"), RunDirectory(path), dist)
            trainer = make(dist, DDP, path)
            trainer.resume(start, hashed=True)
            return trainer.progress.step, hashed


def test_a_disk_that_is_slower_than_the_timeout_ends_no_resuming_and_each_file_is_hashed_once(tmp_path):
    run_ranks(2, some_steps, DDP, tmp_path, 0, 1)
    (step, ours), (_, theirs) = run_ranks(2, resume_from_a_slow_disk, tmp_path)
    assert step == 1
    files = {path.name for path in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    assert sorted(ours + theirs) == sorted(files - {"manifest.json"})


def some_steps(chosen: Layout, path: Path, first: int, last: int) -> tuple[list[int], list[float]]:
    """Resume at a step, train up to another and save there; the rows that this rank read, by where they begin."""
    rows: list[int] = []
    with connect("cpu", timeout=60) as dist:
        trainer = make(dist, chosen, path, rows=1, dropout=0.0)
        if first:
            trainer.resume(checkpoint.folder_of(path / "checkpoints", first))
        losses = []
        for _ in range(first, last):
            for batch in trainer.loader.batches(trainer.progress.samples):
                real = (batch.targets != IGNORE_INDEX).any(1)
                rows += batch.tokens[real, 0].tolist()
            losses.append(trainer.step()["loss"])
        trainer.save(keep_last=0)
        return rows, losses


def test_over_an_epoch_on_changing_ranks_every_sample_is_read_exactly_once(tmp_path):
    """Ranks 1 -> 2 -> 4 -> 3 -> 1, and strategies with them; the loss goes on where it was."""
    legs = [
        (ONE, 0, 3),
        (FSDP, 3, 6),
        (Layout("hsdp", 2, 2, 1), 6, 10),
        (Layout("fsdp", 1, 3, 1), 10, 14),
        (ONE, 14, 17),
    ]
    rows, losses = [], []
    for chosen, first, last in legs:
        ranks = chosen.dp_replicate * chosen.dp_shard
        found = run_ranks(ranks, some_steps, chosen, tmp_path, first, last)
        rows += [row for its_rows, _ in found for row in its_rows]
        assert len({tuple(its_losses) for _, its_losses in found}) == 1, "all ranks log one loss"
        losses += found[0][1]
    assert len(rows) == len(set(rows)) == 17 * ROWS
    ((_, alone),) = run_ranks(1, some_steps, ONE, tmp_path / "alone", 0, 17)
    assert losses[:3] == alone[:3]
    assert losses == pytest.approx(alone, rel=1e-5)
