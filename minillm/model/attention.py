"""Attention: one rule of who sees whom, a plain reference for it, and the fast paths that must agree with it.

Shapes: B batch, T queries, S keys (T, or more where a cache holds earlier ones), D dim, H heads, K key/value heads,
d head_dim.
"""

from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.config import ModelConfig
from minillm.model.layers import RMSNorm
from minillm.model.rope import Rotation


class Cache(Protocol):
    """Keys and values of earlier tokens of one block, as generation keeps them."""

    length: int  # tokens held before this forward

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new (B, K, T, d), returns all of them (B, K, S, d)."""


# Running a document by itself costs, beside its own work, as much time as this many products of a query and a key
# entry in one big call. Measured on x86 with one and two threads: 0.15 ms against 0.25 ns.
COST_OF_A_DOCUMENT = 700_000

# Torch's CPU kernel takes 512 keys at once, also those that come after the query. Four slices of queries look at 5/8 of
# the square instead: 20 to 25% less time, forward and backward, at T = 512, and 10% at 1024. Beyond, the kernel leaves
# out enough by itself; below, there is too little to leave out.
SLICED_ABOVE, SLICED_UP_TO = 256, 1024


class Mask:
    """Who sees whom, the same in every block: made once a forward by `make_mask`.

    The rule: query i, which stands at `offset + i` among the keys, sees key j if j <= offset + i (where `causal`) and
    if both are in the same document (where there are `doc_ids`). `path` says how `attend` carries that out.
    """

    def __init__(self, causal: bool, offset: int = 0, doc_ids: Tensor | None = None):
        self.causal = causal
        self.offset = offset
        self.doc_ids = doc_ids  # (B, S), numbered
        self.path: Literal["reference", "full", "causal", "dense", "documents"] = "reference"
        self.dense: Tensor | None = None  # (B or 1, 1, T, S), True where the query sees the key; for the dense path
        self.lengths: list[int] = []  # of each document, row after row; for the documents path


def document_starts(doc_ids: Tensor) -> Tensor:
    """True where a document begins: a document is a run of equal ids, so an id that comes back begins another.

    (B, S) -> (B, S)
    """
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)


def number_documents(doc_ids: Tensor) -> Tensor:
    """The documents of each row numbered 0, 1, 2... (B, S) -> (B, S)"""
    return document_starts(doc_ids).cumsum(dim=1) - 1


def restart_positions(doc_ids: Tensor) -> Tensor:
    """Positions that count from 0 in each document. (B, S) -> (B, S)"""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    return index - torch.where(document_starts(doc_ids), index, 0).cummax(dim=1).values


def document_lengths(doc_ids: Tensor) -> list[int]:
    """Length of each document, row after row."""
    borders = [*document_starts(doc_ids).flatten().nonzero().flatten().tolist(), doc_ids.numel()]
    return [stop - start for start, stop in pairwise(borders)]


def make_mask(config: ModelConfig, tokens: Tensor, offset: int = 0, doc_ids: Tensor | None = None) -> Mask:
    """Chooses the fastest path for the rule and prepares what it needs.

    Args: tokens (B, T), of which only shape and device matter; offset, how many keys a cache holds before them;
    doc_ids (B, offset + T), numbered.
    """
    T = tokens.shape[1]
    mask = Mask(config.causal, offset, doc_ids)
    if doc_ids is None and (not config.causal or T == 1):
        mask.path = "full"  # a single new token sees everything before it
    elif doc_ids is None and offset == 0:
        mask.path = "causal"
    elif doc_ids is not None and offset == 0 and tokens.device.type == "cpu":
        mask.lengths = document_lengths(doc_ids)
        saved = tokens.numel() * T - sum(length**2 for length in mask.lengths)  # pairs that need not be looked at
        if saved == 0:
            mask.path = "causal" if config.causal else "full"
        elif saved * config.n_heads * config.head_dim > len(mask.lengths) * COST_OF_A_DOCUMENT:
            mask.path = "documents"
        else:
            mask.path = "dense"
    else:
        mask.path = "dense"
    if mask.path == "dense":
        mask.dense = visible(mask, T, tokens.device)
    return mask


def visible(mask: Mask, T: int, device: torch.device) -> Tensor:
    """The rule written out: True where the query sees the key. (B or 1, 1, T, S)"""
    seen = torch.ones(1, 1, T, mask.offset + T, dtype=torch.bool, device=device)
    if mask.causal:
        seen = seen.tril(diagonal=mask.offset)
    if mask.doc_ids is not None:
        seen = seen & (mask.doc_ids[:, None, mask.offset :, None] == mask.doc_ids[:, None, None, :])
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that each query may see.

    Args: q (B, H, T, d); k, v (B, K, S, d), K dividing H: query heads share key/value heads in groups.
    Returns: (B, H, T, d). Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023.
    """
    if mask.path == "reference":
        return attend_reference(q, k, v, mask, dropout)
    if mask.path == "documents":
        return attend_documents(q, k, v, mask, dropout)
    if mask.path == "causal" and q.is_cpu and SLICED_ABOVE < q.shape[2] <= SLICED_UP_TO:
        return attend_in_slices(q, k, v, dropout)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not q.is_cpu and (mask.dense is not None or q.dtype == torch.float32):
        # on a GPU only the flash kernel knows groups, and it takes neither a mask nor fp32
        k, v, grouped = *expand_groups(q, k, v), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.dense, dropout_p=dropout, is_causal=mask.path == "causal", enable_gqa=grouped
    )


def expand_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values copied for each query head of their group. (B, K, S, d) -> (B, H, S, d)"""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """The definition, line by line: what every other path is tested against."""
    k, v = expand_groups(q, k, v)  # (B, H, S, d)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, S)
    seen = visible(mask, q.shape[2], q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout) @ v  # (B, H, T, d)


def attend_in_slices(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention of a quarter of the queries at a time, each quarter over the keys up to its own end."""
    T = q.shape[2]
    size = -(-T // 4)
    slices = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        seen = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(diagonal=start)
        y = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            attn_mask=seen,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        slices.append(y.transpose(1, 2))  # (B, t, H, d), as it lies in memory
    return torch.cat(slices, dim=1).transpose(1, 2)  # (B, H, T, d)


# The lengths differ in every batch: compiled, it would be compiled anew for each. (The public torch.compiler.disable
# does the same, but imports the compiler at once, which takes seconds.)
@torch._disable_dynamo
def attend_documents(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """Attention of each packed document by itself, so that no time goes into pairs that may not see each other."""
    B, H, T, d = q.shape

    def by_document(x: Tensor) -> tuple[Tensor, ...]:
        rows = x.transpose(1, 2).reshape(B * T, -1, d)  # (B*T, H, d): the documents of all rows in one line
        return rows.split(mask.lengths)  # one node for autograd, where slices would be a full-size gradient each

    alone = Mask(mask.causal)
    alone.path = "causal" if mask.causal else "full"
    pieces = [
        attend(*(x.transpose(0, 1)[None] for x in document), alone, dropout)[0].transpose(0, 1)  # (t, H, d)
        for document in zip(by_document(q), by_document(k), by_document(v))
    ]
    return torch.cat(pieces).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)


class Attention(nn.Module):
    """Every token asks (q) what the tokens it sees offer (k), and takes a weighted mean of what they hold (v)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.o_bias)
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
