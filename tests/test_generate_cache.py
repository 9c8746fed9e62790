"""The cache: what it holds is what a model computes afresh, and its memory is taken once."""

import pytest
import torch

from minillm.generate.cache import KVCache
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

SHAPES = {
    "grouped heads": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "learned positions": {"position": "learned", "norm": "layernorm", "mlp": "gelu"},
    "no positions": {"position": "none"},
    "windows": {"window": 5, "window_pattern": "WF"},
    "a window everywhere": {"window": 3},
}
LENGTHS = [7, 1, 12, 4]


def make_model(dtype=torch.float32, **changes) -> Transformer:
    model = Transformer(
        ModelConfig(vocab_size=50, **{"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 24} | changes)
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def cached_logits(model: Transformer, texts: list[torch.Tensor], n: int, static: bool) -> torch.Tensor:
    """Of the last n tokens of each text, one step each; before them the texts are read at once, packed."""
    cache = KVCache(model.config.n_layers, 8, 20)
    lengths = [len(text) - n for text in texts]
    packed = torch.cat([text[:length] for text, length in zip(texts, lengths)])[None]
    doc_ids = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths))[None]
    model(packed, doc_ids=doc_ids, caches=cache.packed_prompts(range(len(texts)), lengths))
    found = []
    for i in range(n):
        tokens = torch.stack([text[length + i] for text, length in zip(texts, lengths)])[:, None]
        if static:
            tokens = torch.cat([tokens, tokens.new_zeros(8 - len(texts), 1)])
        caches = cache.next_tokens(len(texts), tokens.device, 8 if static else None)
        found.append(model(tokens, caches=caches)[: len(texts), 0])
    assert cache.lengths[: len(texts)] == [len(text) for text in texts]
    return torch.stack(found, dim=1)  # (B, n, V)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_different_lengths_see_what_each_would_alone(shape, static):
    model, n = make_model(**SHAPES[shape]), 6
    texts = [torch.randint(50, (length + n,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    found = cached_logits(model, texts, n, static)
    for text, logits in zip(texts, found):
        torch.testing.assert_close(logits, model(text[None])[0, -n:], atol=1e-5, rtol=1e-5)


def test_rows_of_one_length_need_no_mask():
    model, n = make_model(), 6
    texts = list(torch.randint(50, (3, 5 + n), generator=torch.Generator().manual_seed(0)))
    cache = KVCache(2, 4, 20)
    cache.packed_prompts([0, 1], [5, 5])
    assert cache.next_tokens(2, torch.device("cpu"))[0].lengths is None
    torch.testing.assert_close(
        cached_logits(model, texts, n, False), model(torch.stack(texts))[:, -n:], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float64, 1e-12)])
def test_keys_are_kept_in_the_dtype_of_the_model(dtype, tolerance):
    model, n = make_model(dtype), 3
    texts = [torch.randint(50, (length + n,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    found = cached_logits(model, texts, n, static=False)
    assert found.dtype == dtype
    for text, logits in zip(texts, found):
        expected = model(text[None])[0, -n:]
        assert (logits - expected).norm() < tolerance * expected.norm()


def test_memory_is_taken_once_and_for_every_slot():
    cache = KVCache(1, 4, 8)
    k = torch.randn(1, 2, 5, 3)
    (packed,) = cache.packed_prompts([1, 0], [2, 3])
    packed.append(k, 2 * k)
    memory = cache.blocks[0].k
    assert memory.shape == (4, 2, 8, 3)
    for _ in range(5):
        (rows,) = cache.next_tokens(2, k.device)
        keys, values = rows.append(k[:, :, :1].expand(2, -1, -1, -1), 2 * k[:, :, :1].expand(2, -1, -1, -1))
    assert cache.lengths == [8, 7, 0, 0]
    assert cache.blocks[0].k is memory
    assert keys.data_ptr() == memory.data_ptr()
    assert torch.equal(keys[0, :, :3], k[0, :, 2:])
    assert torch.equal(keys[1, :, :2], k[0, :, :2])
    assert torch.equal(values, 2 * keys)


def test_slots_are_copied_all_at_once():
    cache = KVCache(1, 4, 4)
    k = torch.randn(1, 2, 6, 3)
    cache.packed_prompts([0, 1, 2], [1, 2, 3])[0].append(k, k)
    before = cache.blocks[0].k.clone()
    cache.copy([1, 0, 2, 2], [0, 1, 2, 3])
    assert cache.lengths == [2, 1, 3, 3]
    assert torch.equal(cache.blocks[0].k[[0, 1, 2, 3], :, :3], before[[1, 0, 2, 2], :, :3])
    assert torch.equal(cache.blocks[0].v, cache.blocks[0].k)
