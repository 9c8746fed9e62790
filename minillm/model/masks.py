"""Who sees whom: one rule, written out, and the plain definition of attention that every fast path is tested against.

Shapes: B batch, T queries, S keys (T, or more where a cache holds earlier ones), H heads, K key/value heads,
d head_dim.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Path = Literal["reference", "full", "causal", "window", "documents", "varlen", "flex", "dense"]


class Mask:
    """Who sees whom, for all blocks with the same window: made once a forward by `make_masks`.

    The rule: query i, which stands at `offset + i` among the keys, sees key j if j <= offset + i (where `causal`), if
    they are less than `window` apart (where there is one), and if both are in the same document (where there are
    `doc_ids`). Where rows of a cache hold different numbers of keys, the queries of row b stand at `offsets[b] + i`.
    `path` says how `attend` carries that out; what follows it is what that path needs.
    """

    def __init__(
        self,
        causal: bool,
        offset: int = 0,
        doc_ids: Tensor | None = None,
        window: int | None = None,
        offsets: Tensor | None = None,
    ):
        self.causal = causal
        self.offset = offset
        self.doc_ids = doc_ids  # (B, S), numbered
        self.window = window
        self.offsets = offsets  # (B,), none greater than offset
        self.path: Path = "reference"
        self.dense: Tensor | None = None  # (B or 1, 1, T, S), True where the query sees the key; for the dense path
        self.lengths: list[int] = []  # of each document, row after row; for the documents path
        self.borders: Tensor | None = None  # (documents + 1,) int32, in one line of B * T tokens; for the varlen path
        self.options: dict[str, Any] = {}  # of torch's function; for the varlen path
        self.blocks: Any = None  # a BlockMask; for the flex path


def visible(mask: Mask, queries: range, keys: range, device: torch.device) -> Tensor:
    """The rule written out, for some of the queries and keys by their place among the keys: True where one sees the
    other. (B or 1, 1, queries, keys)
    """
    seen = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
    itself = queries.start - keys.start  # the diagonal on which a query meets its own key
    if mask.offsets is not None:
        own = mask.offsets[:, None] + torch.arange(queries.start, queries.stop, device=device) - mask.offset  # (B, T)
        before = own[:, None, :, None] - torch.arange(keys.start, keys.stop, device=device)  # (B, 1, T, S)
        seen = (before >= 0) & (before < (mask.window or len(keys)))
    elif mask.causal:
        seen = seen.tril(itself)
    if mask.window is not None and mask.offsets is None:
        seen = seen.tril(itself + mask.window - 1).triu(itself - mask.window + 1)
    if mask.doc_ids is not None:
        of_queries = mask.doc_ids[:, None, queries.start : queries.stop, None]
        seen = seen & (of_queries == mask.doc_ids[:, None, None, keys.start : keys.stop])
    return seen


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """The definition, line by line: what every other path is tested against."""
    T, S = q.shape[2], k.shape[2]
    k, v = expand_groups(q, k, v)  # (B, H, S, d)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, S)
    seen = visible(mask, range(mask.offset, mask.offset + T), range(S), q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout) @ v  # (B, H, T, d)


def expand_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values copied for each query head of their group. (B, K, S, d) -> (B, H, S, d)"""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


# --- documents --------------------------------------------------------------------------------------------------------


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


def document_borders(doc_ids: Tensor) -> Tensor:
    """Where documents begin and end with the rows in one line: 0, ..., B * S. (B, S) -> (documents + 1,) int32

    How many there are has to be read from the device: on an accelerator the host waits for it.
    """
    starts = document_starts(doc_ids).flatten().nonzero().flatten()  # (documents,)
    return F.pad(starts, (0, 1), value=doc_ids.numel()).int()


def document_lengths(doc_ids: Tensor) -> list[int]:
    """Length of each document, row after row."""
    return [stop - start for start, stop in pairwise(document_borders(doc_ids).tolist())]
