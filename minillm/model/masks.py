"""Who sees whom: one rule, written out, and the plain definition of attention that every fast path is tested against.

Shapes: B batch, T queries, S keys (T, or more where a cache holds earlier ones), H heads, K key/value heads,
d head_dim.
"""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Path = Literal["reference", "full", "causal", "window", "documents", "varlen", "flex", "dense"]


class Segment(NamedTuple):
    """Queries side by side that see the same: a prompt before them, and themselves. Places in one line of all rows."""

    prompt: range
    queries: range

    @property
    def n_keys(self) -> int:
        return len(self.prompt) + len(self.queries)


class Mask:
    """Who sees whom, for all blocks with the same window: made once a forward by `make_masks`.

    The rule: query i, which stands at `offset + i` among the keys, sees key j if j <= offset + i (where `causal`), if
    they are less than `window` apart (where there is one), and if both are in the same document (where there are
    `doc_ids`) and j is in its prompt, branch 0, or in the branch of i (where there are `branches`, with which a window
    counts in positions, as if a branch followed its prompt). Where rows of a cache hold different numbers of keys, the
    queries of row b stand at `offsets[b] + i`. `path` says how `attend` carries that out; what follows it is what that
    path needs.
    """

    def __init__(
        self,
        causal: bool,
        offset: int = 0,
        doc_ids: Tensor | None = None,
        window: int | None = None,
        offsets: Tensor | None = None,
        branches: Tensor | None = None,
    ):
        self.causal = causal
        self.offset = offset
        self.doc_ids = doc_ids  # (B, S), numbered
        self.window = window
        self.offsets = offsets  # (B,), none greater than offset
        self.branches = branches  # (B, S), numbered, with doc_ids
        self.path: Path = "reference"
        self.dense: Tensor | None = None  # (B or 1, 1, T, S), True where the query sees the key; for the dense path
        self.segments: list[Segment] = []  # which together hold every query once; for the documents path
        self.within: list[Mask] = []  # the rule within each segment; for the documents path
        self.key_places: Tensor | None = None  # (keys,) of each segment, prompts copied; where there are branches
        self.borders: Tensor | None = None  # (segments + 1,) int32, in one line of B * T tokens; for the varlen path
        self.key_borders: Tensor | None = None  # (segments + 1,) int32, in the line of their keys; for the varlen path
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

    def of_both(numbers: Tensor) -> tuple[Tensor, Tensor]:
        return numbers[:, None, queries.start : queries.stop, None], numbers[:, None, None, keys.start : keys.stop]

    if mask.window is not None and mask.branches is not None:
        of_queries, of_keys = of_both(restart_positions(mask.doc_ids, mask.branches))
        seen = seen & ((of_queries - of_keys).abs() < mask.window)
    elif mask.window is not None and mask.offsets is None:
        seen = seen.tril(itself + mask.window - 1).triu(itself - mask.window + 1)
    if mask.doc_ids is not None:
        of_queries, of_keys = of_both(mask.doc_ids)
        seen = seen & (of_queries == of_keys)
    if mask.branches is not None:
        of_queries, of_keys = of_both(mask.branches)
        seen = seen & ((of_keys == 0) | (of_queries == of_keys))
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


def number_branches(branches: Tensor, doc_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Documents and branches of each row, numbered so that each document is a prompt, 0, and then its branches.

    A branch is a run of equal numbers, so that one that comes back is another; each is given a number of its own in the
    row. A prompt begins a document, also where `doc_ids` do not say so. (B, S) -> two of (B, S)
    """
    changes = document_starts(branches)
    starts = document_starts(torch.zeros_like(branches) if doc_ids is None else doc_ids) | (changes & (branches == 0))
    numbers = (starts | changes).cumsum(dim=1)  # of the runs, from 1
    return starts.cumsum(dim=1) - 1, torch.where(branches == 0, 0, numbers)


def restart_positions(doc_ids: Tensor, branches: Tensor | None = None) -> Tensor:
    """Positions that count from 0 in each document, and in each of its branches on from the end of the prompt.

    (B, S) -> (B, S)
    """
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)

    def last(places: Tensor) -> Tensor:
        return torch.where(places, index, 0).cummax(dim=1).values  # (B, S): the last of these places up to here

    starts = document_starts(doc_ids)
    positions = index - last(starts)
    if branches is None:
        return positions
    after_prompt = F.pad(branches[:, :-1] == 0, (1, 0), value=True) | starts
    branch, first_branch = last(document_starts(branches) | starts), last(after_prompt & (branches != 0))
    return torch.where(branches == 0, positions, positions - branch + first_branch)


def document_borders(doc_ids: Tensor) -> Tensor:
    """Where documents begin and end with the rows in one line: 0, ..., B * S. (B, S) -> (documents + 1,) int32

    How many there are has to be read from the device: on an accelerator the host waits for it.
    """
    starts = document_starts(doc_ids).flatten().nonzero().flatten()  # (documents,)
    return F.pad(starts, (0, 1), value=doc_ids.numel()).int()


def find_segments(mask: Mask) -> list[Segment]:
    """The segments of all rows, one after another: documents, or where there are branches the parts of each document.

    These are prompt and first branch together, where the mask is causal, and each further branch behind the prompt.
    """
    borders = document_borders(mask.doc_ids)  # of documents
    if mask.branches is None:
        return [Segment(range(0), range(*border)) for border in pairwise(borders.tolist())]
    documents = set(borders.tolist())
    runs = document_borders(mask.doc_ids + mask.branches * mask.doc_ids.shape[1])  # no two neighbours have the same sum
    in_prompt = (mask.branches.flatten()[runs[:-1]] == 0).tolist()
    segments: list[Segment] = []
    for border, of_prompt in zip(pairwise(runs.tolist()), in_prompt):
        run = range(*border)
        if run.start in documents:
            prompt = run if of_prompt else range(0)
            segments.append(Segment(range(0), run))
        elif mask.causal and segments[-1].queries == prompt:
            segments[-1] = Segment(range(0), range(prompt.start, run.stop))
        else:
            segments.append(Segment(prompt, run))
    return segments


def places_of_keys(segments: list[Segment], device: torch.device) -> Tensor:
    """Where the keys of each segment are, one segment after another: those of a prompt once for each. (keys,)"""
    return torch.cat([torch.arange(part.start, part.stop) for segment in segments for part in segment]).to(device)
