"""Ranks that share each layer compute what one process does, and none of them more than its part."""

import re
from collections import Counter
from functools import partial

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.distributed.config import Layout
from minillm.distributed.context import connect, with_mesh
from minillm.distributed.parallelize import parallelize
from minillm.distributed.tensor_parallel import apply_tensor_parallel, tensor_parallel_problems
from minillm.losses import (
    IGNORE_INDEX,
    Penalties,
    chunked_cross_entropy,
    chunked_losses,
    penalised_cross_entropy,
    token_logprobs,
)
from minillm.losses.shard import local_head
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.tensors import is_sharded, parameter_names

T, V = 16, 53
SHAPE = {"vocab_size": V, "vocab_multiple": 4, "dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "max_seq_len": T}
MODELS = [
    {"n_kv_heads": 2, "qk_norm": True},
    {"norm": "layernorm", "position": "learned", "mlp": "gelu", "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"norm": "rmsnorm_plus_one", "mlp": "geglu", "embed_scale": True, "window": 3, "window_pattern": "WF"},
    {"norm": "layernorm_plain", "mlp": "relu2", "tie_embeddings": False, "position": "none", "causal": False},
]


def shared_model(dist, **options):
    """A model that all ranks share, made as a run makes it."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SHAPE | options))
    apply_tensor_parallel(model, with_mesh(dist, 1, 1, dist.world_size).mesh["tp"])
    model.to_empty(device="cpu")
    init_weights(model)
    return model


def packed_batch(rows=3):
    """Tokens, targets of which a whole row is ignored, and documents."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(V, (2, rows, T), generator=generator)
    targets[1] = IGNORE_INDEX
    targets[0, :5] = IGNORE_INDEX
    return tokens, targets, torch.arange(T).expand(rows, T) // torch.tensor([5, 7, 16])[:rows, None]


def whole(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def all_losses(lm_head, hidden, targets):
    """Every kind of loss, at once: what the backward pass of one would hide, another shows."""
    penalties = Penalties(label_smoothing=0.1, z_loss=0.01)
    chunked = chunked_losses(lm_head, hidden, targets, V, chunk_tokens=7, penalties=penalties)
    plain = penalised_cross_entropy(lm_head, hidden, targets, V, penalties)
    logprobs = token_logprobs(lm_head, hidden, targets, V, chunk_tokens=9)
    logits = lm_head(hidden)[..., :V]
    return chunked, plain, logprobs, logits


def difference(model, reference, compare_gradients=True):
    """The largest relative distance of values and gradients, over a packed batch and one of pairs without a target."""
    tokens, targets, doc_ids = packed_batch()
    found = []
    pairs = (torch.arange(T) % 5).clamp(max=2).expand_as(tokens)
    for batch_targets, branches in ((targets, None), (torch.full_like(targets, IGNORE_INDEX), pairs)):
        head = partial(all_losses, targets=batch_targets)
        results, gradients = [], []
        for each in (model, reference):
            each.zero_grad()
            chunked, plain, logprobs, logits = each(tokens, doc_ids=doc_ids, branches=branches, head=head)
            (chunked.total + 2 * plain.total + logprobs.square().sum() + 0.1 * logits.square().sum()).backward()
            results.append([*chunked, *plain, logprobs, logits])
            gradients.append({name: p.grad for name, p in parameter_names(each).items()})
            if compare_gradients:
                results[-1] += [whole(gradients[-1][name]) for name in parameter_names(reference)]
        assert not any(g.placements[0].is_partial() for g in gradients[0].values())
        found += [(a - b).norm() / b.norm().clamp(min=1e-2) for a, b in zip(*results, strict=True)]
    return max(float(one.detach()) for one in found)


def compare_models():
    """For each kind of model: how far it is from that of one process, and whether all is as it should be."""
    found = []
    torch.set_default_dtype(torch.float64)
    try:
        with connect("cpu", timeout=300) as dist:
            for options in MODELS:
                model, reference = shared_model(dist, **options), Transformer(ModelConfig(**SHAPE | options))
                assert all(is_sharded(parameter) for parameter in model.parameters())
                assert (model.lm_head.weight is model.embed.weight) == reference.config.tie_embeddings
                found.append(difference(model, reference))
            for block in model.blocks:
                block.compile(backend="aot_eager")
            found.append(difference(model, reference))
            for i, block in enumerate(model.blocks):  # as parallelize does it
                model.blocks[i] = checkpoint_wrapper(block)
            found.append(difference(model, reference))
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def test_two_ranks_compute_what_one_process_does():
    """In float64, because the gradient of some biases is nothing but rounding."""
    for found in run_ranks(2, compare_models):
        assert found == [pytest.approx(0, abs=1e-10)] * (len(MODELS) + 2)


class Watch(TorchDispatchMode):
    """Notes how large the largest tensor is that a rank makes meanwhile, and the collectives that bring it others'."""

    def __init__(self):
        super().__init__()
        self.numel, self.collectives = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does with its parts comes by here too
        made = function(*args, **kwargs or {})
        self.numel = max(self.numel, made.numel() if type(made) is torch.Tensor else 0)
        if function.namespace == "_c10d_functional" and "wait" not in (name := function.name()) and "wrap" not in name:
            self.collectives[name.removeprefix("_c10d_functional::")] += 1
        return made


def sent_by(dist, n_layers):
    """The collectives of forward and backward under bf16, and the dtype of what q_proj reads."""
    model, dtypes = shared_model(dist, n_layers=n_layers), set()
    model.blocks[0].attn.q_proj.register_forward_pre_hook(lambda module, args: dtypes.add(args[0].dtype))
    tokens, targets, _ = packed_batch()
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        model(tokens, head=partial(chunked_cross_entropy, targets=targets, vocab_size=V)).backward()
    return watch.collectives, dtypes


def what_ranks_refuse_and_share():
    facts = {}
    with connect("cpu", timeout=300) as dist:
        model = shared_model(dist, dropout=0.5)
        tokens, targets, _ = packed_batch()
        odd = Transformer(ModelConfig(**SHAPE | {"n_kv_heads": 1}))
        out_of_range = partial(chunked_cross_entropy, targets=targets + V)
        for expected, call in (
            ("15 tokens cannot be cut into parallel.tp 2 equal parts; pad to 16", lambda: model(tokens[:, :15])),
            ("does not generate", lambda: model(tokens, caches=[])),
            ("is not a token", lambda: model(tokens, head=out_of_range)),
            (
                "parallel.tp: 2 does not divide model.n_kv_heads 1",
                lambda: apply_tensor_parallel(odd, model.embed.weight.device_mesh),
            ),
        ):
            with pytest.raises(ValueError, match=expected):
                call()
        torch.manual_seed(dist.rank)
        facts["loss"] = model(tokens, head=partial(chunked_cross_entropy, targets=targets, vocab_size=V)).item()
        facts["eval"] = (model.eval()(tokens) - model(tokens)).abs().max().item()
        large = shared_model(dist, vocab_size=1000, n_layers=1)
        hidden = torch.randn(3, T, 32, requires_grad=True)
        for name, head in (("loss of a rank", chunked_cross_entropy), ("logprobs of a rank", token_logprobs)):
            with Watch() as watch:
                head(large.lm_head, hidden, targets, 1000).sum().backward()
            facts[name] = watch.numel
        facts["sent"] = sent_by(dist, 1), sent_by(dist, 2)
    return facts


def test_what_ranks_cannot_share_is_refused_and_what_they_share_is_the_same():
    facts, other = run_ranks(2, what_ranks_refuse_and_share)
    assert facts["loss"] == other["loss"], "each rank drops other parts of the sequence, and all see the same loss"
    assert facts["eval"] == 0
    for name in ("loss of a rank", "logprobs of a rank"):
        assert facts[name] == 500 * 32, "no rank makes more than its rows of logits (27, 500) and of the weight"
    (one, dtypes), (two, _) = facts["sent"]
    assert two - one == {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 4, "all_reduce": 2}, "a block's"
    assert dtypes == {torch.bfloat16}, "what is gathered is in the dtype of the products that read it"


def step_of(layout, options):
    """Gradients, their norm, and the weights after a step of AdamW, of two micro-batches."""
    with connect("cpu", timeout=300) as dist:
        dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
        if layout.tp > 1:
            with pytest.raises(ValueError, match="selective cannot be compiled"):
                parallelize(nn.Module(), "selective", compile=True, dist=dist, layout=layout)
        with torch.device("meta"):
            model = Transformer(ModelConfig(**SHAPE | {"n_kv_heads": 2, "qk_norm": True, "o_bias": True}))
        called = parallelize(model, dist=dist, layout=layout, init=init_weights, **options)
        parameters = parameter_names(called)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        tokens, targets, doc_ids = (one[dist.dp_rank :: dist.dp_size] for one in packed_batch(rows=2))
        for _ in range(2):
            head = partial(chunked_cross_entropy, targets=targets, vocab_size=V)
            (called(tokens, doc_ids=doc_ids, head=head) * dist.dp_size / 40).backward()
        gradients = {name: whole(parameter.grad).clone() for name, parameter in parameters.items()}
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5))
        optimizer.step()
        if layout.dp_shard > 1:
            with pytest.raises(RuntimeError, match="hand it to the model"):
                local_head(model.lm_head)
        return norm, gradients, {name: whole(parameter).detach() for name, parameter in parameters.items()}


def test_shared_and_sharded_ranks_take_the_step_of_one_process():
    (one,) = run_ranks(1, step_of, Layout("ddp", 1, 1, 1), {})
    cases = [
        (Layout("ddp", 1, 1, 2), {"activation_checkpointing": "selective"}),
        (Layout("fsdp", 1, 2, 2), {"activation_checkpointing": "full"}),
        (Layout("ddp", 2, 1, 2), {}),
    ]
    for layout, options in cases:
        for norm, *found in run_ranks(layout.dp_replicate * layout.dp_shard * layout.tp, step_of, layout, options):
            assert norm.item() == pytest.approx(one[0].item(), rel=1e-5)
            for expected, tensors in zip(one[1:], found):
                for name, tensor in expected.items():
                    torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "tp", "seq_len", "said"),
    [
        ({}, 2, 16, []),
        ({}, 1, 15, []),
        (
            {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8},
            4,
            16,
            ["parallel.tp: 4 does not divide model.n_heads 6", "parallel.tp: 4 does not divide model.n_kv_heads 2"],
        ),
        ({"ffn_dim": 50}, 4, None, ["parallel.tp: 4 does not divide model.ffn_dim 50"]),
        ({"vocab_multiple": 1}, 2, None, ["model.vocab_multiple: 1 leaves .* set it to 2"]),
        ({"vocab_size": 60, "vocab_multiple": 128}, 2, None, ["model.vocab_multiple: 128 pads .* set it to 2"]),
        ({"position": "learned", "max_seq_len": 15}, 2, None, ["model.max_seq_len: 15 learned positions"]),
        ({}, 4, 18, ["data.seq_len: 18 tokens cannot be cut into parallel.tp 4 equal parts; 16 can"]),
    ],
)
def test_each_thing_that_ranks_cannot_share_has_a_line(given, tp, seq_len, said):
    found = tensor_parallel_problems(ModelConfig(**SHAPE | given), tp, seq_len)
    assert len(found) == len(said)
    for line, pattern in zip(found, said):
        assert re.match(pattern, line), line
