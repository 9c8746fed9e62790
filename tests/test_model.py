"""The whole model: the same numbers as transformers, and the properties that training and generation rely on."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from minillm.config import arguments
from minillm.config import build as build_config
from minillm.model import attention
from minillm.model.config import ModelConfig, ModelSection
from minillm.model.layers import Linear, RMSNorm, make_mlp
from minillm.model.masks import Mask, attend_reference
from minillm.model.rope import Rope, RopeScaling
from minillm.model.transformer import Transformer

TINY = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "max_seq_len": 32}
STYLES = {
    "llama": {"n_kv_heads": 2},
    "qwen3": {"n_kv_heads": 2, "head_dim": 12, "qk_norm": True},
    "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu"}
    | {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "gemma": {"n_kv_heads": 1, "head_dim": 12, "norm": "rmsnorm_plus_one", "mlp": "geglu", "embed_scale": True},
    "olmo": {"norm": "layernorm_plain", "norm_eps": 1e-5},
    "primer": {"mlp": "relu2", "qk_norm": True},
    "mistral": {"n_kv_heads": 2, "window": 5},
    "ministral": {"n_kv_heads": 2, "window": 5, "window_pattern": "FW"},
    "no positions": {"position": "none", "tie_embeddings": False},
}


def build(**fields) -> Transformer:
    """A tiny model in which nothing is at a value that could hide a mistake (norms of 1, biases of 0)."""
    model = Transformer(ModelConfig(**(TINY | fields)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=STYLES, ids=list(STYLES))
def style(request) -> dict:
    return STYLES[request.param]


# --- the same numbers as an independent implementation ---------------------------------------------------------------

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
    "model.layers": "blocks",
    "model.embed_tokens": "embed",
    "model.norm": "norm",
}


def from_llama_names(name: str) -> str:
    for theirs, ours in BLOCK_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def from_gpt2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2 keeps its matrices transposed, and q, k, v as one."""
    names = {"transformer.h.": "blocks.", "transformer.ln_f": "norm", "transformer.wte": "embed"}
    names |= {"transformer.wpe": "pos_embed", "ln_1": "attn_norm", "ln_2": "mlp_norm", "attn.c_proj": "attn.o_proj"}
    names |= {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    ours = {}
    for name, tensor in tensors.items():
        if "c_" in name and name.endswith("weight"):
            tensor = tensor.T
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        if "c_attn" in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                ours[name.replace("c_attn", f"{part}_proj")] = piece
        else:
            ours[name] = tensor
    return ours


def check_against_transformers(theirs, ours: Transformer, translate) -> None:
    """Same logits and, for the loss of next-token prediction, same gradients of every parameter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # its own start has norms of 1 and biases of 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.eval()
    tensors = translate({name: p.detach() for name, p in theirs.named_parameters()})
    assert set(tensors) == {name for name, _ in ours.named_parameters()}
    ours.load_state_dict(tensors | {"lm_head.weight": theirs.lm_head.weight.detach()})
    tokens = some_tokens(3, 20)
    logits, reference = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-5)
    for output in (logits, reference):
        F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = translate({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_equals_transformers(tied):
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    ours = Transformer(ModelConfig(**TINY, n_kv_heads=2, norm_eps=1e-5, tie_embeddings=tied))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


def test_mistral_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=5))
    ours = Transformer(ModelConfig(**TINY, **STYLES["mistral"], norm_eps=1e-5, tie_embeddings=False))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


@pytest.mark.parametrize("pattern", ["FW", "WWF", "FFW"])
def test_ministral_equals_transformers(pattern):
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    kinds = [{"F": "full_attention", "W": "sliding_attention"}[letter] for letter in (4 * pattern)[:4]]
    theirs = transformers.MinistralForCausalLM(
        transformers.MinistralConfig(**shape, sliding_window=5, layer_types=kinds)
    )
    fields = TINY | {"n_layers": 4, "n_kv_heads": 2, "window": 5, "window_pattern": pattern}
    ours = Transformer(ModelConfig(**fields, norm_eps=1e-5, tie_embeddings=False))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


def test_qwen2_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, rope_parameters=rope))
    ours = Transformer(ModelConfig(**TINY, n_kv_heads=2, rope_theta=1e6, qkv_bias=True))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


def test_qwen3_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    ours = Transformer(ModelConfig(**TINY, n_kv_heads=2, head_dim=12, qk_norm=True))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


def test_gemma_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
    shape |= {"num_key_value_heads": 1, "intermediate_size": 48, "hidden_activation": "gelu_pytorch_tanh"}
    shape |= {"pad_token_id": None}  # its row of the embedding would get no gradient
    theirs = transformers.GemmaForCausalLM(transformers.GemmaConfig(**shape))
    ours = Transformer(ModelConfig(**TINY, **STYLES["gemma"]))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


@pytest.mark.parametrize("tied", [True, False])
def test_olmo_equals_transformers(tied):
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "tie_word_embeddings": tied, "pad_token_id": None}
    theirs = transformers.OlmoForCausalLM(transformers.OlmoConfig(**shape))
    ours = Transformer(ModelConfig(**TINY, **STYLES["olmo"], tie_embeddings=tied))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


@pytest.mark.parametrize(
    ("mlp", "activation"),
    [
        ("gelu", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_exact", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("relu2", lambda x: x.clamp(min=0) ** 2),
    ],
)
def test_an_mlp_without_a_gate_is_its_formula(mlp, activation):
    block = build(mlp=mlp).blocks[0].mlp
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(block(x), activation(x @ block.up_proj.weight.T) @ block.down_proj.weight.T)


def test_gpt2_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 32}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    ours = Transformer(ModelConfig(**TINY, **STYLES["gpt2"], norm_eps=1e-5))
    check_against_transformers(theirs, ours, from_gpt2)


# --- who sees whom ----------------------------------------------------------------------------------------------------


def test_the_future_cannot_change_the_past(style):
    model = build(**style)
    tokens = some_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12:] = some_tokens(2, 8, seed=1)
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_a_bidirectional_model_sees_the_future(style):
    model = build(**style, causal=False)
    tokens = some_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 19] = (tokens[0, 19] + 1) % TINY["vocab_size"]
    assert (model(tokens)[0, 16] - model(changed)[0, 16]).abs().max() > 1e-4


def test_a_window_is_how_far_a_block_sees():
    """Two blocks, each three tokens: what a token says reaches the four after it, and one block that sees all, all."""
    tokens = some_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % TINY["vocab_size"]

    def reached(**fields) -> list[int]:
        model = build(window=3, **fields)
        return (model(tokens) - model(changed))[0].abs().amax(-1).gt(1e-6).nonzero().flatten().tolist()

    assert reached() == list(range(6, 11))
    assert reached(causal=False) == list(range(2, 11))
    assert reached(window_pattern="WF") == list(range(6, 20))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_as_if_each_were_alone(style, causal):
    """They do not see each other, and positions restart; an id used twice is two documents."""
    model = build(**style, causal=causal)
    tokens = some_tokens(2, 24)
    doc_ids = torch.tensor([[5] * 7 + [6] * 1 + [5] * 16, [0] * 12 + [1] * 12])
    packed = model(tokens, doc_ids=doc_ids)
    for row, start, stop in ((0, 0, 7), (0, 7, 8), (0, 8, 24), (1, 0, 12), (1, 12, 24)):
        alone = model(tokens[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row : row + 1, start:stop], alone, atol=1e-5, rtol=1e-5)


# Two rows: a pair, a prompt by itself and an answer without a prompt; then three answers, and a text without any.
TREES = torch.tensor(
    [[0] * 6 + [1] * 5 + [2] * 7 + [0] * 3 + [0] * 2 + [2] * 1, [0] * 4 + [1] * 4 + [2] + [3] * 6 + [0] * 9]
)
TREE_DOCUMENTS = torch.tensor([[0] * 18 + [1] * 3 + [2] * 3, [0] * 15 + [1] * 9])
TEXTS = (  # row, places of the prompt, places of what follows it
    (0, range(0, 6), range(6, 11)),
    (0, range(0, 6), range(11, 18)),
    (0, range(18, 21), range(0)),
    (0, range(21, 23), range(23, 24)),
    (1, range(0, 4), range(4, 8)),
    (1, range(0, 4), range(8, 9)),
    (1, range(0, 4), range(9, 15)),
    (1, range(15, 24), range(0)),
)


@pytest.mark.parametrize("path", ["chosen", "documents", "dense"])
def test_answers_that_share_their_prompt_are_as_if_each_had_its_own(style, path, monkeypatch):
    """In float64, the log-probabilities of answers, a loss of them, and its gradients."""
    if path == "documents":
        monkeypatch.setattr(attention, "COST_OF_A_SEGMENT", 0)
    elif path == "dense":
        monkeypatch.setattr(attention, "COST_OF_A_SEGMENT", 1e12)
    model = build(**style).double()
    tokens, targets = some_tokens(2, 24), some_tokens(2, 24, seed=1)
    shared = (
        model(tokens, doc_ids=TREE_DOCUMENTS, branches=TREES).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    )
    together, apart = [], []
    for row, prompt, answer in TEXTS:
        places = [*prompt, *answer]
        logprobs = model(tokens[row, places][None]).log_softmax(-1)[0].gather(-1, targets[row, places, None])[:, 0]
        torch.testing.assert_close(shared[row, places], logprobs, rtol=1e-10, atol=1e-10)
        learned = answer or prompt
        together.append(shared[row, learned].sum())
        apart.append(logprobs[-len(learned) :].sum())
    gradients = []
    for sums in (together, apart):
        loss = -F.logsigmoid(torch.stack(sums[1:]) - sums[0]).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_in_fp32_too_they_are_as_if_each_had_its_own_prompt(style):
    """Gradients within 1e-5 of their size."""
    model, tokens = build(**style), some_tokens(2, 24)
    shared, gradients = model(tokens, doc_ids=TREE_DOCUMENTS, branches=TREES).logsumexp(-1), []
    alone = [model(tokens[row, [*prompt, *answer]][None]).logsumexp(-1)[0] for row, prompt, answer in TEXTS]
    together = torch.stack([shared[row, answer or prompt].sum() for row, prompt, answer in TEXTS])
    apart = torch.stack([text[-len(answer or prompt) :].sum() for text, (_, prompt, answer) in zip(alone, TEXTS)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for sums in (together, apart):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(sums.sum(), list(model.parameters()))]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("cost", [0, 1e12])
def test_what_is_said_in_one_branch_changes_nothing_in_another(style, cost, monkeypatch):
    """Bit for bit, whether attention goes segment by segment or through one mask; and it reaches its own branch."""
    monkeypatch.setattr(attention, "COST_OF_A_SEGMENT", cost)
    model, tokens = build(**style), some_tokens(2, 24)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % TINY["vocab_size"]
    changed[1, 9:11] = (tokens[1, 9:11] + 1) % TINY["vocab_size"]
    before, after = (model(x, doc_ids=TREE_DOCUMENTS, branches=TREES) for x in (tokens, changed))
    reached = (before != after).any(-1)
    assert reached[0].nonzero().flatten().tolist() == list(range(6, 11))
    assert reached[1].nonzero().flatten().tolist() == list(range(9, 15))


def test_positions_can_be_given():
    model = build(position="learned")
    tokens = some_tokens(1, 4)
    shifted = model(tokens, positions=torch.tensor([[3, 4, 5, 6]]))
    assert not torch.allclose(shifted, model(tokens))
    # tokens before them that they cannot see leave them where they are
    padded = model(
        torch.cat([some_tokens(1, 3, seed=1), tokens], 1), torch.arange(7)[None], torch.tensor([[0] * 3 + [1] * 4])
    )
    torch.testing.assert_close(padded[:, 3:], shifted)


def test_rope_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double().unbind(0)

    def score(m: int, n: int) -> float:
        return (Rope(torch.tensor([[m]]), 8, 100.0)(q) * Rope(torch.tensor([[n]]), 8, 100.0)(k)).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


# --- what training relies on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize(("head_dim", "theta", "factor"), [(64, 1e4, 4.0), (128, 5e5, 32.0), (16, 1e4, 1.0)])
@pytest.mark.parametrize("original_len", [2048, 64])
def test_stretched_rope_equals_transformers(scaling, head_dim, theta, factor, original_len):
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": scaling, "rope_theta": theta, "factor": factor}
    rope["original_max_position_embeddings"] = original_len
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=rope
    )
    frequencies, length = ROPE_INIT_FUNCTIONS[scaling](theirs, "cpu")
    positions = torch.tensor([[0, 1, 7, 2047, 8000]])
    ours = Rope(positions, head_dim, theta, RopeScaling(scaling, factor, original_len))
    angles = positions[:, None, :, None] * frequencies
    torch.testing.assert_close(ours.cos, length * angles.cos(), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(ours.sin, length * angles.sin(), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e4), (128, 5e5)])
@pytest.mark.parametrize(("factor", "length"), [(1.0, 8192), (2.0, 8192), (4.0, 3000), (2.0, 100)])
def test_ntk_equals_what_transformers_has_at_that_length(head_dim, theta, factor, length):
    """Their `dynamic` form raises theta with the length at hand; for one length that is a factor."""
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=rope
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=length)
    positions = torch.tensor([[0, 1, 7, 2047, 8000]])
    stretch = factor * max(length, 2048) / 2048 - (factor - 1)
    ours = Rope(positions, head_dim, theta, RopeScaling("ntk", stretch, 2048))
    angles = positions[:, None, :, None] * frequencies
    torch.testing.assert_close(ours.cos, angles.cos(), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(ours.sin, angles.sin(), atol=2e-3, rtol=1e-4)


def test_a_model_that_is_stretched_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, max_position_embeddings=32, rope_parameters=rope)
    )
    ours = Transformer(ModelConfig(**TINY, n_kv_heads=2, norm_eps=1e-5, rope_scaling="llama3", rope_factor=4))
    check_against_transformers(theirs, ours, lambda t: {from_llama_names(name): tensor for name, tensor in t.items()})


def test_dropout_acts_in_training_only():
    model = build(dropout=0.3)
    tokens = some_tokens(2, 16)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), build(dropout=0.0)(tokens))


def test_dropout_acts_on_packed_documents_too():
    model = build(dropout=0.3, n_heads=1)
    model.dropout.p = 0.0
    for block in model.blocks:
        block.dropout.p = 0.0  # what is left is the dropout of the attention weights
    tokens, doc_ids = some_tokens(1, 16), torch.tensor([[0] * 8 + [1] * 8])
    assert not torch.equal(model(tokens, doc_ids=doc_ids), model(tokens, doc_ids=doc_ids))


def test_padding_the_vocabulary_changes_nothing(style):
    plain, padded = (
        Transformer(ModelConfig(**(TINY | style))),
        Transformer(ModelConfig(**(TINY | style), vocab_multiple=64)),
    )
    tokens = some_tokens(2, 10)
    assert padded.embed.weight.shape[0] == padded.lm_head.weight.shape[0] == 64
    assert padded(tokens).shape == (2, 10, 61)
    torch.testing.assert_close(padded(tokens), plain(tokens))
    padded(tokens).square().sum().backward()
    assert padded.lm_head.weight.grad[61:].abs().max() == 0


def test_the_head_gets_lm_head_and_the_last_hidden_state():
    model = build()
    tokens = some_tokens(2, 10)
    seen = []
    result = model(tokens, head=lambda lm_head, hidden: seen.append((lm_head, hidden)) or hidden.sum())
    assert result.shape == ()
    (lm_head, hidden), *_ = seen
    assert lm_head is model.lm_head
    torch.testing.assert_close(F.linear(hidden, lm_head.weight), model(tokens))


def test_tied_embeddings_are_one_parameter():
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.lm_head.weight is tied.embed.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 61 * 32
    assert tied.double().lm_head.weight is tied.embed.weight


def test_there_are_no_buffers(style):
    assert list(build(**style).buffers()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype):
    model = build(**STYLES["qwen3"])
    tokens, doc_ids = some_tokens(2, 16), torch.tensor([[0] * 8 + [1] * 8] * 2)
    exact = model(tokens, doc_ids=doc_ids)
    half = model.to(dtype)(tokens, doc_ids=doc_ids)
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_autocast_gives_gradients_near_fp32():
    model = build(**STYLES["qwen3"])
    tokens = some_tokens(2, 16)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(tokens).float().logsumexp(-1).sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_works_in_fp32_inside(dtype):
    norm = RMSNorm(8, 1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight)
    x = 1e3 * torch.randn(3, 8, dtype=dtype)  # the mean of squares of these overflows fp16 and is coarse in bf16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x), exact.to(dtype))


def test_gradients_written_by_hand_are_those_of_autograd():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, 1e-2).double()
    torch.nn.init.uniform_(norm.weight)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))
    mlp = make_mlp(ModelConfig(**(TINY | {"dim": 8, "n_heads": 1, "ffn_dim": 6}))).double()
    assert torch.autograd.gradcheck(mlp, (x,))
    plain = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), plain)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("window", [None, 60])
def test_a_compiled_block_equals_eager(window, branched):
    """Without and with packed documents, or pairs, whose number may change without compiling again."""
    torch._dynamo.reset()  # or what another test compiled is found again
    fields = STYLES["qwen3"] | {"n_layers": 1, "max_seq_len": 256, "window": window}
    eager, compiled = build(**fields), build(**fields)
    compiled.blocks[0].compile(backend="eager")  # what is tested is the tracing; no code is generated
    tokens = some_tokens(4, 256)
    frames = []
    for border in (None, 100, 200):
        doc_ids = None if border is None else (torch.arange(256) % border == 0).cumsum(0).expand(4, -1)
        branches = (torch.arange(256) % border // 30).expand(4, -1) if border and branched else None
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            logits = model(tokens, doc_ids=doc_ids, branches=branches)
            logits.logsumexp(-1).sum().backward()
            results.append((logits, [p.grad for p in model.parameters()]))
        torch.testing.assert_close(*results)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] < frames[1] == frames[2]


@torch.library.custom_op("minillm_tests::by_pieces", mutates_args={})
def by_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, borders_k: torch.Tensor, window: int
) -> torch.Tensor:
    """What varlen_attn computes, and as opaque to the compiler as that is."""
    pieces = []
    for (a, b), (start, stop) in zip(itertools.pairwise(borders.tolist()), itertools.pairwise(borders_k.tolist())):
        rule = Mask(causal=True, offset=stop - start - (b - a), window=None if window < 0 else window + 1)
        qkv = (x.transpose(0, 1)[None] for x in (q[a:b], k[start:stop], v[start:stop]))
        pieces.append(attend_reference(*qkv, rule)[0].transpose(0, 1))
    return torch.cat(pieces)


by_pieces.register_fake(lambda q, k, v, borders, borders_k, window: torch.empty_like(q))


def varlen_of_a_cpu(q, k, v, borders, borders_k, longest, longest_k, *, window_size, enable_gqa):
    return by_pieces(q, k, v, borders, borders_k, window_size[0])


@pytest.mark.filterwarnings("ignore:.*unfused implementation")
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("path", ["flex", "varlen"])
def test_a_compiled_block_takes_the_masks_of_accelerators(path, branched, monkeypatch):
    """New documents, and another number of them, without compiling again; forward, which is what a CPU can show."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_a_cpu)
    torch._dynamo.reset()
    fields = {"n_layers": 2, "n_kv_heads": 2, "max_seq_len": 256, "window": 60, "window_pattern": "WF"}
    eager, compiled = build(**fields), build(**fields)
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True)
    tokens = some_tokens(2, 256)
    frames = []
    with torch.no_grad():
        for border in (100, 50, 90, 30):
            packed = {"doc_ids": (torch.arange(256) % border == 0).cumsum(0).expand(2, -1)}
            if branched:
                packed["branches"] = (torch.arange(256) % border // 12).expand(2, -1)
            monkeypatch.setattr(attention, "kernels_for", lambda *args: (path,))
            logits = compiled(tokens, **packed)
            monkeypatch.setattr(attention, "kernels_for", lambda *args: ())
            torch.testing.assert_close(logits, eager(tokens, **packed), atol=1e-5, rtol=1e-5)
            frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[1] == frames[-1]  # the second may compile again, for any number of documents


# --- what generation relies on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_few_vectors_give_what_many_do(bias):
    linear, x = Linear(24, 10, bias=bias), torch.randn(3, 4, 24)
    with torch.no_grad():
        expected = F.linear(x, linear.weight, linear.bias)
        for rows in (1, 2, 4):
            some = torch.cat([linear(few) for few in x.view(-1, rows, 1, 24)]).view(3, 4, 10)
            torch.testing.assert_close(some, expected)
        assert linear(x[:0]).shape == (0, 4, 10)
    linear(x[0, :1]).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x[0, :1].expand(10, -1))


