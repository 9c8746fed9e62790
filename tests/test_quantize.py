"""Weight-only int8: how near it is, that it computes what its weights say, and that it is kept as it is."""

import copy
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from minillm import SamplingParams, generate
from minillm.load import export, load, load_weights, save
from minillm.losses import cross_entropy
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.quantize import Int8Embedding, Int8Linear, is_quantized, quantize_int8, to_int8
from minillm.tokenizer import CharTokenizer

SHAPES = {
    "llama": {"n_kv_heads": 2},
    "untied": {"tie_embeddings": False, "vocab_multiple": 64},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True, "qkv_bias": True},
}


def make_model(seed: int = 0, **changes) -> Transformer:
    model = Transformer(ModelConfig(**{"vocab_size": 90, "dim": 32, "n_heads": 4, "max_seq_len": 64, **changes}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model.eval()


def float_twin(model: Transformer) -> Transformer:
    """A model of ordinary layers that have the numbers that the int8 ones stand for."""
    twin = Transformer(model.config)
    twin = twin.to(model.embed.scale.dtype).eval()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            scale = ours.get(name.removesuffix("weight") + "scale")
            parameter.copy_(ours[name] if scale is None else ours[name].to(scale.dtype) * scale[:, None])
    return twin


@pytest.fixture(params=SHAPES)
def model(request) -> Transformer:
    return make_model(**SHAPES[request.param])


TOKENS = torch.randint(90, (3, 40), generator=torch.Generator().manual_seed(1))


# --- one matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_each_weight_moves_by_at_most_half_a_scale_of_its_own_channel(dtype):
    sizes = torch.logspace(-3, 2, 50)[:, None]  # channels of very different sizes
    weight = (torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * sizes).to(dtype)
    whole, scale = to_int8(weight)
    assert (whole.dtype, scale.dtype, whole.shape, scale.shape) == (torch.int8, dtype, weight.shape, (50,))
    error = (whole.double() * scale.double()[:, None] - weight.double()).abs().amax(dim=1)
    assert (error <= 0.5001 * scale.double()).all()
    assert torch.equal(whole.abs().amax(dim=1), torch.full((50,), 127, dtype=torch.int8))
    assert torch.allclose(scale.double(), weight.double().abs().amax(dim=1) / 127, rtol=0.004)


def test_a_channel_of_zeros_stays_one_and_what_is_not_finite_is_refused():
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([1.0, -2.0, 0.5])
    whole, scale = to_int8(weight)
    assert whole.tolist() == [[0, 0, 0], [64, -127, 32]]
    assert scale.tolist() == [0.0, pytest.approx(2 / 127)]
    with pytest.raises(ValueError, match=r"blocks\.0: has weights that are not finite"):
        to_int8(torch.tensor([[1.0, math.nan]]), "blocks.0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_its_weights_say(dtype, bias):
    """In several slices: the layer has more weights than one takes."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(900, 400, generator=g).to(dtype) * 0.05, torch.randn(2, 5, 400, generator=g).to(dtype)
    whole, scale = to_int8(weight)
    b = torch.randn(900, generator=g).to(dtype) if bias else None
    y = Int8Linear(whole, scale, b)(x)
    plain = F.linear(x.double(), whole.double() * scale.double()[:, None], None if b is None else b.double())
    assert (y.dtype, y.shape) == (dtype, (2, 5, 900))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (y.double() - plain).abs().max() < tolerance * plain.abs().max()


def test_fp16_does_not_overflow_where_its_result_fits():
    whole, scale = to_int8(torch.full((4, 2048), 0.02, dtype=torch.float16))
    y = Int8Linear(whole, scale)(torch.full((1, 2048), 30.0, dtype=torch.float16))
    assert torch.allclose(y.float(), torch.tensor(0.02 * 2048 * 30), rtol=0.01)


def test_an_embedding_gives_the_rows_its_weights_say():
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    whole, scale = to_int8(weight)
    tokens = torch.tensor([[3, 29, 3], [0, 7, 1]])
    assert torch.equal(Int8Embedding(whole, scale)(tokens), (whole.float() * scale[:, None])[tokens])


# --- a model ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_computes_what_its_weights_say(model):
    quantized = quantize_int8(copy.deepcopy(model).double())
    assert is_quantized(quantized)
    assert not is_quantized(model)
    assert (quantized(TOKENS) - float_twin(quantized)(TOKENS)).abs().max() < 1e-10


@torch.no_grad()
def test_logits_stay_close(model):
    before, after = model(TOKENS), quantize_int8(copy.deepcopy(model))(TOKENS)
    assert 0 < (after - before).std() < 0.02 * before.std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_on_a_gpu_the_logits_are_those_of_the_cpu(model, dtype):
    quantized = quantize_int8(model.to(dtype))
    expected = quantized(TOKENS).float()
    found = quantized.to("cuda")(TOKENS.cuda()).float().cpu()
    assert (found - expected).std() < (1e-4 if dtype == torch.float32 else 0.02) * expected.std()
    assert quantized.lm_head.weight.dtype == torch.int8


def test_only_norms_biases_and_scales_stay_floats(model):
    floats = {name for name, p in quantize_int8(model).named_parameters() if p.dtype != torch.int8}
    assert all(name.endswith(("norm.weight", "norm.bias", ".bias", ".scale")) for name in floats)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "norm" not in name)


@pytest.mark.parametrize("change", ["nothing", "to_empty", "bfloat16", "deepcopy"])
def test_tied_weights_stay_one(change):
    model = quantize_int8(make_model())
    if change == "to_empty":
        model.to_empty(device="cpu")
    elif change == "bfloat16":
        model.bfloat16()
    elif change == "deepcopy":
        model = copy.deepcopy(model)
    assert model.lm_head.weight is model.embed.weight
    assert model.lm_head.scale is model.embed.scale
    assert isinstance(model.lm_head, Int8Linear)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.embed.weight.dtype == torch.int8


def test_the_perplexity_of_a_trained_model_changes_little():
    """On text that the model has learned: next letters of a few words in random order."""
    g = torch.Generator().manual_seed(0)
    words = [torch.randint(60, (5,), generator=g) for _ in range(12)]
    text = torch.cat([words[i] for i in torch.randint(12, (3000,), generator=g)])
    rows = text[: len(text) // 65 * 65].view(-1, 65)  # (n, T + 1)
    model = make_model(dim=32, n_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        mean_loss(model, rows[step % 30 :: 30][:, :33]).backward()
        optimizer.step()
    held_out = rows[:, 32:]
    with torch.no_grad():
        before = float(mean_loss(model, held_out))
        after = float(mean_loss(quantize_int8(model), held_out))
    assert before < 2  # guessing among 60 letters would be 4.1
    assert abs(after - before) < 0.01 * before


def mean_loss(model, rows):
    loss = model(rows[:, :-1], head=lambda lm_head, hidden: cross_entropy(lm_head, hidden, rows[:, 1:]))
    return loss / rows[:, 1:].numel()


# --- on the disk ------------------------------------------------------------------------------------------------------


def same_numbers(a: Transformer, b: Transformer) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_model_is_the_quantized_one_bit_for_bit(model, tmp_path, dtype):
    tokenizer = CharTokenizer("abcdefgh ")
    saved = save(model.to(dtype), tokenizer, tmp_path / "model")
    out = export(saved, tmp_path / "int8", quantize="int8")
    loaded, theirs = load(out)
    expected = quantize_int8(model)
    assert same_numbers(loaded, expected)
    assert theirs.hash == tokenizer.hash
    assert torch.equal(loaded(TOKENS), expected(TOKENS))
    assert (loaded.lm_head.weight is loaded.embed.weight) == model.config.tie_embeddings
    assert same_numbers(load(export(out, tmp_path / "copy"))[0], expected)


def test_the_file_has_a_byte_a_weight_and_tied_ones_once(tmp_path):
    model = make_model(dim=128, n_layers=2)
    out = export(save(model, None, tmp_path / "model"), tmp_path / "int8", quantize="int8")
    stored = safetensors.torch.load_file(out / "model-00000.safetensors")
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.int8) == sum(
        parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2
    )
    assert stored["embed.weight"].dtype == torch.int8
    assert stored["embed.scale"].shape == (90,)
    assert not any(name.startswith("lm_head") for name in stored)


def test_it_generates_what_the_model_does_that_its_weights_say(tmp_path):
    model = make_model().double()
    loaded, _ = load(export(save(model, None, tmp_path / "model"), tmp_path / "int8", quantize="int8"))
    prompts, params = [[5, 6, 7], [8]], SamplingParams(temperature=0, max_new_tokens=20)
    expected = [completion.tokens for completion in generate(float_twin(loaded), None, prompts, params)]
    assert [completion.tokens for completion in generate(loaded, None, prompts, params)] == expected


def test_nothing_is_trained_or_quantized_from_int8(tmp_path):
    model = make_model()
    out = export(save(model, None, tmp_path / "model"), tmp_path / "int8", quantize="int8")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="its weights are int8, good for inference only"):
        load_weights(out, model)
    assert same_numbers(model, before)
    with pytest.raises(ValueError, match="its weights are int8 already"):
        export(out, tmp_path / "twice", quantize="int8")
    assert not (tmp_path / "twice").exists()


def test_a_folder_that_lacks_a_scale_is_refused(tmp_path):
    quantized = quantize_int8(make_model())
    del quantized.blocks[0].attn.q_proj.scale
    folder = save(quantized, None, tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"missing in the checkpoint: blocks\.0\.attn\.q_proj\.scale"):
        load(folder)
