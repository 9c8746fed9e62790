"""Whatever the layout, the same model is trained: weights, losses, gradients and updates."""

from functools import partial

import pytest
import torch
from ranks import run_ranks

import minillm
from minillm.distributed.config import Layout, ParallelConfig, layout
from minillm.distributed.context import connect, with_mesh
from minillm.distributed.parallelize import gradient_sync, parallelize
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.tensors import local_part, parameter_names

CONFIG = {"vocab_size": 53, "dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}


def build(config, dist, chosen, **options):
    with torch.device("meta"):
        model = Transformer(ModelConfig(**config))
    dist = with_mesh(dist, chosen.dp_replicate, chosen.dp_shard, chosen.tp)
    return parallelize(model, dist=dist, layout=chosen, init=partial(init_weights, seed=3), **options), dist


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def two_micro_batches(config, chosen, options):
    """Weights, and gradients of two micro-batches, the second of pairs, on each rank."""
    with connect("cpu", timeout=60) as dist:
        model, dist = build(config, dist, chosen, **options)
        weights = {name: whole(parameter).detach().clone() for name, parameter in parameter_names(model).items()}
        rows = torch.randint(50, (2, 4, 16), generator=torch.Generator().manual_seed(0))
        for i, tokens in enumerate(rows):
            mine = tokens[dist.dp_rank :: dist.dp_size]
            with gradient_sync(model, last=i == 1):
                branches = torch.tensor([0] * 6 + [1] * 5 + [2] * 5).expand_as(mine) if i else None
                logits = model(mine, branches=branches)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine.flatten(), reduction="sum")
                (loss * dist.dp_size / rows.numel()).backward()
        held = sum(local_part(parameter)[0].numel() for parameter in parameter_names(model).values())
        gradients = {name: whole(parameter.grad) for name, parameter in parameter_names(model).items()}
        return weights, gradients, held, loss.item()


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("tied", [True, False])
def test_every_layout_computes_the_gradients_of_one_process(tied):
    config = CONFIG | {"tie_embeddings": tied}
    weights, gradients, size, _ = run_ranks(1, two_micro_batches, config, Layout("ddp", 1, 1, 1), {})[0]
    cases = [
        (Layout("ddp", 2, 1, 1), {}),
        (Layout("fsdp", 1, 2, 1), {}),
        (Layout("fsdp", 1, 4, 1), {"reshard_after_forward": False, "activation_checkpointing": "selective"}),
        (Layout("hsdp", 2, 2, 1), {"activation_checkpointing": "full"}),
    ]
    for chosen, options in cases:
        ranks = chosen.dp_replicate * chosen.dp_shard
        for its_weights, its_gradients, held, _ in run_ranks(ranks, two_micro_batches, config, chosen, options):
            same(weights, its_weights, rtol=0, atol=0)
            same(gradients, its_gradients, rtol=1e-5, atol=1e-7)
            assert held <= 1.1 * size / chosen.dp_shard, "a rank holds its part"


def test_gradients_sent_in_bf16_are_close():
    *_, size, _ = one = run_ranks(1, two_micro_batches, CONFIG, Layout("ddp", 1, 1, 1), {})[0]
    for chosen in (Layout("ddp", 2, 1, 1), Layout("fsdp", 1, 2, 1)):
        for _, gradients, *_ in run_ranks(2, two_micro_batches, CONFIG, chosen, {"compress": "bf16"}):
            same(one[1], gradients, rtol=2e-2, atol=2e-3)
            assert any(not torch.equal(gradients[name], gradient) for name, gradient in one[1].items())
    assert size


def in_bf16(chosen):
    with connect("cpu", timeout=60) as dist:
        model, dist = build(CONFIG, dist, chosen, dtype=torch.bfloat16)
        tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[dist.dp_rank :: dist.dp_size] if chosen.dp_shard == 2 else tokens)
        logits.float().square().sum().backward()
        parameters = parameter_names(model).values()
        return logits.detach(), {p.dtype for p in parameters}, {p.grad.dtype for p in parameters}


def test_mixed_precision_keeps_weights_and_gradients_in_fp32():
    ((one, *_),) = run_ranks(1, in_bf16, Layout("ddp", 1, 1, 1))
    for rank, (logits, weights, gradients) in enumerate(run_ranks(2, in_bf16, Layout("fsdp", 1, 2, 1))):
        torch.testing.assert_close(logits, one[rank : rank + 1], rtol=0.05, atol=0.05)
        assert weights == gradients == {torch.float32}


@pytest.mark.parametrize(
    ("given", "strategy", "ranks", "found"),
    [
        ({}, "ddp", 8, (8, 1, 1)),
        ({}, "fsdp", 8, (1, 8, 1)),
        ({"tp": 2}, "fsdp", 8, (1, 4, 2)),
        ({"tp": 2}, "ddp", 8, (4, 1, 2)),
        ({}, "hsdp", 32, (4, 8, 1)),
        ({"tp": 4}, "hsdp", 32, (4, 2, 4)),
        ({"dp_replicate": 2}, "hsdp", 8, (2, 4, 1)),
        ({"dp_shard": 2}, "hsdp", 8, (4, 2, 1)),
        ({}, "fsdp", 1, (1, 1, 1)),
    ],
)
def test_what_the_layout_leaves_open_is_filled_in(given, strategy, ranks, found):
    assert layout(ParallelConfig(**given), ranks, strategy, 8) == Layout(strategy, *found)


@pytest.mark.parametrize(
    ("given", "strategy", "message"),
    [
        ({"tp": 3}, "fsdp", "parallel.tp: 3 does not divide the 8 ranks"),
        ({"dp_shard": 2}, "ddp", "parallel.dp_shard: 2 with strategy ddp"),
        ({"dp_replicate": 2}, "fsdp", "parallel.dp_replicate: 2 with strategy fsdp"),
        ({"dp_replicate": 3}, "hsdp", "dp_replicate 3 x dp_shard 2 x tp 1 are 6 ranks, but 8 were started"),
        ({"dp_shard": 16}, "hsdp", "dp_replicate 1 x dp_shard 16 x tp 1 are 16 ranks, but 8 were started"),
        ({"dp_shard": 4}, "fsdp", "dp_replicate 1 x dp_shard 4 x tp 1 are 4 ranks, but 8 were started"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(given, strategy, message):
    with pytest.raises(ValueError, match=message):
        layout(ParallelConfig(**given), 8, strategy, 8)


# --- on one process ---------------------------------------------------------------------------------------------------


def loss_and_gradients(dropout=0.0, **options):
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
    loss, plain = loss_and_gradients(dropout)
    again, recomputed = loss_and_gradients(dropout, activation_checkpointing=kind)
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_compiled_blocks_give_the_same_gradients(kind):
    loss, plain = loss_and_gradients()
    again, compiled = loss_and_gradients(activation_checkpointing=kind, compile=True)
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
