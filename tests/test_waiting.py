"""A slow loader is noticed and named; a fast one is not."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from minillm.data.loader import Loader
from minillm.distributed.context import Context
from minillm.log import Clock, read_metrics
from minillm.run import RunDirectory
from minillm.trainer import TrainConfig, Trainer
from minillm.trainer.waiting import LoaderWatch


class Store:
    """Tokens on a disk that takes its time."""

    n_tokens = 4096
    document_offsets = np.arange(0, 4097, 64)

    def __init__(self, seconds):
        self.seconds = seconds

    def tokens(self, start, stop):
        time.sleep(self.seconds)
        return np.arange(start, stop) % 16

    def source(self, document):
        return f"text.txt:{document}"


class Bigram:
    def count(self, batch):
        return batch.targets.numel()

    def __call__(self, model, batch):
        logits = model(batch.tokens).flatten(0, 1)  # (B * T, V)
        return nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum"), {}


def train(directory, seconds, steps):
    (directory / "checkpoints").mkdir()
    model = nn.Embedding(16, 16)
    store = Store(seconds)
    loader = Loader(store, seq_len=32, packing=False, micro_batch_size=4, samples_per_step=4, seed=0)
    Trainer(
        model,
        torch.optim.SGD(model.parameters()),
        Bigram(),
        loader,
        TrainConfig(precision="fp32"),
        steps=steps,
        lr_at=lambda step: 0.1,
        dist=Context(torch.device("cpu")),
        run=RunDirectory(directory),
    ).fit()
    loader.close()
    return read_metrics(directory / "metrics.jsonl")


def test_a_slow_loader_is_named_once_with_what_to_do(tmp_path, caplog):
    rows = train(tmp_path, seconds=0.015, steps=80)
    (warning,) = (record.getMessage() for record in caplog.records if "waiting" in record.getMessage())
    assert "Loader reads more slowly than the model trains. Move data.cache_dir" in warning
    assert int(warning.partition("% of")[0].split()[-1]) > 10
    assert max(row["loader_wait"] for row in rows) > 0.1


@pytest.mark.parametrize(("wait", "warnings"), [(0.3, 1), (0.09, 0)])
def test_the_share_of_the_time_decides_and_the_first_steps_do_not_count(caplog, wait, warnings):
    clock, watch = Clock(), LoaderWatch(loader=None)
    for step in range(1, 101):
        clock.seconds += 1.0
        clock.waited += 0.9 if step <= 20 else wait
        watch.look(clock, step)
    assert len(caplog.records) == warnings
    assert all("step 40: 30% of the last 20 seconds" in record.getMessage() for record in caplog.records)


def test_a_toy_that_waits_for_an_instant_is_left_alone(caplog):
    clock, watch = Clock(), LoaderWatch(loader=None)
    for step in range(1, 201):
        clock.seconds += 0.004
        clock.waited += 0.003
        watch.look(clock, step)
    assert not caplog.records
