"""Every path of attention against the plain reference: outputs and gradients, for any shape and mask."""

import itertools

import pytest
import torch

from minillm.model import attention, kernels
from minillm.model.attention import attend, attend_in_slices, choose_path, kernels_for, make_mask, make_masks
from minillm.model.config import ModelConfig
from minillm.model.masks import (
    Mask,
    attend_reference,
    document_borders,
    find_segments,
    number_branches,
    number_documents,
    restart_positions,
    visible,
)

CONFIG = ModelConfig(vocab_size=10, dim=32, n_heads=4, n_kv_heads=2)


def random_qkv(B: int, T: int, S: int, H: int, K: int, d: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, d), (B, S, K, d), (B, S, K, d))
    return [torch.randn(s, generator=generator).transpose(1, 2).requires_grad_() for s in shapes]


def random_documents(B: int, T: int, mean_length: int, seed: int = 0) -> torch.Tensor:
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / mean_length
    return number_documents(starts.cumsum(dim=1))


def random_trees(B: int, T: int, mean_length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts followed by none, one or several branches; a few of the branches have no prompt."""
    runs = random_documents(B, T, mean_length, seed)
    generator = torch.Generator().manual_seed(seed)
    branches = torch.randint(4, (B, T), generator=generator).gather(1, runs)
    return dict(zip(("doc_ids", "branches"), number_branches(branches, runs // 5)))


def output_and_gradients(path, qkv: list[torch.Tensor], mask: Mask) -> list[torch.Tensor]:
    output = path(*qkv, mask)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad((output * weights).sum(), qkv)]


def check_path(mask: Mask, qkv: list[torch.Tensor]) -> None:
    """Output and gradients of `attend` equal those of the definition."""
    results = (output_and_gradients(path, qkv, mask) for path in (attend, attend_reference))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def prepared(path: str, mask: Mask, B: int, T: int, device: str = "cpu") -> Mask:
    """The mask made ready for that path, whether or not it would be chosen."""
    device = torch.device(device)
    mask.path = path
    if path == "dense":
        mask.dense = visible(mask, range(mask.offset, mask.offset + T), range(mask.offset + T), device)
    elif path in attention.PREPARATIONS:
        attention.PREPARATIONS[path](mask, B, T, device)
    return mask


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_formula():
    """One query head, written with loops over queries and keys."""
    q, k, v = (x.detach() for x in random_qkv(1, 5, 5, 1, 1))
    output = attend_reference(q, k, v, Mask(causal=True, doc_ids=torch.tensor([[0, 0, 0, 1, 1]])))
    for i, keys in enumerate([[0], [0, 1], [0, 1, 2], [3], [3, 4]]):
        scores = torch.stack([q[0, 0, i] @ k[0, 0, j] / 8**0.5 for j in keys])
        expected = sum(weight * v[0, 0, j] for weight, j in zip(scores.softmax(0), keys))
        torch.testing.assert_close(output[0, 0, i], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("packed", [True, False])
def test_the_rule_is_what_it_says(causal, window, packed):
    """For a part of the queries and of the keys, pair by pair; the queries stand behind four cached keys."""
    doc_ids = random_documents(2, 12, 4) if packed else None
    seen = visible(Mask(causal, 4, doc_ids, window), range(5, 12), range(2, 11), torch.device("cpu"))
    for b, i, j in itertools.product(range(2), range(5, 12), range(2, 11)):
        expected = j <= i or not causal
        expected &= window is None or abs(i - j) < window
        expected &= doc_ids is None or bool(doc_ids[b, i] == doc_ids[b, j])
        assert seen[b if packed else 0, 0, i - 5, j - 2] == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 5])
def test_a_branch_sees_its_prompt_and_itself(causal, window):
    """As the pairs that the texts [prompt, branch] have by themselves, text by text, and no others."""
    doc_ids, branches = number_branches(torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 3, 0, 0, 1]]))
    texts = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7], [0, 1, 2, 8], [9, 10, 11]]
    prompts = [3, 3, 3, 2]
    seen = visible(Mask(causal, 0, doc_ids, window, branches=branches), range(12), range(12), torch.device("cpu"))
    expected = torch.zeros(12, 12, dtype=torch.bool)
    for text, prompt in zip(texts, prompts):
        for i, j in itertools.product(range(len(text)), range(len(text))):
            near = window is None or abs(i - j) < window
            expected[text[i], text[j]] |= near and (j <= i if causal else i >= prompt or j < prompt)
    assert torch.equal(seen[0, 0], expected)


# --- every path equals the reference ----------------------------------------------------------------------------------

T = 300
LONG = [0] * 30 + [1] * 60 + [2] * 210
RULES = {
    "plain": {},
    "window of 1": {"window": 1},
    "window": {"window": 40},
    "wide window": {"window": 200},
    "documents": {"doc_ids": random_documents(2, T, 60)},
    "small documents": {"doc_ids": random_documents(2, T, 3)},
    "documents and window": {"doc_ids": random_documents(2, T, 100), "window": 20},
    "trees": random_trees(2, T, 30),
    "small trees": random_trees(2, T, 3),
    "a long branch": dict(zip(("doc_ids", "branches"), number_branches(torch.tensor([LONG, LONG[::-1]])))),
    "trees and window": random_trees(2, T, 60) | {"window": 20},
}
CAN = {  # which rules a path can carry out
    "full": lambda rule, causal: not rule and not causal,
    "causal": lambda rule, causal: not rule and causal,
    "window": lambda rule, causal: "window" in rule and "doc_ids" not in rule,
    "documents": lambda rule, causal: "doc_ids" in rule,
    "dense": lambda rule, causal: True,
    "flex": lambda rule, causal: True,
    "varlen": lambda rule, causal: True,
}


def cases(*paths: str) -> list:
    return [
        pytest.param(path, name, causal, id=f"{path}-{name}-{'causal' if causal else 'bidirectional'}")
        for path, name, causal in itertools.product(paths, RULES, (True, False))
        if CAN[path](RULES[name], causal)
    ]


@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
@pytest.mark.parametrize(("path", "rule", "causal"), cases("full", "causal", "window", "documents", "dense"))
def test_every_path_equals_the_reference(path, rule, causal, heads):
    check_path(prepared(path, Mask(causal, **RULES[rule]), 2, T), random_qkv(2, T, T, *heads))


@pytest.mark.filterwarnings("ignore:.*unfused implementation")
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
@pytest.mark.parametrize(("path", "rule", "causal"), cases("flex"))
def test_flex_equals_the_reference_forward(path, rule, causal, heads):
    """What a CPU can show of it: there is no backward there."""
    mask, qkv = prepared(path, Mask(causal, **RULES[rule]), 2, T), [x.detach() for x in random_qkv(2, T, T, *heads)]
    torch.testing.assert_close(attend(*qkv, mask), attend_reference(*qkv, mask), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("path", "rule", "causal"), cases("full", "causal", "window", "dense", "flex", "varlen"))
def test_every_path_equals_the_reference_on_a_gpu(path, rule, causal, heads):
    """In bf16 against the reference in fp32, forward and backward: no further from it than bf16 by itself."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if path == "varlen" and not kernels.has_varlen(
        torch.device("cuda"),
        torch.bfloat16,
        64,
        heads[0] != heads[1],
        causal,
        "window" in RULES[rule],
        "branches" in RULES[rule],
    ):
        pytest.skip("varlen_attn does not run here")
    fields = {name: value.cuda() if torch.is_tensor(value) else value for name, value in RULES[rule].items()}
    mask = prepared(path, Mask(causal, **fields), 2, T, "cuda")
    half = [x.detach().cuda().bfloat16().requires_grad_() for x in random_qkv(2, T, T, *heads, d=64)]
    exact = [x.detach().float().requires_grad_() for x in half]
    results = zip(output_and_gradients(attend, half, mask), output_and_gradients(attend_reference, exact, mask))
    for result, expected in results:
        assert result.dtype == torch.bfloat16
        assert (result.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branched", [False, True])
def test_a_packed_model_with_windows_equals_the_cpu_on_a_gpu(dtype, compile, branched):
    """With the paths that are chosen there, in a model whose blocks may be compiled; batch after batch."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    from minillm.model.transformer import Transformer

    fields = {"vocab_size": 50, "dim": 64, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2, "max_seq_len": T}
    config = ModelConfig(**fields, window=50, window_pattern="WF")
    exact, model = Transformer(config), Transformer(config).cuda()
    for block in model.blocks if compile else ():
        block.compile()
    for seed in range(3):
        tokens = torch.randint(0, 50, (2, T), generator=torch.Generator().manual_seed(seed))
        packed = random_trees(2, T, 60, seed) if branched else {"doc_ids": random_documents(2, T, 60, seed)}
        expected, gradients = exact(tokens, **packed), []
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = model(tokens.cuda(), **{name: numbers.cuda() for name, numbers in packed.items()})
        for output in (expected, logits):
            output.float().logsumexp(-1).sum().backward()
        for one in (exact, model):
            gradients.append(torch.cat([p.grad.cpu().flatten() for p in one.parameters()]))
            one.zero_grad()
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
        assert (logits.cpu().float() - expected).norm() < tolerance * expected.norm()
        assert (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()


@pytest.mark.parametrize("offset", [1, 15, 150, 299])
@pytest.mark.parametrize("rule", RULES)
def test_behind_a_cache_equals_the_reference(rule, offset):
    mask = make_mask(CONFIG, torch.zeros(2, T - offset), offset, **RULES[rule])
    check_path(mask, random_qkv(2, T - offset, T, 4, 2))


@pytest.mark.parametrize("window", [None, 4])
def test_rows_behind_different_numbers_of_keys_see_what_each_would_alone(window):
    offsets = [0, 3, 9, 5]
    q, k, v = random_qkv(4, 1, 10, 4, 2)
    mask = make_mask(CONFIG, torch.zeros(4, 1), max(offsets), window=window, offsets=torch.tensor(offsets))
    y = attend(q, k, v, mask)
    for row, offset in enumerate(offsets):
        own = (x[row : row + 1, :, : offset + 1] for x in (k, v))
        alone = attend_reference(q[row : row + 1], *own, Mask(True, offset, window=window))
        torch.testing.assert_close(y[row : row + 1], alone)


@pytest.mark.parametrize("T", [257, 512, 1023])
def test_in_slices_equals_the_reference(T, monkeypatch):
    mask = make_mask(CONFIG, torch.zeros(1, T))
    sliced = []
    monkeypatch.setattr(attention, "attend_in_slices", lambda *args: sliced.append(True) or attend_in_slices(*args))
    check_path(mask, random_qkv(1, T, T, 4, 2))
    assert sliced


# --- which path -------------------------------------------------------------------------------------------------------

PACKED = torch.tensor([[0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("mask", "T", "kernels", "path"),
    [
        (Mask(True), 6, (), "causal"),
        (Mask(True), 6, ("varlen",), "causal"),
        (Mask(False), 6, ("varlen",), "full"),
        (Mask(True, offset=5), 1, (), "full"),
        (Mask(True, offset=4), 2, (), "dense"),
        (Mask(True, window=3), 6, (), "window"),
        (Mask(True, window=3), 6, ("flex",), "window"),
        (Mask(True, window=3), 6, ("varlen", "flex"), "varlen"),
        (Mask(True, offset=5, window=3), 1, (), "window"),
        (Mask(True, doc_ids=PACKED), 6, (), "dense"),
        (Mask(True, doc_ids=PACKED), 6, ("documents",), "documents"),
        (Mask(True, doc_ids=PACKED), 6, ("flex",), "flex"),
        (Mask(True, doc_ids=PACKED), 6, ("varlen", "flex"), "varlen"),
        (Mask(True, doc_ids=PACKED, window=2), 6, ("varlen", "flex"), "varlen"),
        (Mask(True, doc_ids=PACKED, window=2), 6, ("flex",), "flex"),
        (Mask(True, offset=4, doc_ids=PACKED), 2, ("documents",), "dense"),
    ],
)
def test_the_path_follows_from_the_rule_and_the_kernels(mask, T, kernels, path):
    assert choose_path(mask, T, kernels) == path


def test_the_kernels_follow_from_the_device(monkeypatch):
    """What an accelerator can do is asked of it; none of its kernels drops attention weights."""
    monkeypatch.setattr(attention, "has_varlen", lambda device, dtype, *rest: dtype == torch.bfloat16)
    monkeypatch.setattr(attention, "has_flex", lambda device, head_dim: head_dim >= 16)
    device = torch.device("meta")  # any that is not the CPU
    wide = ModelConfig(vocab_size=10, dim=64, n_heads=4)

    def found(config, dtype, dropout=False):
        return list(kernels_for(config, device, dtype, dropout, windowed=False, branched=False))

    assert found(wide, torch.bfloat16) == ["varlen"]
    assert found(wide, torch.float32) == ["flex"]
    assert found(CONFIG, torch.float32) == []
    assert found(wide, torch.bfloat16, dropout=True) == []
    assert list(kernels_for(wide, torch.device("cpu"), torch.float32, True, False, False)) == ["documents"]


def test_a_kernel_that_does_not_run_is_not_used():
    assert not kernels.has_varlen(torch.device("cpu"), torch.bfloat16, 64, True, True, False)
    assert not kernels.has_flex(torch.device("cpu"), 64)


@pytest.mark.parametrize("branched", [True, False])
@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_a_kernel_is_used_only_where_its_numbers_are_right(right, windowed, branched, monkeypatch):
    """The kernel is played by the reference, once with a window one token too wide, or one that knows no branches."""

    def played(q, k, v, mask, dropout=0.0):
        wrong = Mask(mask.causal, doc_ids=None if mask.window is None else mask.doc_ids, window=(mask.window or 0) + 1)
        if branched:
            wrong = Mask(mask.causal, doc_ids=mask.doc_ids, window=mask.window)
        return attend_reference(q, k, v, mask if right else wrong)

    monkeypatch.setattr(kernels, "attend_varlen", played)
    kernels.has_varlen.__wrapped__.cache_clear()
    assert kernels.has_varlen(torch.device("cpu"), torch.bfloat16, 64, True, True, windowed, branched) == right
    kernels.has_varlen.__wrapped__.cache_clear()


def test_varlen_is_told_the_rule_in_the_words_of_its_version():
    new, old = frozenset({"window_size", "enable_gqa"}), frozenset({"is_causal"})
    assert kernels.varlen_options(True, None, new) == {"window_size": (-1, 0), "enable_gqa": True}
    assert kernels.varlen_options(False, None, new) == {"window_size": (-1, -1), "enable_gqa": True}
    assert kernels.varlen_options(True, 8, new) == {"window_size": (7, 0), "enable_gqa": True}
    assert kernels.varlen_options(False, 8, new) == {"window_size": (7, 7), "enable_gqa": True}
    assert kernels.varlen_options(True, None, old) == {"is_causal": True}
    with pytest.raises(ValueError, match="no windows"):
        kernels.varlen_options(True, 8, old)


@pytest.mark.parametrize("options", [{"window_size", "enable_gqa"}, {"window_size"}, {"is_causal"}])
@pytest.mark.parametrize("packed", [{}, {"doc_ids": random_documents(3, 50, 10)}, random_trees(3, 50, 6)])
def test_varlen_is_handed_what_it_takes(options, packed, monkeypatch):
    """Torch's function is played by one that cuts at the borders it is given and attends in each piece, in which the
    queries are the last of the keys.
    """

    def played(q, k, v, borders, borders_k, longest, longest_k, **given):
        assert set(given) == options
        assert q.shape[1] == k.shape[1] or "enable_gqa" in given
        assert (borders.dtype, borders_k.dtype) == (torch.int32, torch.int32)
        assert longest == longest_k == 50
        assert max(borders.diff().max(), borders_k.diff().max()) <= 50
        causal = given.get("is_causal", given.get("window_size") == (-1, 0))
        segments = zip(*(x.split(each.diff().tolist()) for x, each in ((q, borders), (k, borders_k), (v, borders_k))))
        return torch.cat(
            [
                attend_reference(
                    *(x.transpose(0, 1)[None] for x in segment), Mask(causal, offset=len(segment[1]) - len(segment[0]))
                )[0].transpose(0, 1)
                for segment in segments
            ]
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", played)
    monkeypatch.setattr(kernels, "varlen_parameters", lambda: frozenset(options))
    check_path(prepared("varlen", Mask(True, **packed), 3, 50), random_qkv(3, 50, 50, 4, 2))


def test_borders_are_where_documents_begin_and_rows_end():
    doc_ids = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 2]])
    assert document_borders(doc_ids).tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert [len(segment.queries) for segment in find_segments(Mask(True, doc_ids=doc_ids))] == [2, 2, 4, 1, 1, 2]
    mask = prepared("varlen", Mask(True, window=2), 3, 4)
    assert mask.borders.tolist() == [0, 4, 8, 12]


def test_blocks_that_no_query_sees_are_left_out_of_flex():
    doc_ids = (torch.arange(1024) // 256)[None]
    packed = prepared("flex", Mask(True, doc_ids=doc_ids), 1, 1024).blocks.to_dense()[0, 0]
    assert packed.sum() == 4 * 3  # a document of two blocks: three of its four, for each of four documents
    window = prepared("flex", Mask(True, window=128), 1, 1024).blocks.to_dense()[0, 0]
    assert window.sum() == 8 + 7  # each block and the one before it


@pytest.mark.parametrize(
    ("causal", "segments"),
    [
        (True, [((0, 0), (0, 5)), ((0, 2), (5, 7)), ((0, 0), (7, 8)), ((0, 0), (8, 9)), ((0, 0), (9, 10))]),
        (
            False,
            [
                ((0, 0), (0, 2)),
                ((0, 2), (2, 5)),
                ((0, 2), (5, 7)),
                ((0, 0), (7, 8)),
                ((0, 0), (8, 9)),
                ((0, 0), (9, 10)),
            ],
        ),
    ],
)
def test_a_prompt_and_its_first_branch_are_one_segment_where_nobody_looks_ahead(causal, segments):
    doc_ids, branches = number_branches(
        torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 1, 2]]), torch.tensor([[0] * 7 + [1, 2, 2]])
    )
    found = find_segments(Mask(causal, doc_ids=doc_ids, branches=branches))
    assert [((p.start, p.stop), (q.start, q.stop)) for p, q in found] == segments


def test_there_is_one_mask_for_each_window():
    config = ModelConfig(vocab_size=10, dim=32, n_heads=4, n_layers=4, window=3, window_pattern="WWF")
    assert config.windows == (3, 3, None, 3)
    masks = make_masks(config, torch.zeros(1, 6))
    assert {window: mask.path for window, mask in masks.items()} == {3: "window", None: "causal"}
    assert make_masks(config, torch.zeros(1, 3))[3].path == "causal"  # nothing is further away than the window


def test_one_document_a_row_needs_no_mask():
    mask = make_mask(CONFIG, torch.zeros(3, 6), doc_ids=torch.zeros(3, 6, dtype=torch.long))
    assert mask.path == "causal"
    doc_ids = torch.zeros(3, 6, dtype=torch.long)
    assert make_mask(CONFIG, torch.zeros(3, 6), doc_ids=doc_ids, window=2).path == "window"


def test_one_answer_a_prompt_and_row_needs_no_mask():
    doc_ids, branches = number_branches(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 2, 2, 2, 2, 2]]))
    assert make_mask(CONFIG, torch.zeros(2, 6), doc_ids=doc_ids, branches=branches).path == "causal"


def test_many_small_documents_go_through_one_call_and_long_rows_document_by_document():
    small, large = random_documents(2, 16, 4), random_documents(2, 1024, 100)
    assert make_mask(CONFIG, torch.zeros(2, 16), doc_ids=small).path == "dense"
    assert make_mask(CONFIG, torch.zeros(2, 1024), doc_ids=large).path == "documents"
    assert make_mask(CONFIG, torch.zeros(2, 16), **random_trees(2, 16, 4)).path == "dense"
    assert make_mask(CONFIG, torch.zeros(2, 1024), **random_trees(2, 1024, 50)).path == "documents"


def test_attention_weights_are_dropped_at_the_given_rate():
    """With values of 1, a query's output is the sum of the weights that are left, each scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 4)
    packed = torch.tensor([[0] * 200 + [1] * 200])
    for doc_ids, window in ((None, None), (None, 150), (packed, None), (packed, 150)):
        mask = make_mask(CONFIG, torch.zeros(1, 400), doc_ids=doc_ids, window=window)
        for path in (attend, attend_reference):
            output = path(q, q, v, mask, dropout=0.25)[0, 0, 100:200, 0]
            assert output.std() > 0.01
            assert output.mean() == pytest.approx(1.0, abs=0.03)


def test_documents_are_runs_of_equal_ids():
    doc_ids = torch.tensor([[7, 7, 2, 7, 7, 7], [1, 1, 1, 1, 1, 1], [3, 2, 1, 0, 0, -1]])
    assert number_documents(doc_ids).tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6, [0, 1, 2, 3, 3, 4]]
    assert restart_positions(doc_ids).tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]


