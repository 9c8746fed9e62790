"""Attention: which path carries out the rule of who sees whom, and the paths that torch does not have by itself.

The rule and the plain reference stand in masks.py, what only accelerators can do in kernels.py.

Shapes: B batch, T queries, S keys (T, or more where a cache holds earlier ones), D dim, H heads, K key/value heads,
d head_dim.
"""

from collections.abc import Callable, Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.config import ModelConfig
from minillm.model.fused import OverlappingSlices
from minillm.model.kernels import attend_flex, attend_varlen, has_flex, has_varlen, prepare_flex, prepare_varlen
from minillm.model.layers import Linear, RMSNorm
from minillm.model.masks import (
    Mask,
    Path,
    Segment,
    attend_reference,
    expand_groups,
    find_segments,
    places_of_keys,
    visible,
)
from minillm.model.rope import Rotation


class Cache(Protocol):
    """Keys and values of earlier tokens of one block, as generation keeps them."""

    length: int  # tokens held before this forward, of the row that holds most
    lengths: Tensor | None  # (B,) of each row, where they differ; None where they do not

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new (B, K, T, d), returns all of them (B, K, S, d)."""


# Running a segment by itself costs, beside its own work, as much time as this many products of a query and a key
# entry in one big call. Measured on x86 with one and two threads: 0.15 ms against 0.25 ns.
COST_OF_A_SEGMENT = 700_000

# Torch's CPU kernel takes 512 keys at once, also those that come after the query. Four slices of queries look at 5/8 of
# the square instead: 20 to 25% less time, forward and backward, at T = 512, and 10% at 1024. Beyond, the kernel leaves
# out enough by itself; below, there is too little to leave out.
SLICED_ABOVE, SLICED_UP_TO = 256, 1024

WINDOW_BLOCK = 128  # queries at a time over their window; more look at keys in vain, fewer cost more calls

# From so many queries on, a branch behind its prompt is faster in blocks, each over the keys up to its own end: a
# quarter less time for 500 behind 500, half for 1800 behind 200.
BRANCH_IN_BLOCKS_FROM = 192


# --- choosing ---------------------------------------------------------------------------------------------------------


def make_masks(
    config: ModelConfig,
    tokens: Tensor,
    offset: int = 0,
    doc_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: bool = False,
    offsets: Tensor | None = None,
    branches: Tensor | None = None,
) -> dict[int | None, Mask]:
    """The mask of each window that blocks have, None being that of blocks without one.

    Args: tokens (B, T), of which only shape and device matter; offset, how many keys a cache holds before them;
    doc_ids (B, offset + T), numbered; dtype, of queries and keys; dropout, whether attention weights are dropped;
    offsets (B,), how many keys each row holds, where they differ; branches (B, offset + T), numbered, with doc_ids.
    """
    return {
        window: make_mask(config, tokens, offset, doc_ids, window, dtype, dropout, offsets, branches)
        for window in set(config.windows)
    }


def make_mask(
    config: ModelConfig,
    tokens: Tensor,
    offset: int = 0,
    doc_ids: Tensor | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: bool = False,
    offsets: Tensor | None = None,
    branches: Tensor | None = None,
) -> Mask:
    """Chooses the fastest path for the rule and prepares what it needs; arguments as in `make_masks`."""
    T = tokens.shape[1]
    if window is not None and window >= offset + T:
        window = None  # nothing is as far away
    mask = Mask(config.causal, offset, doc_ids, window, offsets, branches)
    kernels: Collection[str] = ()
    if offset == 0 and (doc_ids is not None or window is not None):
        kernels = kernels_for(config, tokens.device, dtype, dropout, window is not None, branches is not None)
    mask.path = choose_path(mask, T, kernels)
    if mask.path == "documents":
        mask.segments = find_segments(mask)
        if len(mask.segments) == len(tokens):  # a row is one
            mask.doc_ids = mask.branches = None
            mask.path = choose_path(mask, T)
        else:
            work = sum(len(segment.queries) * reach(mask, segment.n_keys) for segment in mask.segments)
            saved = tokens.numel() * T - work
            if saved * config.n_heads * config.head_dim <= len(mask.segments) * COST_OF_A_SEGMENT:
                mask.path = "dense"
    if mask.path == "dense":
        mask.dense = visible(mask, range(offset, offset + T), range(offset + T), tokens.device)
    elif mask.path in PREPARATIONS:
        PREPARATIONS[mask.path](mask, *tokens.shape, tokens.device)
    return mask


def choose_path(mask: Mask, T: int, kernels: Collection[str] = ()) -> Path:
    """The fastest path for the rule, of those that always work and the given kernels, the fastest of which come first.

    A block of queries at a time over their window is as fast as a kernel would be, without being compiled.
    """
    if mask.offsets is not None:
        return "dense"
    if mask.doc_ids is None and mask.window is None and (T == 1 or not mask.causal):
        return "full"  # a single new token sees everything before it
    if mask.doc_ids is None and mask.window is None:
        return "causal" if mask.offset == 0 else "dense"
    if mask.offset == 0 and "varlen" in kernels:
        return "varlen"
    if mask.doc_ids is None:
        return "window"
    if mask.offset == 0 and kernels:
        return "flex" if "flex" in kernels else "documents"
    return "dense"


def kernels_for(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, dropout: bool, windowed: bool, branched: bool
) -> Collection[Path]:
    """The paths, beside those that always work, that the device has for such queries and keys."""
    if device.type == "cpu":
        return ("documents",)  # their lengths are at hand there, and one by one they are no slower
    if dropout:
        return ()  # neither of the two drops attention weights
    grouped = config.n_heads != config.n_kv_heads
    found: list[Path] = []
    if has_varlen(device, dtype, config.head_dim, grouped, config.causal, windowed, branched):
        found.append("varlen")
    elif has_flex(device, config.head_dim):
        found.append("flex")
    return found


def reach(mask: Mask, n_keys: int) -> int:
    """How many keys are looked at for a query of a segment of so many."""
    return n_keys if mask.window is None else min(n_keys, mask.window + WINDOW_BLOCK)


def prepare_documents(mask: Mask, B: int, T: int, device: torch.device) -> None:
    """Gives the mask what `attend_documents` needs: segments, where their keys are, and the rule within each."""
    mask.segments = mask.segments or find_segments(mask)
    if mask.branches is not None:
        mask.key_places = places_of_keys(mask.segments, device)
    mask.within = [rule_within(segment, mask, device) for segment in mask.segments]


def rule_within(segment: Segment, mask: Mask, device: torch.device) -> Mask:
    """Who sees whom in a segment: a branch stands behind its prompt as new tokens stand behind a cache."""
    n, n_keys = len(segment.queries), segment.n_keys
    window = mask.window if mask.window is not None and mask.window < n_keys else None
    rule = Mask(mask.causal, len(segment.prompt), window=window)
    rule.path = choose_path(rule, n)
    if rule.path == "dense" and n >= BRANCH_IN_BLOCKS_FROM:
        rule.path, rule.window = "window", n_keys
    elif rule.path == "dense":
        rule.dense = visible(rule, range(len(segment.prompt), n_keys), range(n_keys), device)
    return rule


# --- carrying out -----------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that each query may see.

    Args: q (B, H, T, d); k, v (B, K, S, d), K dividing H: query heads share key/value heads in groups.
    Returns: (B, H, T, d). Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023.
    """
    if mask.path in PATHS:
        return PATHS[mask.path](q, k, v, mask, dropout)
    if mask.path == "causal" and q.is_cpu and SLICED_ABOVE < q.shape[2] <= SLICED_UP_TO:
        return attend_in_slices(q, k, v, dropout)
    return fused(q, k, v, mask.dense, dropout, is_causal=mask.path == "causal")


