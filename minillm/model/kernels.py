"""Attention kernels that only accelerators have: torch's varlen_attn and FlexAttention.

Whether a device has one is asked of the device and not of its name. torch.nn.attention imports the compiler, which
takes seconds, so that it is imported here where it is first used.

Shapes: B batch, T time, H heads, K key/value heads, d head_dim.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minillm.model.masks import (
    Mask,
    attend_reference,
    document_borders,
    expand_groups,
    find_segments,
    places_of_keys,
    restart_positions,
)

SMALLEST_FLEX_HEAD = 16  # below, Triton's dot product has no instruction

# --- varlen: documents of any length laid end to end ------------------------------------------------------------------


def prepare_varlen(mask: Mask, B: int, T: int, device: torch.device) -> None:
    """Gives the mask what `attend_varlen` needs: the borders of segments, or of rows where there are no documents."""
    if mask.branches is not None:
        segments = find_segments(mask)
        mask.key_places = places_of_keys(segments, device)
        lengths = [(len(segment.queries), segment.n_keys) for segment in segments]
        borders = [list(accumulate(each, initial=0)) for each in zip(*lengths)]
        mask.borders, mask.key_borders = torch.tensor(borders, dtype=torch.int32).to(device).unbind()
    elif mask.doc_ids is not None:
        mask.borders = mask.key_borders = document_borders(mask.doc_ids)
    else:
        mask.borders = mask.key_borders = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)
    mask.options = varlen_options(mask.causal, mask.window, varlen_parameters())


def varlen_options(causal: bool, window: int | None, parameters: frozenset[str]) -> dict[str, Any]:
    """The rule in the words of torch's varlen_attn, whose parameters changed between its versions.

    A window there is how many keys are seen (before, after) a query's own; -1 is no limit.
    """
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    if "window_size" in parameters:
        before = -1 if window is None else window - 1
        return options | {"window_size": (before, 0 if causal else before)}
    if window is not None:
        raise ValueError("window: this version of torch has no windows in varlen_attn")
    return options | {"is_causal": causal}


@lru_cache
def varlen_parameters() -> frozenset[str]:
    """What torch's varlen_attn can be told."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """Every segment by itself, all of them in one call of the flash kernel. Shapes as in `attend`."""
    from torch.nn.attention.varlen import varlen_attn

    assert not dropout, "varlen_attn cannot drop attention weights"
    B, H, T, d = q.shape
    if "enable_gqa" not in mask.options:
        k, v = expand_groups(q, k, v)
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, d) for x in (q, k, v))  # (B*T, H or K, d)
    if mask.key_places is not None:
        k, v = k.index_select(0, mask.key_places), v.index_select(0, mask.key_places)  # (keys, K, d)
    # fewer queries than keys are the last of them; T: no segment is longer
    y = varlen_attn(q, k, v, mask.borders, mask.key_borders, T, T, **mask.options)
    return y.view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)


@torch._disable_dynamo
@lru_cache
def has_varlen(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    grouped: bool,
    causal: bool,
    windowed: bool,
    branched: bool = False,
) -> bool:
    """Whether varlen_attn runs there and gives the right numbers, forward and backward: by trying it on two documents.

    The answer depends on the device, on the versions of torch and of its kernels, on the dtype and the head's width.
    """
    T, H, K = 24, 4, 2 if grouped else 4
    places = torch.arange(T, device=device)[None]
    branches = places % 16 // 6 if branched else None  # a prompt and two branches; a prompt and one
    mask = Mask(causal, doc_ids=places // 16, window=5 if windowed else None, branches=branches)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        waves = torch.linspace(0, 99, (H + 2 * K) * T * head_dim, device=device).sin().view(1, -1, T, head_dim)
        qkv = [x.detach().to(dtype).requires_grad_() for x in waves.split([H, K, K], dim=1)]
        try:
            prepare_varlen(mask, 1, T, device)
            y = attend_varlen(*qkv, mask)
            gradients = torch.autograd.grad(y.sum(), qkv)
        except (ImportError, RuntimeError, TypeError, ValueError):
            return False
        expected = attend_reference(*(x.float() for x in qkv), mask)
        finite = all(gradient.isfinite().all() for gradient in gradients)
        return finite and bool((y - expected).abs().max() < 0.05)


# --- flex: a kernel compiled for the rule -----------------------------------------------------------------------------


def prepare_flex(mask: Mask, B: int, T: int, device: torch.device) -> None:
    """Gives the mask what `attend_flex` needs: which blocks of 128 queries and keys hold a pair that may be seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    make = create_block_mask if device.type == "cpu" else compiled("create_block_mask")
    rows = B if mask.doc_ids is not None else None
    rule = flex_rule(mask.causal, mask.doc_ids, mask.window, mask.branches)
    mask.blocks = make(rule, rows, None, T, T, device=device)


def flex_rule(
    causal: bool, doc_ids: Tensor | None, window: int | None, branches: Tensor | None = None
) -> Callable[..., Tensor]:
    """The rule as FlexAttention wants it: a function of row, head, query and key."""
    positions = restart_positions(doc_ids, branches) if branches is not None else None

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i if causal else j == j
        if window is not None:
            apart = i - j if positions is None else positions[b, i] - positions[b, j]
            seen = seen & (apart < window) & (-apart < window)
        if doc_ids is not None:
            seen = seen & (doc_ids[b, i] == doc_ids[b, j])
        if branches is not None:
            seen = seen & ((branches[b, j] == 0) | (branches[b, i] == branches[b, j]))
        return seen

    return rule


@lru_cache
def compiled(name: str) -> Callable[..., Any]:
    """A function of torch's flex_attention, compiled; by itself it would hold all scores in memory."""
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name))


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """The kernel that torch compiles for the rule; inside a compiled block it becomes a part of that. Shapes as in
    `attend`.
    """
    from torch.nn.attention.flex_attention import flex_attention

    assert not dropout, "flex_attention cannot drop attention weights"
    run = flex_attention if q.is_cpu or torch.compiler.is_compiling() else compiled("flex_attention")
    return run(q, k, v, block_mask=mask.blocks, enable_gqa=q.shape[1] != k.shape[1])


@torch._disable_dynamo
@lru_cache
def has_flex(device: torch.device, head_dim: int) -> bool:
    """Whether torch can compile FlexAttention for the device, forward and backward: on a CPU there is no backward."""
    from torch.utils._triton import has_triton

    return device.type != "cpu" and head_dim >= SMALLEST_FLEX_HEAD and has_triton()
