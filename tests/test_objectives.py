from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.data.batch import Batch
from minillm.distributed.context import Context
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken, NextTokenAccuracy
from minillm.trainer import TrainConfig, Trainer

CONFIG = ModelConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, max_seq_len=12, vocab_multiple=8)


def batch_of(B=3, T=12, ignored=(), **fields):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (B, T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets.view(-1)[list(ignored)] = IGNORE_INDEX
    return Batch(tokens[:, :-1], targets, **fields)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_count_is_the_number_of_targets():
    assert NextToken().count(batch_of(ignored=range(7))) == 29


def test_loss_is_the_models_own_cross_entropy():
    model, batch = Transformer(CONFIG), batch_of(ignored=[0, 13, 35])
    expected = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    loss, metrics = NextToken(vocab_size=50)(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
    assert metrics == {}


def test_micro_batches_sum_to_the_whole_batch():
    model, batch, objective = Transformer(CONFIG), batch_of(ignored=[0, 1, 2, 30]), NextToken(vocab_size=50)
    rows = [Batch(*(None if x is None else x[i : i + 1] for x in batch)) for i in range(3)]
    assert sum(map(objective.count, rows)) == objective.count(batch)
    whole = gradients(model, objective(model, batch)[0])
    torch.testing.assert_close(gradients(model, sum(objective(model, row)[0] for row in rows)), whole)


def test_packed_fields_reach_the_model():
    model, objective = Transformer(CONFIG), NextToken(vocab_size=50)
    plain = batch_of()
    ids = (torch.arange(12) >= 5).long().expand(3, 12)
    packed = batch_of(doc_ids=ids, positions=torch.cat([torch.arange(5), torch.arange(7)]).expand(3, 12))
    pieces = [Batch(plain.tokens[:, s], plain.targets[:, s]) for s in (slice(0, 5), slice(5, 12))]
    apart = sum(objective(model, piece)[0] for piece in pieces)
    torch.testing.assert_close(objective(model, packed)[0], apart)
    assert (objective(model, plain)[0] - apart).abs() > 1e-3


class Small(nn.Module):
    """Anything that takes a head will do as a model."""

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, tokens, positions=None, doc_ids=None, head=None):
        return head(self.lm_head, self.embed(tokens).tanh())


def plain_loss(model, batch):
    logits = model(batch.tokens, head=lambda lm_head, hidden: lm_head(hidden))
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


def test_any_callable_that_takes_a_head_will_do():
    model, batch = Small(), batch_of()
    torch.testing.assert_close(NextToken(chunk_tokens=5)(partial(model), batch)[0], plain_loss(model, batch))


def test_options_reach_the_loss(monkeypatch):
    seen = {}

    def head(lm_head, hidden, targets, **options):
        seen.update(options)
        return hidden.sum()

    monkeypatch.setattr("minillm.objectives.chunked_cross_entropy", head)
    NextToken(vocab_size=50, chunk_tokens=3, skip_ignored=True)(Transformer(CONFIG), batch_of())
    assert seen == {"vocab_size": 50, "chunk_tokens": 3, "skip_ignored": True}


def test_penalties_join_what_is_minimised_and_not_what_is_reported():
    model, batch = Transformer(CONFIG), batch_of(ignored=[0, 13, 35])
    plain = NextToken(vocab_size=50)(model, batch)[0]
    loss, metrics = NextToken(vocab_size=50, label_smoothing=0.1, z_loss=1e-2)(model, batch)
    logits, targets = model(batch.tokens).flatten(0, 1), batch.targets.flatten()
    log_z = logits.logsumexp(-1)[targets != IGNORE_INDEX]
    z_loss = 1e-2 * log_z.square().sum()
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) + z_loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
    assert set(metrics) == {"loss", "z_loss"}
    torch.testing.assert_close(metrics["loss"], (plain.detach(), torch.tensor(33)))
    torch.testing.assert_close(metrics["z_loss"], (z_loss.detach(), torch.tensor(33)))
    assert set(NextToken(label_smoothing=0.1)(model, batch)[1]) == {"loss"}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_accuracy_is_the_share_of_targets_that_are_most_likely(precision):
    model, batch = Transformer(CONFIG), batch_of(ignored=[0, 13, 35])
    with torch.autocast("cpu", precision, enabled=precision != torch.float32), torch.no_grad():
        best = model(batch.tokens).argmax(-1)
        batch.targets[0, 1:8] = best[0, 1:8]
        loss, metrics = NextTokenAccuracy(vocab_size=50)(model, batch)
        torch.testing.assert_close(loss, NextToken(vocab_size=50)(model, batch)[0])
    assert metrics == {"accuracy": (int((best == batch.targets).sum()), 33)}
    assert metrics["accuracy"][0] >= 7


def test_the_trainer_reports_the_plain_loss_and_the_z_loss():
    class Loader:
        samples_per_step, samples_per_epoch, tokens_per_step = 6, 6, 72

        def batches(self, cursor):
            return [batch_of(ignored=[0]), batch_of(ignored=range(9))]

    figures = []
    for options in ({}, {"label_smoothing": 0.2, "z_loss": 0.1}):
        model = Transformer(CONFIG)
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            NextToken(vocab_size=50, **options),
            Loader(),
            TrainConfig(max_steps=1, precision="fp32"),
            steps=1,
            lr_at=lambda step: 0.1,
            dist=Context(torch.device("cpu")),
        )
        figures.append(trainer.step())
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-6)
    assert "z_loss" not in figures[0]
    assert figures[1]["z_loss"] > 0
    assert figures[0]["grad_norm"] != pytest.approx(figures[1]["grad_norm"], rel=1e-2)


def test_a_compiled_model_gives_the_same_loss_and_gradients():
    model, batch = Small(), batch_of(ignored=[3])
    smooth = NextToken(chunk_tokens=8, label_smoothing=0.1, z_loss=1e-2)
    torch.testing.assert_close(smooth(torch.compile(model, backend="eager"), batch), smooth(model, batch))
    loss = NextToken(chunk_tokens=8)(torch.compile(model, backend="eager"), batch)[0]
    expected = plain_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
