"""Adapters: the formulas of their papers, what is trained and stored, and that they are the same run everywhere."""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from minillm.cli import dispatch
from minillm.data.batch import Batch
from minillm.distributed.context import Context
from minillm.distributed.parallelize import parallelize
from minillm.load import export, load, load_base, load_weights, save, taught_template, weights_hash
from minillm.lora import LoRAConfig, LoRALinear, adapted, apply_lora, base_parameters, disabled, merge_lora, merged
from minillm.merge import merge
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.run import RunDirectory
from minillm.tensors import parameter_names
from minillm.trainer import DTYPES, TrainConfig, Trainer

V, T, STEPS = 40, 16, 8
SHAPE = {"vocab_size": V, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": T, "qkv_bias": True}
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def make_model(seed=0, **changes) -> Transformer:
    """A small model whose biases are not 0 either."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SHAPE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def with_adapters(model=None, **fields) -> Transformer:
    """A model with adapters that do something."""
    model = apply_lora(model or make_model(), LoRAConfig(**{"r": 4, "alpha": 6.0} | fields))
    shake(model)
    return model


@torch.no_grad()
def shake(model):
    generator = torch.Generator().manual_seed(1)
    for layer in adapted(model).values():
        layer.lora_b.normal_(0, 0.1, generator=generator)
        if layer.magnitude is not None:
            layer.magnitude *= 1 + 0.1 * torch.randn(layer.magnitude.shape, generator=generator)


def tokens(rows=2, seed=0):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_begins_as_its_base(kind):
    expected = make_model()(tokens())
    assert torch.allclose(apply_lora(make_model(), LoRAConfig(r=4, **KINDS[kind]))(tokens()), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_formula_of_its_paper(kind, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 20, bias=bias), torch.randn(3, 5, 12, requires_grad=True)
    weight, offset = linear.weight.detach().clone(), linear.bias.detach().clone() if bias else torch.zeros(20)
    model = nn.Module()
    model.proj = linear
    apply_lora(model, LoRAConfig(r=4, alpha=6.0, targets=["proj"], **KINDS[kind]))
    shake(model)
    layer = model.proj
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    scale = {"lora": 6 / 4, "rslora": 6 / 2, "dora": 6 / 4}[kind]
    whole = weight + scale * b @ a
    if kind == "dora":
        m = layer.magnitude.detach().clone().requires_grad_()
        whole = whole * (m / whole.detach().norm(dim=1))[:, None]
    other = x.detach().clone().requires_grad_()
    expected, found = F.linear(other, whole, offset), layer(x)
    assert torch.allclose(found, expected, atol=1e-5)
    g = torch.randn_like(found)
    found.backward(g)
    expected.backward(g)
    pairs = [(x, other), (layer.lora_a, a), (layer.lora_b, b)] + ([(layer.magnitude, m)] if kind == "dora" else [])
    for mine, reference in pairs:
        assert torch.allclose(mine.grad, reference.grad, atol=1e-5)
    assert layer.weight.grad is None
    assert torch.allclose(layer.merged(), whole, atol=1e-6)


def test_dropout_is_of_the_adapter_alone_and_of_training_alone():
    model = with_adapters(dropout=0.5)
    still = model(tokens())
    assert torch.equal(model(tokens()), still)
    model.train()
    assert not torch.allclose(model(tokens()), still, atol=1e-3)
    with disabled(model):
        assert torch.allclose(model(tokens()), make_model()(tokens()), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_same_model_and_plain(kind):
    model = with_adapters(**KINDS[kind])
    expected = model(tokens())
    assert not torch.allclose(expected, make_model()(tokens()), atol=1e-2)
    assert merge_lora(model) is model
    assert (model(tokens()) - expected).abs().max() < 1e-5
    plain = make_model()
    assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in plain.named_parameters()
    ]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_merged_for_a_while_is_unmerged_bit_for_bit(kind):
    model = with_adapters(**KINDS[kind])
    expected, before = model(tokens()), weights(model)
    with merged(model):
        assert (model(tokens()) - expected).abs().max() < 1e-5
        with pytest.raises(ValueError, match="merged or disabled at the moment"), disabled(model):
            pass
    assert torch.equal(model(tokens()), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_disabled_is_the_base_and_ends_with_the_block():
    model = with_adapters(dora=True)
    with_them = model(tokens())
    with disabled(model):
        assert torch.allclose(model(tokens()), make_model()(tokens()), atol=1e-6)
    with pytest.raises(ValueError, match="more than the model's max_seq_len"), disabled(model):
        model(torch.zeros(1, T + 1, dtype=torch.int64))
    assert torch.equal(model(tokens()), with_them)


def test_where_modules_are_trained_in_full_there_is_no_base_to_go_back_to():
    model = with_adapters(make_model(tie_embeddings=False), modules_to_save=["lm_head"])
    message = r"lm_head\.weight: trained in full .*load it as a model of its own"
    with pytest.raises(ValueError, match=message), disabled(model):
        pass


def test_a_base_in_half_the_memory_computes_with_its_rounded_weights():
    model = with_adapters(base_precision="bf16")
    base = make_model()
    for name in adapted(model):
        layer = base.get_submodule(name)
        layer.weight.data = layer.weight.data.bfloat16().float()
    assert model.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.embed.weight.dtype == model.norm.weight.dtype == torch.float32
    reference = with_adapters(base)
    for each in (model, reference):
        each(tokens()).square().sum().backward()
    assert torch.allclose(model(tokens()), reference(tokens()), atol=1e-5)
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_no_copy_of_a_frozen_weight_is_kept(kind):
    model, saved = with_adapters(**KINDS[kind]), []
    frozen = {layer.weight.data_ptr() for layer in adapted(model).values()}
    shapes = {tuple(layer.weight.shape) for layer in adapted(model).values()}
    head = lambda lm_head, hidden: hidden  # noqa: E731

    def note(tensor):
        if tuple(tensor.shape) in shapes and tensor.data_ptr() not in frozen:
            saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(tokens(rows=3), head=head).float().sum().backward()
    assert not saved
    assert all(layer.lora_a.grad.dtype == torch.float32 for layer in adapted(model).values())


# --- what is adapted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["attn"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["mlp"], {"gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "*.v_proj"], {"q_proj", "v_proj"}),
    ],
)
def test_targets_are_words_names_or_patterns(targets, expected):
    model = apply_lora(make_model(), LoRAConfig(r=2, targets=targets))
    assert set(adapted(model)) == {n for n, _ in make_model().named_modules() if n.rpartition(".")[2] in expected}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapted(model) for part in ("lora_a", "lora_b")}


def test_a_pattern_may_name_single_layers():
    model = apply_lora(make_model(), LoRAConfig(r=2, targets=["blocks.1.mlp.*"]))
    assert list(adapted(model)) == [f"blocks.1.mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_what_is_adapted_and_trained_is_said(caplog):
    with caplog.at_level(logging.INFO, "minillm"):
        apply_lora(make_model(), LoRAConfig(r=2, targets=["q_proj"], modules_to_save=["norm"]))
    total = sum(p.numel() for p in make_model().parameters())
    expected = "LoRA of rank 2, scale 2, on 2 layers (2 blocks.*.attn.q_proj), in full norm.weight: "
    assert caplog.messages == [
        f"{expected}288 of {total + 256:,} parameters are trained ({28800 / (total + 256):.2f}%)"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ["q_prj"]},
            r"lora\.targets: 'q_prj' fits nothing; did you mean q_proj\? There are q_proj, k_proj",
        ),
        ({"targets": ["attn", "query"]}, r"lora\.targets: 'query' fits nothing"),
        ({"targets": ["lm_head"]}, "read its weight alone, so train it in full: lora.modules_to_save lm_head"),
        ({"modules_to_save": ["lmhead"]}, r"lora\.modules_to_save: 'lmhead' fits nothing; did you mean lm_head\?"),
        ({"modules_to_save": ["q_proj"]}, r"blocks\.0\.attn\.q_proj is one of lora\.targets too"),
    ],
)
def test_a_name_that_fits_nothing_is_refused_and_nothing_is_changed(fields, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoRAConfig(r=2, **fields))
    assert not adapted(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_on_adapters_are_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(with_adapters(), LoRAConfig(r=2))
    for needs_some in (merge_lora, lambda model: disabled(model).__enter__()):
        with pytest.raises(ValueError, match="has no adapters"):
            needs_some(make_model())


def test_rank_0_trains_the_weights_and_other_settings_then_mean_nothing():
    model = apply_lora(make_model(), LoRAConfig())
    assert not adapted(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="dora: has no effect with r 0"):
        LoRAConfig(dora=True)


def test_adapters_stay_with_adamw_under_muon():
    model = with_adapters(dora=True, modules_to_save=["embed"], targets=["mlp"])
    model.blocks[0].attn.q_proj.weight.requires_grad_(True)
    names = {id(parameter): name for name, parameter in parameter_names(model).items()}
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1e-3))
    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}
    assert groups["muon"] == ["blocks.0.attn.q_proj.weight"]
    assert all(name.endswith(("lora_a", "lora_b")) for name in groups["decay"])
    assert len(groups["decay"]) == 2 * len(adapted(model))


def test_adapters_begin_by_seed_and_name_alone():
    everything, attention = (apply_lora(make_model(), LoRAConfig(r=4, targets=[t]), seed=3) for t in ("all", "attn"))
    for name, layer in adapted(attention).items():
        assert torch.equal(layer.lora_a, everything.get_submodule(name).lora_a)
        assert not layer.lora_b.any()
        assert 0.9 * 32**-0.5 < layer.lora_a.abs().max() <= 32**-0.5
    other = apply_lora(make_model(), LoRAConfig(r=4), seed=4)
    assert not torch.equal(other.blocks[0].attn.q_proj.lora_a, everything.blocks[0].attn.q_proj.lora_a)


# --- a run ------------------------------------------------------------------------------------------------------------


class Texts:
    """Four rows a step, a function of the cursor."""

    samples_per_step, samples_per_epoch, tokens_per_step = 4, 400, 4 * T

    def batches(self, cursor):
        rows = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(cursor))
        return [Batch(rows[i : i + 2, :-1], rows[i : i + 2, 1:]) for i in (0, 2)]


def make_trainer(directory: Path, base: Path, config: LoRAConfig, model=None) -> Trainer:
    """As a recipe does it: on the meta device, then the base and the adapters."""
    if model is None:
        with torch.device("meta"):
            model = apply_lora(Transformer(ModelConfig(**SHAPE)), config)
        model.to_empty(device="cpu")
        load_base(base, model, seed=5)
    optim = OptimConfig(lr=1e-2)
    return Trainer(
        model,
        build_optimizer(model, optim),
        NextToken(V),
        Texts(),
        TrainConfig(max_steps=STEPS, precision="fp32", save_every=4),
        steps=STEPS,
        lr_at=lambda step: optim.lr,
        dist=Context(torch.device("cpu")),
        run=RunDirectory(directory),
        identity={"base_sha256": weights_hash(base)},
        config_dict={"model": SHAPE, "lora": dataclasses.asdict(config), "sft": {"template": "plain"}},
        base_path=str(base),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save(make_model(), None, tmp_path_factory.mktemp("base") / "base")


CONFIG = LoRAConfig(r=4, dora=True, dropout=0.1, base_precision="bf16", modules_to_save=["norm"])


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    directory.mkdir()
    trainer = make_trainer(directory, base, CONFIG)
    trainer.fit()
    return directory


def test_training_changes_the_adapters_alone(base, run):
    before, model = weights(make_model()), load(run)[0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert name not in before or not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name].to(parameter.dtype))
    assert adapted(model)["blocks.0.attn.q_proj"].lora_b.any()


def test_a_checkpoint_holds_what_is_trained_alone(run):
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    model = load(run)[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(load_file(folder / "model-00000.safetensors")) == trained
    assert {name.split(".", 2)[2] for name in load_file(folder / "optim-00000.safetensors")} == trained


def test_a_resumed_run_is_the_same_bit_for_bit(base, run, tmp_path):
    trainer = make_trainer(tmp_path, base, CONFIG)
    trainer.resume(run / "checkpoints" / "step-00000004")
    trainer.fit()
    first, second = weights(load(run)[0]), weights(load(tmp_path)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_base_is_refused_and_a_moved_one_can_be_named(base, run, tmp_path):
    other = save(make_model(seed=9), None, tmp_path / "other")
    with pytest.raises(ValueError, match="another run than the one to be continued: base_sha256 was"):
        make_trainer(tmp_path, other, CONFIG).resume(run / "checkpoints" / "step-00000004")
    with pytest.raises(ValueError, match=r"other: is not the model that the adapters of .* were trained on"):
        load(run, base=other)
    expected = weights(load(run)[0])
    moved = base.rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match=r"is not there; put it back, or say where it is"):
            load(run)
        found = weights(load(run, base=moved)[0])
    finally:
        moved.rename(base)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_with_adapters_is_not_taken_for_one_set_of_weights(run, tmp_path):
    with pytest.raises(ValueError, match="has adapters; merge_lora"):
        save(load(run)[0], None, tmp_path / "saved")
    for refused in (lambda: export(run, tmp_path / "out"), lambda: load_weights(run, make_model())):
        with pytest.raises(ValueError, match=r"has adapters; `minillm merge .* OUT` makes one model"):
            refused()
    assert not list(tmp_path.iterdir())


def test_adapters_go_on_from_where_they_were(run, base):
    config = adapted(load(run)[0])["blocks.0.attn.q_proj"].config
    model = apply_lora(make_model(), dataclasses.replace(config, dropout=0.1))
    assert load_base(run, model).parent.parent == run
    expected = weights(load(run)[0])
    assert all(torch.equal(parameter, expected[name]) for name, parameter in weights(model).items())
    for changes, said in (
        ({"r": config.r + 1}, "lora.r"),
        ({"alpha": 99.0}, "lora.alpha"),
        ({"rslora": True}, "rslora"),
    ):
        with pytest.raises(ValueError, match=rf"has adapters of another kind: .*{said} .*minillm merge"):
            load_base(run, apply_lora(make_model(), dataclasses.replace(config, **changes)))
    with pytest.raises(ValueError, match="makes one model of them"):
        load_base(run, make_model())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merge_writes_plain_weights_that_give_the_same_logits(dtype, run, tmp_path, capsys):
    argv = ["merge", str(run), str(tmp_path / "out"), "--dtype", dtype]
    assert dispatch(argv) == 0
    said = capsys.readouterr().out
    assert said.startswith("merged in fp32: with its adapters the model's logits are the same to ")
    plain, expected = load(tmp_path / "out")[0], load(run)[0].float()(tokens())
    assert plain.state_dict().keys() == make_model().state_dict().keys()
    assert taught_template(tmp_path / "out") == "plain"
    assert {p.dtype for p in plain.parameters()} == {DTYPES[dtype]}
    difference = (plain.float()(tokens()) - expected).abs().max()
    assert difference < (1e-5 if dtype == "fp32" else 0.1)
    with pytest.raises(ValueError, match=r"out: has no adapters to merge"):
        merge(tmp_path / "out", tmp_path / "again")


def test_merge_writes_nothing_where_the_logits_would_be_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LoRALinear, "merged", LoRALinear.unscaled)  # DoRA without its magnitudes
    with pytest.raises(ValueError, match="gives other logits than the model"):
        merge(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def gradients(model) -> dict[str, torch.Tensor]:
    loss, _ = NextToken(V)(model, Batch(tokens(), tokens(seed=1)))
    loss.backward()
    return {name: p.grad for name, p in parameter_names(model).items() if p.requires_grad}


def compiled(model: Transformer) -> Transformer:
    for block in model.blocks:  # all but the compiler of C++, which takes a minute
        block.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize(
    "applied",
    [
        partial(parallelize, activation_checkpointing="full"),
        partial(parallelize, activation_checkpointing="selective"),
        compiled,
    ],
)
def test_activation_checkpointing_and_compile_give_the_same_gradients(applied):
    expected = gradients(with_adapters(dora=True))
    found = gradients(applied(with_adapters(dora=True)))
    assert found.keys() == expected.keys()
    assert all(gradient.any() for gradient in expected.values())
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4) for name in expected)


def test_the_names_of_the_base_stay():
    assert base_parameters(with_adapters()).keys() == dict(make_model().named_parameters()).keys()
