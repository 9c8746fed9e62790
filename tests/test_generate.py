from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minillm.generate.filters import choose
from minillm.generate.generate import generate, stream
from minillm.generate.params import SamplingParams
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer, CharTokenizer

TOKENIZER = ByteTokenizer()
SHAPES = {
    "rope": {},
    "grouped heads": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "qkv_bias": True},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True},
    "no positions, padded vocabulary": {"position": "none", "vocab_multiple": 64},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(max_seq_len: int = 24, dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    """Random weights large enough that its choices vary."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "ffn_dim": 64} | changes
    model = Transformer(ModelConfig(vocab_size=TOKENIZER.vocab_size, max_seq_len=max_seq_len, **shape))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def generate_without_cache(model: Transformer, prompt: list[int], n: int, params: SamplingParams) -> list[int]:
    """The plain definition: the whole text through the model for every token."""
    generator = torch.Generator().manual_seed(params.seed or 0)
    tokens = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([tokens]))[:, -1]
        tokens.append(int(choose(logits, params, torch.rand(1, generator=generator))))
    return tokens[len(prompt) :]


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_tokens_equal_uncached_at_every_prompt_length(shape, temperature):
    model = make_model(dtype=torch.float64, **SHAPES[shape])
    prompt = torch.randint(0, 272, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in range(1, 24):
        n = min(6, 24 - length)
        params = SamplingParams(max_new_tokens=n, temperature=temperature, seed=length)
        cached = generate(model, None, prompt[:length], params).tokens
        assert cached == generate_without_cache(model, prompt[:length], n, params), length


# --- prompts, stopping, text -----------------------------------------------------------------------------------------


@dataclass
class ParrotConfig:
    vocab_size: int = TOKENIZER.vocab_size
    max_seq_len: int = 64
    causal: bool = True
    n_layers: int = 1
    n_kv_heads: int = 1
    head_dim: int = 1


class Parrot(torch.nn.Module):
    """Says the tokens it was given, whatever the prompt; remembers what it was asked."""

    def __init__(self, says: list[int], **config):
        super().__init__()
        self.config = ParrotConfig(**config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.says = says
        self.heard: list[list[int]] = []

    def forward(self, tokens, caches, doc_ids=None, head=None):
        assert not self.training
        self.said = caches[0].length and self.said + 1  # nothing is cached: another request
        self.heard.append(tokens[0].tolist())
        hidden = torch.nn.functional.one_hot(torch.full_like(tokens, self.says[self.said]), self.config.vocab_size)
        return head(lambda last: last.float() * 100, hidden) if head else hidden.float() * 100


GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
LONG = SamplingParams(min_new_tokens=34)


def summary(completion):
    return completion.text, completion.tokens, completion.finish_reason


def test_prompt_starts_with_bos_and_each_token_is_read_once():
    parrot = Parrot([*TOKENIZER.encode("xyz"), TOKENIZER.eos_id])
    generate(parrot, TOKENIZER, "ab", GREEDY)
    a, b, x, y, z = TOKENIZER.encode("abxyz")
    assert parrot.heard == [[TOKENIZER.bos_id, a, b], [x], [y], [z]]


def test_empty_prompt_starts_from_bos():
    parrot = Parrot([TOKENIZER.eos_id])
    assert summary(generate(parrot, TOKENIZER, "", GREEDY)) == ("", [TOKENIZER.eos_id], "stop")
    assert parrot.heard == [[TOKENIZER.bos_id]]


def test_tokens_are_taken_as_they_are():
    parrot = Parrot([TOKENIZER.eos_id])
    generate(parrot, TOKENIZER, [7, 8, 9], GREEDY)
    assert parrot.heard == [[7, 8, 9]]


def test_stops_at_eos_or_at_the_length_asked_for():
    says = [*TOKENIZER.encode("abc"), TOKENIZER.eos_id]
    assert summary(generate(Parrot(says), TOKENIZER, "p", GREEDY)) == ("abc", says, "stop")
    short = SamplingParams(temperature=0, max_new_tokens=2)
    assert summary(generate(Parrot(says), TOKENIZER, "p", short)) == ("ab", says[:2], "length")


TEXT = "né 中文 🎉 end"


def test_stream_never_splits_a_character():
    parrot = Parrot([*TOKENIZER.encode(TEXT), TOKENIZER.eos_id])
    pieces = list(stream(parrot, TOKENIZER, "p", GREEDY))
    assert pieces == list(TEXT)  # the byte tokenizer gives a character at a time, once its last byte is there


def test_character_cut_by_the_length_ends_in_a_replacement_mark():
    cut = SamplingParams(temperature=0, max_new_tokens=len("né 中".encode()) - 1)
    says = TOKENIZER.encode(TEXT)
    assert generate(Parrot(says), TOKENIZER, "p", cut).text == "né \ufffd"
    assert "".join(stream(Parrot(says), TOKENIZER, "p", cut)) == "né \ufffd"
    assert TOKENIZER.decode(says[: cut.max_new_tokens]) == "né \ufffd"


def test_stream_and_generate_give_the_same_text():
    model = make_model(64)
    for seed in range(5):
        params = SamplingParams(seed=seed, max_new_tokens=30)
        completion = generate(model, TOKENIZER, "ab", params)
        assert "".join(stream(model, TOKENIZER, "ab", params)) == completion.text
        assert TOKENIZER.decode(completion.tokens) == completion.text


def test_stream_gives_text_as_it_comes():
    parrot = Parrot(TOKENIZER.encode("abcdef"))
    pieces = stream(parrot, TOKENIZER, "p", GREEDY)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    assert len(parrot.heard) == 2


def test_seed_decides_and_other_prompts_do_not():
    model = make_model(64)
    params = SamplingParams(seed=5, max_new_tokens=12)
    alone = generate(model, TOKENIZER, "some", params)
    assert generate(model, TOKENIZER, "some", params) == alone
    assert summary(generate(model, TOKENIZER, ["other", "some", "more"], params)[1]) == summary(alone)
    others = [generate(model, TOKENIZER, "some", SamplingParams(seed=s, max_new_tokens=12)) for s in range(5)]
    assert len({c.text for c in others}) > 1
    free = [generate(model, TOKENIZER, "some", SamplingParams(max_new_tokens=12)) for _ in range(5)]
    assert len({c.text for c in free}) > 1


def test_a_list_gives_a_list():
    parrot = Parrot([TOKENIZER.eos_id])
    assert len(generate(parrot, TOKENIZER, ["a", "b"], GREEDY)) == 2
    assert isinstance(generate(parrot, TOKENIZER, ["a"], GREEDY), list)
    assert generate(parrot, TOKENIZER, [], GREEDY) == []
    assert len(generate(parrot, TOKENIZER, [[1, 2], [3]], GREEDY)) == 2


def test_without_a_length_the_context_is_the_limit():
    model = make_model(24)
    assert len(generate(model, None, [5, 6, 7]).tokens) == 21
    long = Parrot(TOKENIZER.encode("x") * 300, max_seq_len=1000)
    assert len(generate(long, TOKENIZER, "p", SamplingParams(temperature=0)).tokens) == 256


def test_dropout_is_off_and_the_mode_is_given_back():
    model = make_model(dropout=0.5)
    expected = generate(model, None, [1, 2], SamplingParams(temperature=0, max_new_tokens=8))
    model.train()
    assert generate(model, None, [1, 2], SamplingParams(temperature=0, max_new_tokens=8)) == expected
    assert model.training
    assert torch.is_grad_enabled()


# --- what is refused, before any work --------------------------------------------------------------------------------


def refused(message: str, prompts="ab", params: SamplingParams = GREEDY, tokenizer=TOKENIZER, **config):
    parrot = Parrot([TOKENIZER.eos_id], **config)
    for call in (generate, stream):
        with pytest.raises(ValueError, match=message):
            call(parrot, tokenizer, prompts, params)
        assert parrot.heard == []
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], str):
            break


def test_prompt_beyond_the_context():
    refused("40 after a prompt of 71 tokens makes 111, more than .* 64; shorten the prompt by at least 8", "x" * 70)
    refused("1 after a prompt of 65 tokens makes 66", "x" * 64, SamplingParams())


def test_new_tokens_beyond_the_context():
    refused("^max_new_tokens: 40 after a prompt of 31 tokens makes 71, .* 64; ask for at most 33", "x" * 30)


def test_more_tokens_at_least_than_are_made():
    refused("^min_new_tokens: 34 is more than the 33 that are made where max_new_tokens is not set", "x" * 30, LONG)


def test_params_that_are_none():
    refused("^params: a SamplingParams is expected, not {'top_k': 5}", params={"top_k": 5})


def test_one_bad_prompt_in_a_list():
    refused("after a prompt of 71 tokens", ["fine", "x" * 70])


def test_tokens_that_are_none():
    refused("token 272 is outside the vocabulary of 272", [1, 272])
    refused("token -1 is outside", [-1])


def test_tokens_of_numpy_and_torch_are_tokens():
    model, params = make_model(), SamplingParams(temperature=0, max_new_tokens=4)
    expected = generate(model, None, [5, 6, 7], params)
    for tokens in (np.array([5, 6, 7]), torch.tensor([5, 6, 7])):
        assert generate(model, None, tokens, params) == expected
        assert generate(model, None, tokens[None], params) == [expected]


def test_prompts_that_are_neither_text_nor_tokens():
    refused("a text, or a list of tokens, is expected, not .*5.5", [5.5, 6])
    refused("is expected, not .*3", ["fine", 3])
    refused(r"is expected, not \[1, 'a'\]", [1, "a"])
    refused("is expected, not {'prompt': 'a'}", {"prompt": "a"})
    refused("is expected, not {'a'}", {"a"})
    refused("is expected, not None", None)
    refused("is expected, not 5", 5)


def test_text_without_a_tokenizer():
    refused("a prompt of text needs a tokenizer", tokenizer=None)


def test_tokenizer_that_does_not_fit():
    refused("the tokenizer has 272 tokens, the model 100", vocab_size=100)


def test_no_token_is_chosen_that_the_tokenizer_does_not_have():
    """Vocabularies are padded to round numbers, and such a model has learned nothing of the ids beyond its tokens."""
    says = [TOKENIZER.vocab_size + 5, TOKENIZER.eos_id]
    assert generate(Parrot(says, vocab_size=300), TOKENIZER, "p", GREEDY).tokens[0] < TOKENIZER.vocab_size
    assert (
        generate(Parrot(says, vocab_size=300), None, [1], SamplingParams(temperature=0, max_new_tokens=1)).tokens
        == says[:1]
    )


def test_bidirectional_model():
    refused("a bidirectional model", causal=False)


def test_character_that_the_tokenizer_does_not_know():
    refused("character 2 is 'z'", "abz", tokenizer=CharTokenizer("ab"))
