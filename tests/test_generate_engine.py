"""The engine: many completions together are those that each would be alone."""

import math

import pytest
import torch
from test_model import from_gpt2, from_llama_names

from minillm.generate import engine as engine_module
from minillm.generate.engine import Engine
from minillm.generate.generate import generate, stream
from minillm.generate.params import SamplingParams
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SHAPES = {
    "rope": {"n_heads": 4, "n_kv_heads": 2},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True},
    "windows": {"window": 6, "window_pattern": "WF"},
}
LENGTHS = [3, 20, 1, 11, 7, 20, 2]


def make_model(dtype=torch.float64, **changes) -> Transformer:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "ffn_dim": 64, "max_seq_len": 64} | changes
    model = Transformer(ModelConfig(vocab_size=TOKENIZER.vocab_size, **shape))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.to(dtype).eval()


def make_prompts(lengths=LENGTHS) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(TOKENIZER.vocab_size, (length,), generator=g).tolist() for length in lengths]


def mixed_params() -> list[SamplingParams]:
    """Greedy and sampled, with and without penalties, of different lengths."""
    return [
        SamplingParams(
            max_new_tokens=4 + 3 * i,
            temperature=0 if i % 3 == 0 else 0.8,
            top_k=-1 if i % 2 else 40,
            repetition_penalty=1.3 if i == 4 else 1.0,
            frequency_penalty=0.5 if i == 3 else 0.0,
            seed=i,
        )
        for i in range(len(LENGTHS))
    ]


# --- a batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_completion_does_not_depend_on_what_is_in_the_batch(shape):
    model, prompts, params = make_model(**SHAPES[shape]), make_prompts(), mixed_params()
    alone = [generate(model, None, *pair).tokens for pair in zip(prompts, params)]
    for max_rows in (1, 2, 5, None):
        together = generate(model, None, prompts, params, max_rows=max_rows)
        assert [completion.tokens for completion in together] == alone, max_rows
    backwards = generate(model, None, prompts[::-1], params[::-1], max_rows=3)
    assert [completion.tokens for completion in backwards] == alone[::-1]


def test_prompts_that_do_not_fit_into_one_row_are_read_in_several(monkeypatch):
    model, prompts, params = make_model(), make_prompts(), mixed_params()
    read = []
    plain = Engine.read_packed
    monkeypatch.setattr(
        Engine, "read_packed", lambda self, requests, slots: read.append(len(requests)) or plain(self, requests, slots)
    )
    expected = [completion.tokens for completion in generate(model, None, prompts, params)]
    assert read == [7]
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS", 21)
    assert [completion.tokens for completion in generate(model, None, prompts, params)] == expected
    assert read[1:] == [1, 2, 2, 1, 1]