def test_branches_are_runs_behind_a_prompt_and_their_positions_go_on_from_its_end():
    """A branch that comes back is another; a prompt begins a document, and a document may have none."""
    branches = torch.tensor([[0, 0, 1, 1, 2, 1], [1, 1, 2, 0, 0, 7], [0, 2, 2, 0, 1, 1]])
    numbered = [[0, 0, 2, 2, 3, 4], [1, 1, 2, 0, 0, 4], [0, 2, 2, 0, 4, 5]]
    doc_ids, numbers = number_branches(branches, torch.tensor([[3] * 6, [3] * 6, [0, 0, 0, 0, 0, 1]]))
    assert doc_ids.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2]]
    assert numbers.tolist() == numbered
    positions = [[0, 1, 2, 3, 2, 2], [0, 1, 0, 0, 1, 2], [0, 1, 2, 0, 1, 0]]
    assert restart_positions(doc_ids, numbers).tolist() == positions
    assert restart_positions(doc_ids, branches).tolist() == positions


PAIRS = (torch.arange(2048) % 96 // 32)[None]  # prompt, chosen, rejected, each of 32 tokens


@pytest.mark.parametrize(
    "rule",
    [
        {"doc_ids": (torch.arange(2048) // 64)[None]},
        {"window": 64},
        dict(zip(("doc_ids", "branches"), number_branches(PAIRS))),
    ],
    ids=["documents", "window", "trees"],
)
def test_the_fast_paths_never_build_the_whole_square(rule):
    """What autograd keeps grows with the documents or the window, not with the square of the row."""
    B, T, H, d = 1, 2048, 2, 8
    mask = make_mask(ModelConfig(vocab_size=10, dim=16, n_heads=2), torch.zeros(B, T), **rule)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(*random_qkv(B, T, T, H, H, d), mask)
    assert sum(kept) < B * T * T / 4
    assert mask.dense is None
