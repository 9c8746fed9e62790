"""Every path of attention against the plain reference: outputs and gradients, for any shape and mask."""

import pytest
import torch

from minillm.model import attention
from minillm.model.attention import (
    Mask,
    attend,
    attend_in_slices,
    attend_reference,
    make_mask,
    number_documents,
    restart_positions,
)
from minillm.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=10, dim=32, n_heads=4, n_kv_heads=2)


def random_qkv(B: int, T: int, S: int, H: int, K: int, d: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, d), (B, S, K, d), (B, S, K, d))
    return [torch.randn(s, generator=generator).transpose(1, 2).requires_grad_() for s in shapes]


def random_documents(B: int, T: int, mean_length: int, seed: int = 0) -> torch.Tensor:
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / mean_length
    return number_documents(starts.cumsum(dim=1))


def check_path(mask: Mask, qkv: list[torch.Tensor]) -> None:
    """Output and gradients of `attend` equal those of the definition."""
    results = []
    for path in (attend, attend_reference):
        output = path(*qkv, mask)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        results.append((output, *torch.autograd.grad((output * weights).sum(), qkv)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_the_reference_is_the_formula():
    """One query head, written with loops over queries and keys."""
    q, k, v = (x.detach() for x in random_qkv(1, 5, 5, 1, 1))
    output = attend_reference(q, k, v, Mask(causal=True, doc_ids=torch.tensor([[0, 0, 0, 1, 1]])))
    for i, keys in enumerate([[0], [0, 1], [0, 1, 2], [3], [3, 4]]):
        scores = torch.stack([q[0, 0, i] @ k[0, 0, j] / 8**0.5 for j in keys])
        expected = sum(weight * v[0, 0, j] for weight, j in zip(scores.softmax(0), keys))
        torch.testing.assert_close(output[0, 0, i], expected)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 7, 64])
def test_without_documents_equals_the_reference(heads, causal, T):
    config = ModelConfig(vocab_size=10, dim=8 * heads[0], n_heads=heads[0], n_kv_heads=heads[1], causal=causal)
    mask = make_mask(config, torch.zeros(2, T))
    assert mask.path == ("causal" if causal and T > 1 else "full")
    check_path(mask, random_qkv(2, T, T, *heads))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("path", ["dense", "documents"])
@pytest.mark.parametrize("mean_length", [2, 10, 40])
def test_packed_documents_equal_the_reference(heads, causal, path, mean_length, monkeypatch):
    monkeypatch.setattr(attention, "COST_OF_A_DOCUMENT", 0 if path == "documents" else 10**12)
    config = ModelConfig(vocab_size=10, dim=8 * heads[0], n_heads=heads[0], n_kv_heads=heads[1], causal=causal)
    mask = make_mask(config, torch.zeros(3, 50), doc_ids=random_documents(3, 50, mean_length))
    assert mask.path == path
    check_path(mask, random_qkv(3, 50, 50, *heads))


def test_long_packed_documents_equal_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "COST_OF_A_DOCUMENT", 0)
    doc_ids = torch.tensor([[0] * 300 + [1] * 100, [0] * 10 + [1] * 390])
    mask = make_mask(CONFIG, torch.zeros(2, 400), doc_ids=doc_ids)
    assert mask.path == "documents"
    check_path(mask, random_qkv(2, 400, 400, 4, 2))


@pytest.mark.parametrize("documents", [False, True])
def test_behind_a_cache_equals_the_reference(documents):
    doc_ids = random_documents(2, 20, 8) if documents else None
    mask = make_mask(CONFIG, torch.zeros(2, 5), offset=15, doc_ids=doc_ids)
    assert mask.path == "dense"
    check_path(mask, random_qkv(2, 5, 20, 4, 2))


@pytest.mark.parametrize("T", [257, 512, 1023])
def test_in_slices_equals_the_reference(T, monkeypatch):
    mask = make_mask(CONFIG, torch.zeros(1, T))
    sliced = []
    monkeypatch.setattr(attention, "attend_in_slices", lambda *args: sliced.append(True) or attend_in_slices(*args))
    check_path(mask, random_qkv(1, T, T, 4, 2))
    assert sliced


def test_one_document_a_row_needs_no_mask():
    mask = make_mask(CONFIG, torch.zeros(3, 6), doc_ids=torch.zeros(3, 6, dtype=torch.long))
    assert mask.path == "causal"


def test_many_small_documents_go_through_one_call_and_long_rows_document_by_document():
    small, large = random_documents(2, 16, 4), random_documents(2, 1024, 100)
    assert make_mask(CONFIG, torch.zeros(2, 16), doc_ids=small).path == "dense"
    assert make_mask(CONFIG, torch.zeros(2, 1024), doc_ids=large).path == "documents"


def test_attention_weights_are_dropped_at_the_given_rate():
    """With values of 1, a query's output is the sum of the weights that are left, each scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 4)
    for doc_ids in (None, torch.tensor([[0] * 200 + [1] * 200])):
        mask = make_mask(CONFIG, torch.zeros(1, 400), doc_ids=doc_ids)
        for path in (attend, attend_reference):
            output = path(q, q, v, mask, dropout=0.25)[0, 0, 100:200, 0]
            assert output.std() > 0.01
            assert output.mean() == pytest.approx(1.0, abs=0.03)


def test_documents_are_runs_of_equal_ids():
    doc_ids = torch.tensor([[7, 7, 2, 7, 7, 7], [1, 1, 1, 1, 1, 1], [3, 2, 1, 0, 0, -1]])
    assert number_documents(doc_ids).tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6, [0, 1, 2, 3, 3, 4]]
    assert restart_positions(doc_ids).tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]


def test_the_fast_paths_never_build_the_whole_square():
    """Packed documents: what autograd keeps grows with the documents, not with the square of the row."""
    B, T, H, d = 1, 2048, 2, 8
    doc_ids = (torch.arange(T) // 64)[None]
    mask = make_mask(ModelConfig(vocab_size=10, dim=16, n_heads=2), torch.zeros(B, T), doc_ids=doc_ids)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(*random_qkv(B, T, T, H, H, d), mask)
    assert sum(kept) < 10 * B * T * H * d
    assert mask.dense is None
