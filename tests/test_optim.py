import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from minillm.distributed.parallelize import parallelize
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.optim import (
    OPTIMIZERS,
    Lamb,
    Muon,
    OptimConfig,
    build,
    build_optimizer,
    clip_grad_norm_,
    lr_at,
    muon,
    optimizer_tensors,
    param_groups,
    warmup_steps,
)
from minillm.optim.muon import newton_schulz, orthogonalized

NAMES = list(OPTIMIZERS)
SMALL = ModelConfig(
    vocab_size=50, dim=16, n_layers=1, n_heads=2, ffn_dim=24, max_seq_len=8, tie_embeddings=False, qkv_bias=True
)


def config(**fields):
    return OptimConfig(**{"lr": 1e-2, "warmup_steps": 10, **fields})


def transformer(**fields):
    return Transformer(dataclasses.replace(SMALL, **fields))


def names_by_group(model, optim_config):
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: sorted(names[id(p)] for p in g["params"]) for g in param_groups(model, optim_config)}


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(model, step)
        optimizer.step()


# --- learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        ("cosine", {0: 0.1, 8: 0.9, 9: 1.0, 54: 0.6, 99: 0.2}),
        ("linear", {0: 0.1, 8: 0.9, 9: 1.0, 54: 0.6, 99: 0.2}),
        ("constant", {0: 0.1, 8: 0.9, 9: 1.0, 54: 1.0, 99: 1.0}),
        ("wsd", {0: 0.1, 8: 0.9, 9: 1.0, 54: 1.0, 79: 1.0, 84: 0.6, 99: 0.2}),
    ],
)
def test_learning_rate_at_the_corner_points(schedule, table):
    optim_config = config(lr=1.0, min_lr=0.2, warmup_steps=9, schedule=schedule)
    assert {step: pytest.approx(lr_at(step, optim_config, 100)) for step in table} == table
    # exact where it matters: the peak, and the end
    assert lr_at(9, optim_config, 100) == 1.0
    assert lr_at(99, optim_config, 100) == (1.0 if schedule == "constant" else 0.2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 20, 50])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 20])
def test_the_rate_rises_then_falls_and_never_leaves_its_range(schedule, warmup_steps, max_steps):
    optim_config = config(lr=3e-4, min_lr=1e-5, warmup_steps=warmup_steps, schedule=schedule)
    rates = [lr_at(step, optim_config, max_steps) for step in range(max_steps + 3)]
    assert all(0 < rate <= 3e-4 for rate in rates)
    peak = min(warmup_steps, len(rates) - 1)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if 0 < warmup_steps < max_steps:
        assert rates[warmup_steps] == 3e-4
    if warmup_steps < max_steps - 1:
        assert rates[max_steps - 1] == rates[-1] == 1e-5


def test_inverse_square_root_falls_from_the_warm_up_on_and_stops_at_the_floor():
    inverse = config(lr=1.0, warmup_steps=9, schedule="inverse_sqrt", min_lr=0.25)
    assert [lr_at(step, inverse, 1000) for step in (0, 9, 39, 89, 999)] == pytest.approx([0.1, 1, 0.5, 1 / 3, 0.25])


def test_warm_up_may_be_a_share_of_the_run():
    assert warmup_steps(config(warmup_steps=None, warmup_ratio=0.03), 1000) == 30
    assert warmup_steps(config(warmup_steps=7), 1000) == 7
    assert [warmup_steps(config(warmup_steps=None), steps) for steps in (50, 10_000)] == [5, 100]


def test_cosine_is_a_cosine():
    optim_config = config(lr=1.0, warmup_steps=0)
    rates = [lr_at(step, optim_config, 11) for step in range(11)]
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 10)) / 2 for i in range(11)], abs=1e-15)