def test_no_more_rows_are_read_than_are_in_use():
    model, rows = make_model(), []
    model.register_forward_pre_hook(lambda model, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    engine = Engine(model, max_rows=3)
    requests = [engine.add([1, 2], SamplingParams(max_new_tokens=n, temperature=0)) for n in (2, 5, 3, 2)]
    while engine.busy:
        engine.step()
    # three are read; the first leaves after its second token; the fourth is read; ...
    assert rows == [1, 3, 1, 3, 1, 1]
    assert [len(request.completions[0].tokens) for request in requests] == [2, 5, 3, 2]
    assert engine.step() == []


def test_requests_may_come_while_others_are_worked_on_and_be_cancelled():
    model, prompts, params = make_model(), make_prompts(), mixed_params()
    alone = [generate(model, None, *pair).tokens for pair in zip(prompts, params)]
    engine = Engine(model, max_rows=2)
    requests = []
    for pair in zip(prompts, params):
        requests.append(engine.add(*pair))
        engine.step()
    engine.cancel(requests[5])
    engine.cancel(requests[6])
    while engine.busy:
        engine.step()
    assert [r.completions[0].tokens for r in requests if r.done] == alone[:5]
    assert not requests[5].done


def test_samples_of_a_prompt_differ_and_the_first_is_that_of_the_seed():
    model, prompt = make_model(), make_prompts()[1]
    one = generate(model, None, prompt, SamplingParams(seed=7, max_new_tokens=12))
    several = generate(model, None, prompt, SamplingParams(seed=7, max_new_tokens=12, n=4))
    assert several[0].tokens == one.tokens
    assert len({tuple(completion.tokens) for completion in several}) == 4
    crowded = generate(model, None, [[5], prompt, [6]], SamplingParams(seed=7, max_new_tokens=12, n=4), max_rows=3)
    assert [c.tokens for c in crowded[1]] == [c.tokens for c in several]


def test_a_prompt_is_read_once_for_all_its_samples():
    model, read = make_model(), []
    model.register_forward_pre_hook(lambda model, args, kwargs: read.append(args[0].numel()), with_kwargs=True)
    generate(model, None, [4] * 20, SamplingParams(n=3, max_new_tokens=3, seed=0))
    assert read == [20, 3, 3]


def test_best_of_keeps_the_likeliest_a_token():
    model, prompt = make_model(), make_prompts()[1]
    params = {"seed": 7, "max_new_tokens": 12}
    made = generate(model, None, prompt, SamplingParams(n=6, **params))
    kept = generate(model, None, prompt, SamplingParams(n=2, best_of=6, **params))
    best = sorted(made, key=lambda c: c.cumulative_logprob / len(c.tokens), reverse=True)
    assert [c.tokens for c in kept] == [c.tokens for c in best[:2]]
    assert generate(model, None, prompt, SamplingParams(best_of=6, **params)).tokens == best[0].tokens


def test_a_step_tells_what_it_added():
    engine = Engine(make_model(), TOKENIZER, max_rows=4)
    request = engine.add("ab", SamplingParams(n=2, seed=1, max_new_tokens=20))
    texts, finished = ["", ""], []
    while engine.busy:
        for event in engine.step():
            assert event.request is request
            texts[event.index] += event.text
            finished += [event.index] * event.finished
    assert texts == [completion.text for completion in request.completions]
    assert sorted(finished) == [0, 1]


def test_compiled_steps_give_the_same_tokens():
    """Padded to few shapes, with caches as if full; here on the CPU, where there is no graph of launches."""
    model, prompts = make_model(torch.float32, n_layers=1, n_heads=4, n_kv_heads=2, window=6), make_prompts()[:3]
    params = [SamplingParams(max_new_tokens=n, temperature=t, seed=n) for n, t in [(3, 0), (8, 1), (5, 1)]]
    expected = [completion.tokens for completion in generate(model, None, prompts, params)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert [completion.tokens for completion in generate(model, None, prompts, params, compile=True)] == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 3  # of 4, 2 and 1 rows


# --- how likely it was -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 3])
def test_logprobs_are_those_of_the_model_whatever_changed_the_choice(k):
    model, prompt = make_model(), make_prompts()[1]
    params = SamplingParams(
        temperature=3.0, top_k=9, frequency_penalty=1.0, seed=0, max_new_tokens=9, logprobs=k, prompt_logprobs=k
    )
    completion = generate(model, None, prompt, params)
    expected = model(torch.tensor([prompt + completion.tokens]))[0].log_softmax(-1)
    told = completion.prompt_logprobs[1:] + completion.logprobs
    assert completion.prompt_logprobs[0] is None
    for token, at, one in zip((prompt + completion.tokens)[1:], expected, told, strict=False):
        assert one.token == token
        assert math.isclose(one.logprob, at[token].item(), abs_tol=1e-9)
        best = at.topk(k) if k else None
        assert list(one.alternatives) == (best.indices.tolist() if k else [])
        assert not k or torch.allclose(torch.tensor(list(one.alternatives.values())).double(), best.values)
    assert len(told) == len(prompt) + 8
    assert math.isclose(completion.cumulative_logprob, sum(one.logprob for one in completion.logprobs))


# --- refused ---------------------------------------------------------------------------------------------------------


def test_what_an_engine_has_no_room_for():
    engine = Engine(make_model(), max_rows=2, capacity=16)
    with pytest.raises(ValueError, match="prompt and max_new_tokens make 17; the engine has room for 16"):
        engine.add([1] * 10, SamplingParams(max_new_tokens=7))
    with pytest.raises(ValueError, match="num_beams: 4 are more than the engine's max_rows 2"):
        engine.add([1], SamplingParams(use_beam_search=True, num_beams=4, max_new_tokens=5))
    with pytest.raises(ValueError, match="max_rows: must be at least 1, not 0"):
        Engine(make_model(), max_rows=0)
    assert not engine.busy


def test_params_are_one_for_all_or_one_a_prompt():
    with pytest.raises(ValueError, match="params: 2 of them for 3 prompts"):
        generate(make_model(), None, [[1], [2], [3]], [SamplingParams()] * 2)


def test_only_one_completion_is_streamed():
    with pytest.raises(ValueError, match="stream: gives one completion"):
        stream(make_model(), TOKENIZER, "a", SamplingParams(n=2))


# --- transformers ----------------------------------------------------------------------------------------------------


def llama(transformers):
    """(a random model of transformers in float64, ours with its weights)"""
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=False))
    own = {"vocab_size": 96, "dim": 32, "ffn_dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128}
    return theirs, Transformer(ModelConfig(**own, tie_embeddings=False)), from_llama_names


def gpt2(transformers):
    shape = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    own = {"vocab_size": 96, "dim": 32, "ffn_dim": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
    own |= {"norm": "layernorm", "norm_eps": 1e-5, "position": "learned", "mlp": "gelu"}
    return theirs, Transformer(ModelConfig(**own, qkv_bias=True, o_bias=True, mlp_bias=True)), from_gpt2


@pytest.mark.parametrize("family", [llama, gpt2])
def test_greedy_and_beam_search_equal_transformers(family):
    """64 tokens after 20 prompts of 1 to 60 tokens: batched here, one at a time there, in float64."""
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    torch.manual_seed(0)
    theirs, ours, translate = family(transformers)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    tensors = {name: p.detach() for name, p in theirs.named_parameters()}
    tensors = translate(tensors) if family is gpt2 else {translate(name): tensor for name, tensor in tensors.items()}
    ours.load_state_dict(tensors | {"lm_head.weight": theirs.lm_head.weight.detach()})
    theirs, ours = theirs.double().eval(), ours.double().eval()
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(96, (1 + 59 * i // 19,), generator=g).tolist() for i in range(20)]
    ends, lengths = [5, 6, 7, 8], set()
    for params, options in [
        (SamplingParams(temperature=0, max_new_tokens=64, stop_token_ids=ends), {}),
        (SamplingParams(use_beam_search=True, num_beams=4, max_new_tokens=64, stop_token_ids=ends), {"num_beams": 4}),
    ]:
        together = generate(ours, None, prompts, params, max_rows=12)
        for prompt, completion in zip(prompts, together):
            tokens = torch.tensor([prompt])
            expected = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=64,
                eos_token_id=ends,
                pad_token_id=0,
                **options,
            )
            assert completion.tokens == expected[0, len(prompt) :].tolist()
            lengths.add(len(completion.tokens))
    assert len(lengths) > 3  # some end before the others
