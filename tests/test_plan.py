"""Counts made before a model exists agree with the model that then exists."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.lora import LoRAConfig, apply_lora
from minillm.model import attention
from minillm.model.config import ModelConfig
from minillm.model.presets import preset
from minillm.model.transformer import Transformer
from minillm.plan import (
    count_parameters,
    embedding_tables,
    flops_per_token,
    hoffmann_parametric_tokens,
    hoffmann_tokens,
    kaplan_tokens,
    optimal_tokens,
    recommend,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_counts_are_those_of_the_real_model(tied, position):
    config = ModelConfig(vocab_size=50, dim=16, n_heads=2, position=position, max_seq_len=8, tie_embeddings=tied)
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in Transformer(config).parameters())
    assert count.embedding == (8 * 16 if position == "learned" else 0) + (0 if tied else 50 * 16)
    vectors = (2 * config.n_layers + 1) * 16  # the norms
    assert count.total == count.embedding + count.matmul + vectors


def test_flops_are_those_that_torch_counts(monkeypatch):
    """Forward and backward of a real model, by torch's own counter, which knows each matrix product."""
    monkeypatch.setattr(attention, "attend", attention.attend_reference)  # plain products, which it can count
    config = ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16)
    model = Transformer(config)
    B, T = 2, 24
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() / (B * T) == flops_per_token(config, T)


def upper_half(model):
    for module in (model.embed, *model.blocks[:2]):
        module.requires_grad_(False)


def adapters(model):
    apply_lora(model, LoRAConfig(r=4, modules_to_save=["embed"]))  # so that the gradient has to come all the way down


@pytest.mark.parametrize("adapt", [upper_half, adapters])
def test_what_is_frozen_takes_fewer_operations(monkeypatch, adapt):
    monkeypatch.setattr(attention, "attend", attention.attend_reference)
    config = ModelConfig(vocab_size=64, dim=32, n_layers=4, n_heads=4, tie_embeddings=False)
    model = Transformer(config)
    adapt(model)
    B, T = 2, 24
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long)).sum().backward()
    found = flops_per_token(config, T, adapt)
    # of the first block that the gradient reaches, the inputs need none
    assert found == pytest.approx(counter.get_total_flops() / (B * T), rel=0.0 if adapt == adapters else 0.04)
    assert found < 0.9 * flops_per_token(config, T)


def test_flops_of_gpt2_are_the_palm_formula():
    # 6 N + 12 L D T with the matmul weights of GPT-2 124M: 12 layers of 12 * 768^2, and lm_head
    N = 12 * 12 * 768**2 + 50_257 * 768
    assert flops_per_token(preset("gpt2-124m"), 1024) == 6 * N + 12 * 12 * 768 * 1024


def test_a_window_limits_the_keys_that_count():
    fields = {"vocab_size": 64, "dim": 32, "n_layers": 4}
    full, windowed = (ModelConfig(**fields, **more) for more in ({}, {"window": 6, "window_pattern": "WWWF"}))
    assert flops_per_token(full, 24) - flops_per_token(windowed, 24) == 12 * 3 * 32 * (24 - 6)
    assert flops_per_token(full, 5) == flops_per_token(windowed, 5)


def test_a_larger_corpus_gets_a_larger_model_and_smaller_steps():
    chosen = [recommend(10**exponent) for exponent in (4, 7, 8, 9, 12)]
    sizes = [count_parameters(preset(one["model.preset"])).total for one in chosen]
    rates = [one.get("optim.muon_lr", one["optim.lr"]) for one in chosen]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert rates == sorted(rates, reverse=True)


# Hoffmann et al. 2022, table 3: parameters, training FLOPs, tokens (where they are rounded too much: FLOPs / 6 N)
TABLE_3 = [(400e6, 8.0e9), (1e9, 20.2e9), (10e9, 205.1e9), (67e9, 5.76e23 / (6 * 67e9)), (1e12, 21.2e12)]


@pytest.mark.parametrize(("parameters", "tokens"), TABLE_3)
def test_optimal_tokens_are_those_of_hoffmanns_table(parameters, tokens):
    assert hoffmann_tokens(parameters) == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize("parameters", [1e8, 1e10])
def test_the_parametric_optimum_has_the_least_loss_of_its_compute(parameters):
    """By trying: with the same compute no other size reaches a lower loss."""
    product = parameters * hoffmann_parametric_tokens(parameters)

    def loss(n):
        return 406.4 / n**0.34 + 410.7 / (product / n) ** 0.28

    assert loss(parameters) < min(loss(0.98 * parameters), loss(1.02 * parameters))


def test_kaplans_optimum_leaves_the_embeddings_out():
    config = preset("gpt2-1.5b")
    count = count_parameters(config)
    assert count.total - embedding_tables(config) == pytest.approx(12 * 48 * 1600**2, rel=2e-3)
    assert kaplan_tokens(int(1.3e9)) == pytest.approx(2e10)
    found = optimal_tokens(count, config)
    assert found.kaplan < found.hoffmann