def test_stable_decay_falls_like_a_root_over_its_fraction():
    optim_config = config(lr=1.0, warmup_steps=5, schedule="wsd", decay_fraction=0.5)
    assert lr_at(49, optim_config, 100) == 1.0
    assert lr_at(49 + 32, optim_config, 100) == pytest.approx(1 - 0.8)


@pytest.mark.parametrize("field", ["lr", "warmup_steps"])
def test_an_open_field_is_named_when_it_is_needed(field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        lr_at(0, config(**{field: None}), 100)


def test_impossible_combinations_are_reported_together():
    with pytest.raises(ValueError, match=r"min_lr: 0\.1 is above lr 0\.01.*\nmuon_lr: 0.02 has no effect") as error:
        OptimConfig(lr=0.01, min_lr=0.1, muon_lr=0.02, momentum=0.9, warmup_steps=1, warmup_ratio=0.1, lr_scales=["x"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "min_lr",
        "muon_lr",
        "momentum",
        "warmup_ratio",
        "lr_scales",
    ]


# --- groups -----------------------------------------------------------------------------------------------------------

MATRICES = [f"blocks.0.attn.{x}_proj.weight" for x in "koqv"] + [
    f"blocks.0.mlp.{x}_proj.weight" for x in ("down", "gate", "up")
]
VECTORS = [f"blocks.0.attn.{x}_proj.bias" for x in "kqv"] + ["blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight"]


def test_matrices_decay_and_nothing_else():
    assert names_by_group(transformer(), config()) == {
        "decay": [*MATRICES, "lm_head.weight"],
        "no_decay": [*VECTORS, "embed.weight", "norm.weight"],
    }


def test_tied_embeddings_are_embeddings():
    groups = names_by_group(transformer(tie_embeddings=True, position="learned"), config())
    assert groups["decay"] == MATRICES
    assert {"embed.weight", "pos_embed.weight"} <= set(groups["no_decay"])


def test_muon_takes_the_matrices_of_the_blocks():
    assert names_by_group(transformer(), config(name="muon")) == {
        "muon": MATRICES,
        "decay": ["lm_head.weight"],
        "no_decay": [*VECTORS, "embed.weight", "norm.weight"],
    }


def test_groups_carry_their_decay_and_rate():
    groups = {g["name"]: g for g in param_groups(transformer(), config(name="muon", weight_decay=0.3, muon_lr=2e-2))}
    assert {name: (g["weight_decay"], g["lr_scale"]) for name, g in groups.items()} == {
        "muon": (0.3, 2.0),
        "decay": (0.3, 1.0),
        "no_decay": (0.0, 1.0),
    }


def test_frozen_parameters_are_left_out():
    model = transformer().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(model, config())
    model.norm.weight.requires_grad_(True)
    assert names_by_group(model, config()) == {"no_decay": ["norm.weight"]}


def test_a_learning_rate_must_have_been_chosen():
    with pytest.raises(ValueError, match=r"^lr: "):
        build_optimizer(transformer(), config(lr=None))


# --- AdamW ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_steps_equal_torchs(name):
    """With muon: of the parameters that stay with AdamW."""
    model = transformer()
    reference = copy.deepcopy(model)
    optimizer = build_optimizer(model, config(name=name, eps=1e-6, beta1=0.8, beta2=0.9, weight_decay=0.3))
    decay = [p for n, p in reference.named_parameters() if n in [*MATRICES, "lm_head.weight"]]
    rest = [p for n, p in reference.named_parameters() if n not in [*MATRICES, "lm_head.weight"]]
    groups = [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    train(model, optimizer, 20)
    train(reference, expected, 20)
    compared = 0
    for (n, p), q in zip(model.named_parameters(), reference.parameters()):
        if name == "adamw" or n not in MATRICES:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared == (15 if name == "adamw" else 8)


def test_the_fused_kernel_is_used_where_there_is_one(monkeypatch):
    assert build_optimizer(transformer(), config()).param_groups[0]["fused"]

    class WithoutFused(torch.optim.AdamW):
        def __init__(self, params, fused=None, **options):
            if fused:
                raise RuntimeError("`fused=True` requires all the params to be on supported devices")
            super().__init__(params, **options)

    monkeypatch.setattr(torch.optim, "AdamW", WithoutFused)
    model = transformer()
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, config(name=name))
        assert not optimizer.param_groups[0]["fused"]
        train(model, optimizer, 1)


# --- the others -------------------------------------------------------------------------------------------------------

ADAM = {"betas": (0.8, 0.9), "eps": 1e-6}
REFERENCES = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, **ADAM),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=1e-2, **ADAM),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1e-2, **ADAM),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, eps=1e-6),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=1e-2, rho=0.9, eps=1e-6),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, alpha=0.9, eps=1e-6, momentum=0.7),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.7),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_twenty_steps_equal_torchs(name):
    model = transformer()
    reference = copy.deepcopy(model)
    momentum = {"momentum": 0.7} if name in ("rmsprop", "sgd") else {}
    optimizer = build_optimizer(model, config(name=name, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, **momentum))
    matrices = [p for n, p in reference.named_parameters() if p.ndim == 2 and n != "embed.weight"]
    others = [p for n, p in reference.named_parameters() if p.ndim != 2 or n == "embed.weight"]
    expected = REFERENCES[name]([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    train(model, optimizer, 20)
    train(reference, expected, 20)
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_lamb_follows_the_equations_of_its_paper():
    """Algorithm 2 of You et al. 2020, number by number in float64."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=generator, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lamb([{"params": parameters}], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for t in range(1, 21):
        for i, parameter in enumerate(parameters):
            g = parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            m, v = 0.8 * moments[i][0] + 0.2 * g, 0.9 * moments[i][1] + 0.1 * g**2
            moments[i] = m, v
            update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)) ** 0.5 + 1e-6) + 0.3 * weights[i]
            length, reach = weights[i].square().sum().sqrt(), update.square().sum().sqrt()
            weights[i] = weights[i] - 0.1 * (length / reach if length > 0 else 1.0) * update
        optimizer.step()
        for parameter, weight in zip(parameters, weights):
            torch.testing.assert_close(parameter.data, weight, rtol=1e-12, atol=1e-12)


def test_l1_adds_its_sign_to_the_gradient_of_matrices():
    models = transformer(), transformer()
    with_l1 = build_optimizer(models[0], config(name="sgd", momentum=0.0, weight_decay=0.0, l1=0.5))
    without = build_optimizer(models[1], config(name="sgd", momentum=0.0, weight_decay=0.0))
    signs = {name: p.detach().sign() for name, p in models[0].named_parameters()}
    train(models[0], with_l1, 1)
    train(models[1], without, 1)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        pulled = 0.0 if p.ndim < 2 or name == "embed.weight" else 0.5 * 1e-2 * signs[name]
        torch.testing.assert_close(p, q - pulled)


def test_each_group_follows_its_own_scale():
    optim_config = config(name="muon", muon_lr=2e-2, lr_scales=["*.q_proj.weight=0.5", "blocks.*=3", "norm.weight=0"])
    model = transformer()
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in param_groups(model, optim_config) for p in g["params"]}
    assert scales["blocks.0.attn.q_proj.weight"] == 1.0  # half of muon_lr, which is twice lr
    assert scales["blocks.0.attn.k_proj.weight"] == 6.0
    assert scales["blocks.0.attn_norm.weight"] == 3.0
    assert (scales["norm.weight"], scales["embed.weight"]) == (0.0, 1.0)


def test_a_pattern_that_fits_nothing_is_named():
    with pytest.raises(ValueError, match=r"optim\.lr_scales: 'embd' fits no parameter; they are called embed\.weight"):
        build_optimizer(transformer(), config(lr_scales=["embd=0.1"]))


def test_groups_are_made_by_the_names_before_any_wrapping():
    optim_config = config(name="muon", lr_scales=["blocks.0.attn.q_proj.weight=0.5", "blocks.?.mlp.*=3"])
    plain, wrapped = transformer(), transformer()
    parallelize(wrapped, activation_checkpointing="full")
    scales = [
        [(g["name"], g["lr_scale"], [p.shape for p in g["params"]]) for g in param_groups(model, optim_config)]
        for model in (plain, wrapped)
    ]
    assert scales[0] == scales[1]
    assert {scale for _, scale, _ in scales[0]} == {0.5, 1.0, 3.0}


@pytest.mark.parametrize("item", ["embed", "embed=", "=2", "embed=-1", "embed=inf", "embed=x"])
def test_a_scale_that_is_none_is_named(item):
    with pytest.raises(ValueError, match=f"^lr_scales: {item!r}: "):
        config(lr_scales=[item])


# --- Muon -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 48), (1, 1, 5)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    result = U.mT @ newton_schulz(x) @ Vh.mT  # diagonal
    values = result.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(result, torch.diag_embed(values), rtol=0, atol=1e-10)
    large = S.gt(0.01 * S.amax(-1, keepdim=True))
    assert (values[large] > 0.6).all()
    assert (values < 1.3).all()


def test_shapes_are_batched_without_mixing_them_up(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (5, 7), (24, 8), (8, 8)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    alone = [orthogonalized([m])[0] for m in matrices]
    calls = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x: calls.append(tuple(x.shape)) or newton_schulz(x))
    torch.testing.assert_close(orthogonalized(matrices), alone)
    assert sorted(calls) == [(1, 5, 7), (3, 8, 8), (3, 8, 24)]
    calls.clear()
    monkeypatch.setattr(muon, "MAX_STACKED_ELEMENTS", 2 * 64)
    torch.testing.assert_close(orthogonalized(matrices), alone)
    assert sorted(calls) == [(1, 5, 7), (1, 8, 8), (1, 8, 24), (1, 8, 24), (1, 8, 24), (2, 8, 8)]


def test_muon_steps_are_torchs_up_to_its_bf16():
    model = nn.Sequential(nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False), nn.Linear(16, 16, bias=False))
    reference = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, config(name="muon", weight_decay=0.3, momentum=0.9))
    expected = torch.optim.Muon(
        reference.parameters(), lr=1e-2, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    train(model, optimizer, 20)
    train(reference, expected, 20)
    for p, q, begin in zip(model.parameters(), reference.parameters(), start):
        assert (p - q).norm() < 0.02 * (q - begin).norm()


def test_muon_step_is_the_published_rule():
    """In float64, written out for one matrix."""
    weight = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(10, 6, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    momentum = torch.zeros_like(weight)
    optimizer = build_optimizer(model, config(name="muon", weight_decay=0.3, momentum=0.9))
    for step in range(3):
        give_gradients(model, step)
        g = model.weight.grad.clone()
        momentum = 0.9 * momentum + g  # torch and we keep (1 - 0.9) times this, which has the same direction
        X = g + 0.9 * momentum
        X = X / X.norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        weight = weight - 1e-2 * 0.3 * weight - 1e-2 * 0.2 * math.sqrt(10) * X
        optimizer.step()
    torch.testing.assert_close(model.weight.data, weight, rtol=1e-6, atol=1e-6)


def test_an_update_is_as_large_as_adamws():
    model = nn.Linear(64, 256, bias=False)
    before = model.weight.detach().clone()
    train(model, build_optimizer(model, config(name="muon", weight_decay=0.0)), 1)
    assert ((model.weight - before).square().mean().sqrt() / 1e-2).item() == pytest.approx(0.2, rel=0.15)


def test_muon_follows_the_group_rate():
    slow, fast = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    fast.load_state_dict(slow.state_dict())
    before = slow.weight.detach().clone()
    for model, lr in ((slow, 1e-3), (fast, 2e-3)):
        optimizer = build_optimizer(model, config(name="muon", weight_decay=0.0))
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer, 1)
    torch.testing.assert_close(fast.weight - before, 2 * (slow.weight - before))


def test_muon_ignores_parameters_without_gradient_and_survives_a_zero_one():
    model = transformer()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, config(name="muon", weight_decay=0.0))
    optimizer.step()
    assert not optimizer.state
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
        Muon([{"name": "muon", "params": [nn.Parameter(torch.zeros(3, 4, 5))]}], lr=1e-2)


def test_muon_runs_its_closure():
    model = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(model, config(name="muon"))

    def closure():
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.9, 1.0, 1.1, None])
def test_clipping_equals_torchs_and_returns_the_norm_before(share):
    model = transformer()
    give_gradients(model, 0)
    model.norm.weight.grad = None
    reference = copy.deepcopy(model)
    for p, q in zip(model.parameters(), reference.parameters()):
        q.grad = None if p.grad is None else p.grad.clone()
    max_norm = (
        share and share * torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    )
    norm = clip_grad_norm_(model.parameters(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm or math.inf)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for p, q in zip(model.parameters(), reference.parameters()):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_a_norm_that_is_not_finite_is_returned():
    model = nn.Linear(3, 3)
    for value in (math.nan, math.inf):
        give_gradients(model, 0)
        model.weight.grad[1, 1] = value
        assert not clip_grad_norm_(model.parameters(), 1.0).isfinite()


def test_the_norm_of_many_numbers_is_as_exact_as_of_few():
    """Also where ranks hold parts of them, it is the same: not so of sums whose error grows with their length."""
    many = nn.Parameter(torch.empty(10_000_000))
    many.grad = torch.randn(len(many), generator=torch.Generator().manual_seed(0))
    assert clip_grad_norm_([many], None).item() == pytest.approx(many.grad.double().norm().item(), rel=1e-6)


def test_without_gradients_the_norm_is_zero():
    assert clip_grad_norm_(nn.Linear(3, 3).parameters(), 1.0) == 0


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_into_a_checkpoint_and_back_bitwise(name):
    model = transformer()
    optimizer = build_optimizer(model, config(name=name))
    train(model, optimizer, 3)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, model.named_parameters()).items()}
    resumed = copy.deepcopy(model)
    other = build_optimizer(resumed, config(name=name))
    for key, tensor in optimizer_tensors(other, resumed.named_parameters()).items():
        tensor.copy_(saved[key])
    train(model, optimizer, 3, start=3)
    train(resumed, other, 3, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
    one, two = (optimizer_tensors(o, m.named_parameters()) for o, m in ((optimizer, model), (other, resumed)))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_state_made_in_advance_is_what_the_first_step_makes(name, fused, monkeypatch):
    monkeypatch.setattr(build, "has_fused_adamw", lambda parameters: fused)
    models = transformer(), transformer()
    optimizers = [build_optimizer(model, config(name=name)) for model in models]
    empty = optimizer_tensors(optimizers[0], models[0].named_parameters())
    assert not any(value.any() for key, value in empty.items() if "mu_product" not in key)
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 2)
    advance, lazy = (optimizer_tensors(o, m.named_parameters()) for o, m in zip(optimizers, models))
    assert list(advance) == list(lazy)
    for key in advance:
        assert torch.equal(advance[key], lazy[key])
        assert (advance[key].dtype, advance[key].device) == (lazy[key].dtype, lazy[key].device)


def test_state_is_named_by_parameter():
    model = transformer()
    names = optimizer_tensors(build_optimizer(model, config(name="muon")), dict(model.named_parameters())).keys()
    assert {n for n in names if "q_proj.weight" in n} == {"optim.momentum_buffer.blocks.0.attn.q_proj.weight"}
    assert {n for n in names if "lm_head" in n} == {
        f"optim.{key}.lm_head.weight" for key in ("step", "exp_avg", "exp_avg_sq")
    }
