"""Adapters of peft's: the same numbers, forward and backward, and its files in both directions."""

import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import KINDS, shake

from minillm.hf import load_peft, save_peft
from minillm.load import load
from minillm.lora import LoRAConfig, adapted, apply_lora, merge_lora
from minillm.tensors import parameter_names

peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")

TOKENS = (torch.arange(24) * 7 % 61).view(2, 12)
PEFT_KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family's model, as transformers writes it."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(case):
        if case not in made:
            made[case] = root / str(len(made))
            families.make(case).save_pretrained(made[case])
        return made[case]

    return folder


def their_model(case, **fields):
    """A model of transformers with adapters of peft's that do something."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
    model = peft.get_peft_model(families.make(case), peft.LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def logits_and_gradients(logits, named):
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama, biases", "qwen2", "gemma"])
def test_logits_and_gradients_are_those_of_peft(case, kind, folders, tmp_path):
    theirs = their_model(case, **PEFT_KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_peft(load(folders(case))[0], tmp_path / "adapter")
    expected, their_gradients = logits_and_gradients(theirs(TOKENS).logits, dict(theirs.named_parameters()))
    found, gradients = logits_and_gradients(ours(TOKENS), parameter_names(ours))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(gradients) == len(adapted(ours)) * (3 if kind == "dora" else 2)
    with torch.no_grad():
        for name, parameter in parameter_names(ours).items():
            if parameter.requires_grad:  # so that the gradients are written by their names in peft
                parameter.copy_(gradients[name])
    save_peft(ours, tmp_path / "gradients")
    ours_by_name = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert len(ours_by_name) == len(their_gradients)
    for name, gradient in their_gradients.items():
        name = name.replace(".default", "")
        name = name.removesuffix(".weight") if "magnitude" in name else name
        assert (ours_by_name[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max()), name


@pytest.mark.parametrize("case", ["llama", "llama, tied", "olmo"])
@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ["attn"], "rslora": True},
        {"targets": ["q_proj", "blocks.1.mlp.up_proj"], "dora": True, "alpha": 3.0, "dropout": 0.1},
        {"modules_to_save": ["embed", "lm_head"]},
    ],
)
def test_what_is_written_is_read_by_peft_and_here(case, fields, folders, tmp_path):
    ours = apply_lora(load(folders(case))[0], LoRAConfig(r=4, **fields))
    shake(ours)
    if "modules_to_save" in fields:
        with torch.no_grad():
            ours.embed.weight += 0.1 * torch.randn(ours.embed.weight.shape)
    save_peft(ours, tmp_path / "adapter", base="some/model")
    expected = ours(TOKENS)
    theirs = peft.PeftModel.from_pretrained(families.make(case), tmp_path / "adapter").eval()
    assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    again = load_peft(load(folders(case))[0], tmp_path / "adapter")
    assert torch.equal(again(TOKENS), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    config = next(iter(adapted(again).values())).config
    assert (config.dropout, config.rslora, config.dora) == tuple(
        fields.get(name, default) for name, default in (("dropout", 0.0), ("rslora", False), ("dora", False))
    )
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/model"
    )


def test_merged_adapters_are_those_that_peft_merges(folders, tmp_path):
    theirs = their_model("qwen3, biases, windows", use_dora=True)
    theirs.save_pretrained(tmp_path)
    ours = merge_lora(load_peft(load(folders("qwen3, biases, windows"))[0], tmp_path))
    expected = theirs.merge_and_unload()(TOKENS).logits
    assert (ours(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', not LORA"),
        ({"bias": "all"}, "bias is 'all'; biases are frozen here"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, which minillm does not have"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base too"),
        ({"use_newest": True}, "use_newest is True, which minillm does not have"),
        ({"r": "many"}, r"adapter_config\.json: r is 'many'"),
        ({"r": 2.5}, r"adapter_config\.json: r is 2\.5"),
        ({"r": 0}, "has no effect with r 0"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"lora_dropout": 2}, r"adapter_config\.json: dropout is 2.0; it must be >= 0, < 1"),
        ({"r": 5}, "are not adapters of this model: missing, unknown or of other shapes"),
    ],
)
def test_what_minillm_does_not_have_is_refused_by_name(changes, message, folders, tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    model = load(folders("llama"))[0]
    with pytest.raises(ValueError, match=message):
        load_peft(model, tmp_path)
    assert not adapted(model)


def test_adapters_of_another_model_are_refused(folders, tmp_path):
    their_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="are adapters of another model than a gpt2"):
        load_peft(load(folders("gpt2"))[0], tmp_path / "llama")
    tensors = load_file(tmp_path / "llama" / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, tmp_path / "llama" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"missing, unknown or of other shapes: .*layers.0.self_attn.q_proj.lora_B"):
        load_peft(load(folders("llama"))[0], tmp_path / "llama")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        load_peft(load(folders("llama"))[0], tmp_path)


def test_matrices_that_are_one_in_gpt2_have_no_adapters_of_their_own_there(folders, tmp_path):
    model = apply_lora(load(folders("gpt2"))[0], LoRAConfig(r=4, targets=["o_proj", "mlp"]))
    shake(model)
    save_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(families.make("gpt2"), tmp_path / "adapter").eval()
    expected = model(TOKENS)
    assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    model = apply_lora(load(folders("gpt2"))[0], LoRAConfig(r=4, targets=["q_proj"]))
    with pytest.raises(ValueError, match=r"is stored in another form in transformer.h.0.attn.c_attn of a gpt2"):
        save_peft(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
