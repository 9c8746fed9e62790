"""What is applied from outside changes cost, never results."""

import pytest
import torch

import minillm
from minillm.distributed.parallelize import parallelize
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tensors import parameter_names


def gradients(dropout=0.0, **options):
    model = Transformer(ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, max_seq_len=16, dropout=dropout))
    names = parameter_names(model)
    parallelize(model, **options)
    assert parameter_names(model).keys() == names.keys()
    torch.manual_seed(1)
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in parameter_names(model).items()}


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(kind, dropout):
    loss, plain = gradients(dropout)
    again, recomputed = gradients(dropout, activation_checkpointing=kind)
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_compiled_blocks_give_the_same_gradients(kind):
    loss, plain = gradients()
    again, compiled = gradients(activation_checkpointing=kind, compile=True)
    torch.testing.assert_close(loss, again)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_a_model_that_recomputes_is_saved_under_its_own_names(tmp_path, kind):
    model = Transformer(ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, max_seq_len=16))
    tokens = torch.arange(16)[None]
    minillm.save(parallelize(model, kind), None, tmp_path / "saved")
    again, _ = minillm.load(tmp_path / "saved")
    assert torch.equal(again(tokens), model.eval()(tokens))
