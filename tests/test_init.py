"""Where weights begin: a pure function of (seed, parameter name), whatever the device, order and neighbours."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from minillm.model.config import ModelConfig
from minillm.model.init import init_weights, initial_weight
from minillm.model.transformer import Transformer

SHAPE = {"vocab_size": 500, "dim": 64, "n_layers": 2, "n_heads": 4}
NORMS = ("rmsnorm", "rmsnorm_plus_one")
EVERYTHING = ModelConfig(
    **SHAPE, norm="layernorm", position="learned", qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True
)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [EVERYTHING, ModelConfig(**SHAPE), ModelConfig(**SHAPE, tie_embeddings=False)])
def test_meta_construction_gives_the_same_weights_as_direct(config):
    with torch.device("meta"):
        model = Transformer(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    assert (model.lm_head.weight is model.embed.weight) == config.tie_embeddings
    direct = parameters(Transformer(config))
    assert parameters(model).keys() == direct.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, direct[name]), name


def test_a_parameter_depends_on_seed_and_name_alone():
    """Another depth, other options, another state of torch's own generator: the same beginning."""
    small = parameters(Transformer(ModelConfig(**SHAPE)))
    torch.manual_seed(1)
    torch.rand(1000)
    other = Transformer(ModelConfig(**SHAPE | {"n_heads": 2, "qkv_bias": True, "qk_norm": True}))
    for name, parameter in other.named_parameters():
        if name in small:
            assert torch.equal(parameter, small[name]), name
    assert not torch.equal(small["blocks.0.attn.q_proj.weight"], small["blocks.1.attn.q_proj.weight"])
    assert not torch.equal(small["blocks.0.attn.q_proj.weight"], small["blocks.0.attn.k_proj.weight"])
    init_weights(other, seed=1)
    for name, parameter in other.named_parameters():
        if name in small and parameter.dim() == 2:
            assert not torch.equal(parameter, small[name]), name


def test_the_same_numbers_in_every_process():
    """A weight written down: it changes only if someone changes where every run of every user begins."""
    weight = initial_weight(ModelConfig(**SHAPE), "blocks.0.attn.q_proj.weight", torch.Size([64, 64]), seed=0)
    torch.testing.assert_close(
        weight[0, :4], torch.tensor([0.14348, 0.093692, -0.078028, -0.029716]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("tied", [True, False])
def test_each_kind_of_parameter_begins_by_its_rule(tied):
    for name, weight in parameters(Transformer(dataclasses.replace(EVERYTHING, tie_embeddings=tied))).items():
        if name.endswith("bias"):
            assert weight.abs().max() == 0, name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = weight.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * 2)
            if not tied and "embed" in name:
                std = 1
            if name == "lm_head.weight":
                std = 1 / weight.shape[1]
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert weight.mean().item() == pytest.approx(0, abs=0.05 * std), name


@pytest.mark.parametrize(("dim", "n_layers"), [(64, 2), (256, 8)])
def test_signals_keep_their_size(dim, n_layers):
    """Whatever the width and depth, the blocks add less than 1 to the stream, and untrained scores are small."""
    stream, logits = untrained(dim, n_layers, tie_embeddings=True)
    assert 0.1 < stream < 1
    assert logits.std().item() == pytest.approx(1, abs=0.1)
    stream, logits = untrained(dim, n_layers, tie_embeddings=False)
    assert 1 < stream < 2
    assert logits.std().item() == pytest.approx(dim**-0.5, rel=0.2)


def untrained(dim, n_layers, tie_embeddings):
    """The size of what leaves the last block, and the logits, of a model as it begins."""
    model = Transformer(
        ModelConfig(vocab_size=500, dim=dim, n_layers=n_layers, n_heads=4, tie_embeddings=tie_embeddings)
    )
    stream = []
    model.norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))
    logits = model(torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0)))
    return stream[0].square().mean().sqrt().item(), logits


def test_a_norm_that_adds_one_begins_as_the_one_that_does_not():
    tokens = torch.arange(20)[None]
    plain, plus_one = (Transformer(ModelConfig(**SHAPE, norm=norm, qk_norm=True)) for norm in NORMS)
    assert not plus_one.norm.weight.any()
    torch.testing.assert_close(plus_one(tokens), plain(tokens))


def test_a_parameter_without_a_rule_is_an_error():
    model = Transformer(ModelConfig(**SHAPE))
    model.blocks[0].extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"blocks\.0\.extra\.weight: no rule"):
        init_weights(model)


def test_dtype_and_device_do_not_change_the_draw():
    model, half = Transformer(ModelConfig(**SHAPE)), Transformer(ModelConfig(**SHAPE)).to(torch.bfloat16)
    init_weights(half, seed=0)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(torch.bfloat16)), name