@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm_plus_one"])
def test_without_gradients_the_numbers_are_the_same(norm):
    model, tokens = build(norm=norm, mlp="swiglu").eval(), some_tokens(2, 9)
    with torch.no_grad():
        plain = model(tokens)
    assert torch.equal(plain, model(tokens))


class ListCache:
    """The simplest cache: all keys and values so far, joined anew at each call."""

    lengths = None  # all rows hold as many

    def __init__(self):
        self.pieces = []
        self.length = 0

    def append(self, k, v):
        self.pieces.append((k, v))
        keys, values = (torch.cat(each, dim=2) for each in zip(*self.pieces))
        self.length = keys.shape[2]
        return keys, values


def in_pieces(model: Transformer, tokens: torch.Tensor, pieces: list[int], doc_ids=None) -> torch.Tensor:
    caches = [ListCache() for _ in model.blocks]
    logits, stop = [], 0
    for piece in tokens.split(pieces, dim=1):
        stop += piece.shape[1]
        logits.append(model(piece, caches=caches, doc_ids=None if doc_ids is None else doc_ids[:, :stop]))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [11, 1]])
def test_with_caches_equals_without(style, pieces):
    model = build(**style).eval()
    tokens = some_tokens(2, 12)
    torch.testing.assert_close(in_pieces(model, tokens, pieces), model(tokens), atol=1e-5, rtol=1e-5)


