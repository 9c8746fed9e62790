import math

import pytest
import torch
from torch import nn

from minillm.data.batch import Batch
from minillm.eval import perplexity
from minillm.eval.perplexity import evaluate, evaluation_mode, token_byte_lengths
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.tokenizer import TokenizerConfig, train_tokenizer

CONFIG = ModelConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, max_seq_len=8, dropout=0.5)
OBJECTIVE = NextToken(vocab_size=50)


def batches(*rows, T=8, ignored=0):
    """Batches of so many rows each, the same rows in the same order whatever the split."""
    tokens = torch.randint(0, 50, (sum(rows), T + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets.view(-1)[:ignored] = IGNORE_INDEX
    return [Batch(x, y) for x, y in zip(tokens[:, :-1].split(rows), targets.split(rows))]


def test_loss_is_the_mean_over_all_tokens_however_they_are_batched():
    model = Transformer(CONFIG)
    whole = evaluate(model, batches(7, ignored=13), OBJECTIVE)
    for split in [(1,) * 7, (3, 3, 1), (6, 1)]:
        assert evaluate(model, batches(*split, ignored=13), OBJECTIVE) == pytest.approx(whole, rel=1e-6)
    batch = batches(7, ignored=13)[0]
    logprobs = model.eval()(batch.tokens).log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])
    expected = -logprobs[batch.targets != IGNORE_INDEX].mean().item()
    assert whole["val_loss"] == pytest.approx(expected)
    assert whole["perplexity"] == pytest.approx(math.exp(expected))
    assert whole["tokens"] == 7 * 8 - 13


def test_sums_are_read_from_the_device_now_and_then(monkeypatch):
    model, token_bytes = Transformer(CONFIG), torch.ones(50).long()
    expected = evaluate(model, batches(*[1] * 7), OBJECTIVE, token_bytes)
    for every in (1, 3, 7):
        monkeypatch.setattr(perplexity, "READ_EVERY", every)
        assert evaluate(model, batches(*[1] * 7), OBJECTIVE, token_bytes) == expected


def test_bits_per_byte_divide_by_the_bytes_of_the_targets():
    token_bytes = torch.arange(50) % 4
    token_bytes[:5] = 0  # special tokens
    data = batches(2, 3, ignored=5)
    result = evaluate(Transformer(CONFIG), data, OBJECTIVE, token_bytes)
    targets = torch.cat([b.targets.flatten() for b in data])
    targets = targets[targets != IGNORE_INDEX]
    assert result["bytes"] == int(token_bytes[targets].sum())
    assert result["val_bpb"] == pytest.approx(result["val_loss"] * len(targets) / math.log(2) / result["bytes"])


def test_a_uniform_model_needs_the_bits_of_its_vocabulary():
    def uniform(tokens, head=None, **fields):
        return head(lm_head, torch.zeros(*tokens.shape, 4))

    lm_head = nn.Linear(4, 256, bias=False)
    model = nn.Module()
    model.forward = uniform
    data = [Batch(*(torch.randint(0, 256, (2, 8)) for _ in range(2)))]
    result = evaluate(model, data, NextToken(), token_bytes=torch.ones(256, dtype=torch.long))
    assert result["val_bpb"] == pytest.approx(8)
    assert result["perplexity"] == pytest.approx(256, rel=1e-5)


def test_metrics_are_averaged_by_their_own_counts():
    class Metered(NextToken):
        def __call__(self, model, batch):
            loss_sum, _ = super().__call__(model, batch)
            return loss_sum, {"rows": (torch.tensor(3.0) * len(batch.tokens), 2)}

    result = evaluate(Transformer(CONFIG), batches(1, 4), Metered(vocab_size=50))
    assert result["val_rows"] == 3 * 5 / 4


def test_a_metric_that_counted_nothing_has_no_mean():
    class Metered(NextToken):
        def __call__(self, model, batch):
            return super().__call__(model, batch)[0], {"rows": (torch.tensor(0.0), 0)}

    assert "val_rows" not in evaluate(Transformer(CONFIG), batches(1), Metered(vocab_size=50))


def test_all_figures_are_of_the_loss_that_is_reported():
    """Not of what is minimised, which may be more."""
    model, token_bytes = Transformer(CONFIG), torch.full((50,), 2)
    plain = evaluate(model, batches(2, 3), OBJECTIVE, token_bytes)
    penalised = evaluate(model, batches(2, 3), NextToken(vocab_size=50, label_smoothing=0.3, z_loss=0.1), token_bytes)
    assert penalised.pop("val_z_loss") > 0
    assert penalised == pytest.approx(plain, rel=1e-6)


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was():
    model = Transformer(CONFIG).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert evaluate(model, batches(3), OBJECTIVE) == evaluate(model, batches(3), OBJECTIVE)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, tokens, positions=None, doc_ids=None, head=None):
        return head(self.lm_head, self.embed(tokens).tanh())


@pytest.mark.parametrize("compiled", [False, True])
def test_training_goes_on_after_an_evaluation(compiled):
    model = Small()
    trained = torch.compile(model, backend="eager") if compiled else model
    evaluate(trained, batches(3), OBJECTIVE)
    assert trained.training
    assert all(p.grad is None for p in model.parameters())
    OBJECTIVE(trained, batches(3)[0])[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_graph_is_built_and_no_inference_tensor_is_left():
    modes = []

    class Watching(NextToken):
        def __call__(self, model, batch):
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().__call__(model, batch)

    evaluate(Small(), batches(2), Watching())
    assert modes == [(False, False)]
    assert torch.is_grad_enabled()


def test_sums_go_through_reduce_before_they_are_divided():
    model, seen = Transformer(CONFIG), []

    def two_ranks(sums):
        seen.append(sums.dtype)
        return 2 * sums

    alone, both = (evaluate(model, batches(3), OBJECTIVE, torch.ones(50).long(), r) for r in (None, two_ranks))
    assert seen == [torch.float64]
    assert both == pytest.approx(alone | {"tokens": 48, "bytes": 48})


@pytest.mark.parametrize("data", [[], batches(2, ignored=16)])
def test_nothing_to_evaluate_is_an_error(data):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(Transformer(CONFIG), data, OBJECTIVE)


def test_a_hopeless_model_has_infinite_perplexity():
    class Hopeless(NextToken):
        def __call__(self, model, batch):
            return torch.tensor(1e5 * self.count(batch)), {}

    assert evaluate(Transformer(CONFIG), batches(2), Hopeless())["perplexity"] == math.inf


def test_token_bytes_add_up_to_the_text():
    text = "Ünïcode, 中文 and plain words. " * 20
    tokenizer = train_tokenizer([text], TokenizerConfig(kind="byte"))
    lengths = token_byte_lengths(tokenizer)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert not lengths[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]].any()
