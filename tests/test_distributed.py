"""What is applied from outside changes cost, never results."""

import pytest
import torch

import minillm
from minillm.distributed.context import Context, connect, find_device, peak_flops, peak_memory
from minillm.distributed.parallelize import parallelize
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tensors import parameter_names

CPU = torch.device("cpu")


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


def test_one_process_is_rank_zero_of_one():
    with connect("cpu") as dist:
        assert (dist.dp_rank, dist.dp_size, dist.is_main, dist.device) == (0, 1, True, CPU)
        assert dist.sum(7) == 7


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"run\.device: 'tpu9' cannot be used here"):
        find_device("tpu9")


def test_a_device_that_holds_no_numbers_is_refused():
    with pytest.raises(ValueError, match=r"run\.device: 'meta' cannot be used here"):
        find_device("meta")


def test_several_processes_are_refused_in_words(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="WORLD_SIZE is 8"), connect():
        pass


def test_the_device_is_measured_where_no_datasheet_knows_it():
    assert peak_flops(CPU, torch.float32) > 1e8
    assert peak_memory(CPU) > 1e6
    assert Context(CPU).is_main
