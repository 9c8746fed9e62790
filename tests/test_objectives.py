from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minillm.data.batch import Batch
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken

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


def test_a_compiled_model_gives_the_same_loss_and_gradients():
    model, batch = Small(), batch_of(ignored=[3])
    loss = NextToken(chunk_tokens=8)(torch.compile(model, backend="eager"), batch)[0]
    expected = plain_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
