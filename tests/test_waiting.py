"""A slow loader is noticed and named; a fast one is not."""

import time

import numpy as np
import torch
from torch import nn

from minillm.data.loader import Loader
from minillm.distributed.context import Context
from minillm.log import read_metrics
from minillm.run import RunDirectory
from minillm.trainer import TrainConfig, Trainer


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
    share = int(warning.partition("% of")[0].split()[-1])
    assert 50 < share <= 100
    assert np.median([row["loader_wait"] for row in rows]) > 0.5


def test_a_loader_that_is_ready_is_not_mentioned(tmp_path, caplog):
    rows = train(tmp_path, seconds=0, steps=200)
    assert "waiting" not in caplog.text
    assert all(0 <= row["loader_wait"] <= 1 for row in rows)