def test_padding_before_a_short_prompt_is_a_document_of_its_own(style):
    model = build(**style).eval()
    long, short = some_tokens(1, 12), some_tokens(1, 9, seed=1)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    doc_ids = torch.tensor([[0] * 12, [0] * 3 + [1] * 9])
    batched = in_pieces(model, padded, [8, 1, 3], doc_ids)
    torch.testing.assert_close(batched[:1], model(long), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batched[1:, 3:], model(short), atol=1e-5, rtol=1e-5)


# --- every option -----------------------------------------------------------------------------------------------------

ON_TOP_OF = {  # the field: what the others are, and the value that must make another model
    "vocab_size": ({}, "62"),
    "dim": ({"ffn_dim": 48, "head_dim": 8}, "40"),
    "n_layers": ({}, "3"),
    "n_heads": ({"head_dim": 8}, "2"),
    "n_kv_heads": ({}, "2"),
    "head_dim": ({}, "12"),
    "ffn_dim": ({}, "40"),
    "max_seq_len": ({"position": "learned"}, "24"),
    "norm": ({}, "layernorm"),
    "norm_eps": ({}, "0.5"),
    "position": ({}, "none"),
    "rope_theta": ({}, "100"),
    "rope_scaling": ({"rope_scaling": "linear", "rope_factor": 4.0}, "ntk"),
    "rope_factor": ({"rope_scaling": "ntk", "rope_factor": 2.0}, "4"),
    "rope_original_len": ({"rope_scaling": "llama3", "rope_factor": 4.0}, "24"),
    "window": ({}, "5"),
    "window_pattern": ({"window": 5}, "WF"),
    "mlp": ({}, "geglu"),
    "qk_norm": ({}, "true"),
    "qkv_bias": ({}, "true"),
    "o_bias": ({}, "true"),
    "mlp_bias": ({}, "true"),
    "embed_scale": ({}, "true"),
    "tie_embeddings": ({}, "false"),
    "dropout": ({}, "0.5"),
    "causal": ({}, "false"),
    "vocab_multiple": ({}, "64"),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_field_said_on_the_command_line_makes_another_model(field):
    """Other parameters, or, with the same parameters, other scores."""
    base, value = ON_TOP_OF[field]

    @dataclasses.dataclass(frozen=True)
    class Config:
        model: ModelSection = dataclasses.field(default_factory=ModelSection)

    models = []
    for fields in (TINY | base, TINY | base | {field: value}):
        _, layer = arguments(Config, [word for name in fields for word in (f"--model.{name}", str(fields[name]))])
        config = build_config(Config, [layer]).model.to_config()
        models.append(build(**dataclasses.asdict(config)))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    if shapes[0] == shapes[1]:
        torch.manual_seed(0)
        before, after = (model(some_tokens(2, 20)) for model in models)
        assert (before - after).abs().max() > 1e-3


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused():
    model = build()
    with pytest.raises(ValueError, match="33 tokens are more than the model's max_seq_len 32"):
        model(some_tokens(1, 33))
    caches = [ListCache() for _ in model.blocks]
    model(some_tokens(1, 30), caches=caches)
    with pytest.raises(ValueError, match=r"33 tokens \(30 of them cached\)"):
        model(some_tokens(1, 3), caches=caches)
    with pytest.raises(ValueError, match=r"doc_ids has shape \(1, 3\); tokens and caches need \(1, 4\)"):
        model(some_tokens(1, 4), doc_ids=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"branches has shape \(1, 3\); tokens have \(1, 4\)"):
        model(some_tokens(1, 4), branches=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="branches do not go with caches"):
        model(some_tokens(1, 2), branches=torch.zeros(1, 32, dtype=torch.long), caches=caches)
    bidirectional = build(causal=False)
    caches = [ListCache() for _ in bidirectional.blocks]
    bidirectional(some_tokens(1, 4), caches=caches)
    with pytest.raises(ValueError, match="bidirectional"):
        bidirectional(some_tokens(1, 1), caches=caches)


def test_a_config_reports_all_its_problems_at_once():
    with pytest.raises(ValueError, match="is expected") as error:
        ModelConfig(vocab_size=0, dim=32, norm="batchnorm", dropout=1.5, n_layers=2.5)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["vocab_size", "n_layers", "norm", "dropout"]
    with pytest.raises(ValueError, match="does not divide") as error:
        ModelConfig(vocab_size=8, dim=32, n_heads=5, n_kv_heads=3)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("n_heads: 5 does not divide dim 32")
    assert lines[1].startswith("n_kv_heads: 3 does not divide n_heads 5")
    with pytest.raises(ValueError, match="head_dim: 3 is odd"):
        ModelConfig(vocab_size=8, dim=12, n_heads=4)
    with pytest.raises(ValueError, match="rope_factor: 2 has no effect with rope_scaling none"):
        ModelConfig(vocab_size=8, rope_factor=2.0)
    with pytest.raises(ValueError, match="rope_factor: 1 leaves rope_scaling yarn without effect"):
        ModelConfig(vocab_size=8, rope_scaling="yarn")
    with pytest.raises(ValueError, match="rope_scaling: ntk has no effect with position learned"):
        ModelConfig(vocab_size=8, rope_scaling="ntk", rope_factor=2.0, position="learned")
    with pytest.raises(ValueError, match=r"rope_theta: is 1\.0; it must be > 1"):
        ModelConfig(vocab_size=8, rope_theta=1.0)
    with pytest.raises(ValueError, match="window_pattern: 'WLW' is to be made of W"):
        ModelConfig(vocab_size=8, window=4, window_pattern="WLW")
    with pytest.raises(ValueError, match="window_pattern: WF has no effect without window"):
        ModelConfig(vocab_size=8, window_pattern="WF")


def test_a_finished_config_has_no_gaps():
    config = ModelConfig(vocab_size=100, dim=96, n_heads=3, vocab_multiple=64)
    assert (config.n_kv_heads, config.head_dim, config.ffn_dim, config.padded_vocab_size) == (3, 32, 256, 128)
    assert ModelConfig(vocab_size=100, dim=96, n_heads=3, mlp="gelu").ffn_dim == 384
    assert ModelConfig(**dataclasses.asdict(config)) == config


def test_a_section_is_a_request_that_later_fields_can_change():
    section = ModelSection(dim=96, n_heads=3)
    assert section.vocab_size is None
    assert section.head_dim is None
    config = section.to_config(vocab_size=100, dim=48)
    assert (type(config), config.vocab_size, config.head_dim) == (ModelConfig, 100, 16)
    with pytest.raises(ValueError, match="n_heads: 5"):
        ModelSection(n_heads=5)