def fused(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Torch's fused attention; `seen` is True where a query sees a key. Shapes as in `attend`."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1 and not is_causal:
        # the queries of a group are like so many tokens that see the same keys: each key is read once for all of them
        B, H, _, d = q.shape
        y = fused(q.reshape(B, k.shape[1], -1, d), k, v, seen, dropout)  # (B, K, H / K, d)
        return y.reshape(B, H, 1, d)
    if grouped and not q.is_cpu and (seen is not None or q.dtype == torch.float32):
        # on a GPU only the flash kernel knows groups, and it takes neither a mask nor fp32
        k, v, grouped = *expand_groups(q, k, v), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
    )


def attend_in_slices(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention of a quarter of the queries at a time, each quarter over the keys up to its own end."""
    T = q.shape[2]
    size = -(-T // 4)
    slices = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        seen = visible(Mask(causal=True), range(start, stop), range(stop), q.device)
        y = fused(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen, dropout)
        slices.append(y.transpose(1, 2))  # (B, t, H, d), as it lies in memory
    return torch.cat(slices, dim=1).transpose(1, 2)  # (B, H, T, d)


def attend_in_window(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """A block of queries at a time over the keys of its window alone: work grows with T times the window."""
    stop = mask.offset + q.shape[2]
    queries = [range(start, min(start + WINDOW_BLOCK, stop)) for start in range(mask.offset, stop, WINDOW_BLOCK)]
    keys = tuple(window_of(block, mask, k.shape[2]) for block in queries)
    blocks = zip(queries, keys, q.split(WINDOW_BLOCK, dim=2), *(OverlappingSlices.apply(x, keys) for x in (k, v)))
    done = []
    for i, j, q_block, k_block, v_block in blocks:
        seen = visible(mask, i, j, q.device) if len(i) > 1 else None  # a single one sees its whole window
        done.append(fused(q_block, k_block, v_block, seen, dropout).transpose(1, 2))  # (B, t, H, d), as in memory
    return torch.cat(done, dim=1).transpose(1, 2)  # (B, H, T, d)


def window_of(queries: range, mask: Mask, S: int) -> range:
    """The keys that some of the queries see."""
    last = queries.stop if mask.causal else min(queries.stop + mask.window - 1, S)
    return range(max(queries.start - mask.window + 1, 0), last)


# The lengths differ in every batch: compiled, it would be compiled anew for each. (The public torch.compiler.disable
# does the same, but imports the compiler at once, which takes seconds.)
@torch._disable_dynamo
def attend_documents(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """Attention of each segment of packed rows by itself: no time goes into pairs that may not see each other."""
    B, H, T, d = q.shape

    def in_line(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(B * T, -1, d)  # (B*T, H, d): the segments of all rows in one line

    q, k, v = in_line(q), in_line(k), in_line(v)
    if mask.key_places is not None:
        k, v = k.index_select(0, mask.key_places), v.index_select(0, mask.key_places)  # (keys, K, d)
    n_queries = [len(segment.queries) for segment in mask.segments]
    n_keys = [segment.n_keys for segment in mask.segments]
    # split is one node for autograd, where slices would be a full-size gradient each
    segments = zip(q.split(n_queries), k.split(n_keys), v.split(n_keys), mask.within)
    pieces = [
        attend(*(x.transpose(0, 1)[None] for x in segment), rule, dropout)[0].transpose(0, 1)
        for *segment, rule in segments
    ]  # (t, H, d) each
    return torch.cat(pieces).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)


PREPARATIONS: dict[str, Callable[[Mask, int, int, torch.device], None]] = {
    "documents": prepare_documents,
    "varlen": prepare_varlen,
    "flex": prepare_flex,
}
PATHS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask, float], Tensor]] = {
    "reference": attend_reference,
    "window": attend_in_window,
    "documents": attend_documents,
    "varlen": attend_varlen,
    "flex": attend_flex,
}


class Attention(nn.Module):
    """Every token asks (q) what the tokens it sees offer (k), and takes a weighted mean of what they hold (v)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q_dim, config.dim, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rotation, mask: Mask, cache: Cache | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d); -1: a tp rank has fewer heads
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, d)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)
