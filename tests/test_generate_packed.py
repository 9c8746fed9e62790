"""Weights packed for generation give what the plain ones give, and take memory only while they are of use."""

import pytest
import torch

from minillm.generate import engine, packed
from minillm.generate.engine import STEPS_BEFORE_PACKING, Engine
from minillm.generate.packed import FEWEST_ROWS, PackedLinear, can_pack, has_packing, pack
from minillm.generate.params import SamplingParams
from minillm.lora import LoRAConfig, apply_lora
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not has_packing(), reason="this build of torch packs no weights")
SHAPES = {
    "llama": ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64),
    "qwen": ModelConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, qkv_bias=True, tie_embeddings=True),
    "gpt2": ModelConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, mlp="gelu", mlp_bias=True, position="learned"),
}


def make_model(name="llama"):
    torch.manual_seed(0)
    model = Transformer(SHAPES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def packed_layers(model):
    return [name for name, module in model.named_modules() if type(module) is PackedLinear]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 1), (3, 1), (8, 1), (1, 33), (3, 7)])
def test_a_packed_model_gives_the_same_logits(name, B, T):
    model = make_model(name)
    tokens = torch.arange(B * T).view(B, T) * 7 % 50
    with torch.inference_mode():
        assert can_pack(model)
        twin = pack(model)
        torch.testing.assert_close(twin(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert len(packed_layers(twin)) == sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert not packed_layers(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


def test_layers_with_adapters_stay_as_they_are():
    model = apply_lora(make_model(), LoRAConfig(r=2, targets=["attn"]))
    with torch.inference_mode():
        twin = pack(model)
        tokens = torch.arange(12).view(4, 3)
        torch.testing.assert_close(twin(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert packed_layers(twin) == [name for name in packed_layers(twin) if "mlp" in name or name == "lm_head"] != []


def test_layers_that_are_watched_stay_as_they_are():
    model, seen = make_model(), []
    model.blocks[0].attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model.blocks[1].attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    run(model, FEWEST_ROWS, 12)
    assert seen == [1] * 2 + [FEWEST_ROWS] * 2 * 11  # the prompts in one row, and a step for each further token


def test_what_is_compiled_stays_as_it_is():
    model = make_model()
    assert not can_pack(torch.compile(model, backend="eager"))
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    names = packed_layers(pack(model))
    assert "lm_head" in names
    assert not [name for name in names if name.startswith("blocks.0.")]
    assert not packed_layers(model)


def test_layers_whose_weights_are_computed_stay_as_they_are():
    model = make_model()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.up_proj)
    tokens = torch.arange(12).view(4, 3)
    with torch.inference_mode():
        torch.testing.assert_close(pack(model)(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert "blocks.0.mlp.up_proj" not in packed_layers(pack(model))


def test_autocast_may_begin_while_weights_are_packed():
    model, tokens = make_model(), torch.arange(12).view(4, 3)
    with torch.inference_mode():
        twin = pack(model)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(twin(tokens).float(), model(tokens).float(), rtol=0.1, atol=0.1)


def test_whoever_draws_random_numbers_afterwards_gets_the_same():
    has_packing.cache_clear()
    before = torch.get_rng_state()
    assert has_packing()
    assert torch.equal(torch.get_rng_state(), before)


def test_only_plain_fp32_is_packed_and_only_where_there_is_memory(monkeypatch):
    assert can_pack(make_model())
    assert not can_pack(make_model().double())
    assert not can_pack(make_model().bfloat16())
    assert not can_pack(make_model().to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(make_model())
    monkeypatch.setattr(packed, "MOST_OF_FREE_MEMORY", 1e-9)
    assert not can_pack(make_model())


def run(model, rows, new_tokens, watch=lambda one: None):
    one = Engine(model, max_rows=rows)
    params = SamplingParams(temperature=0, max_new_tokens=new_tokens)
    requests = [one.add([1 + i, 2, 3], params) for i in range(rows)]
    while one.busy:
        one.step()
        watch(one)
    return one, [request.completions[0].tokens for request in requests]


def test_an_engine_packs_after_some_steps_of_some_rows_and_gives_the_memory_back(monkeypatch):
    states = []
    _, tokens = run(make_model(), FEWEST_ROWS, 12, lambda one: states.append(one.packed is not None))
    assert states == [False] * STEPS_BEFORE_PACKING + [True] * (11 - STEPS_BEFORE_PACKING) + [False]
    run(make_model(), FEWEST_ROWS - 1, 12, lambda one: states.append(one.packed is not None))
    assert not any(states[12:])
    monkeypatch.setattr(engine, "STEPS_BEFORE_PACKING", 10**9)
    assert run(make_model(), FEWEST_ROWS, 12)[1] == tokens


def test_a_cancelled_engine_gives_the_memory_back():
    one = Engine(make_model(), max_rows=4)
    request = one.add([1, 2], SamplingParams(max_new_tokens=20, n=4, seed=0))
    for _ in range(STEPS_BEFORE_PACKING + 1):
        one.step()
    assert one.packed is not None
    one.cancel(request)
    assert one.packed is None


def test_weights_that_change_between_requests_are_those_that_are_used():
    model = make_model()
    one, before = run(model, 4, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    params = SamplingParams(temperature=0, max_new_tokens=12)
    requests = [one.add([1 + i, 2, 3], params) for i in range(4)]
    while one.busy:
        one.step()
    assert [request.completions[0].tokens for request in requests] == run(model, 4, 12)[1] != before
