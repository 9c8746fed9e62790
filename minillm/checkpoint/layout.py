"""Which rank writes what: every element of every tensor once, the bytes dealt out evenly among those who hold them.

A rank holds a part of each tensor: the whole of it under DDP, some rows under FSDP2, some columns under tensor
parallel. What several ranks hold alike is laid end to end like a rope and cut into equal lengths, at whole rows:

    rank 0 | embed ......... blocks.0 .. |        2 ranks of DDP: each writes half of the bytes, and only the tensor
    rank 1 |   .. blocks.1 ....... norm  |        at the cut becomes two pieces
"""

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from minillm.checkpoint.ranks import on_every_rank
from minillm.distributed.context import Context
from minillm.tensors import local_part, narrowed


class Box(NamedTuple):
    """A part of a tensor: where it begins in the whole, and how far it goes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, other: "Box") -> "Box":
        """The same part, counted from where another begins."""
        return Box(tuple(a - b for a, b in zip(self.offset, other.offset)), self.shape)


class Layout(NamedTuple):
    """What is written of a run's tensors, and by whom."""

    tensors: dict[str, tuple[Any, list[int]]]  # dtype and shape of each, tied ones once
    pieces: dict[str, list[tuple[int, Box]]]  # the pieces of each, and the rank that writes it


class Held(NamedTuple):
    """What this rank holds: dtype and global shape of each tensor, tied ones once, and its part of each."""

    tensors: dict[str, tuple[Any, list[int]]]
    parts: list[Box]


def held_here(tensors: Mapping[str, Tensor]) -> Held:
    """What is to be laid out."""
    firsts = {group[0]: tensors[group[0]] for group in tied_groups(tensors)}  # one memory is stored once
    described = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in firsts.items()}
    return Held(described, [Box(offset, tuple(part.shape)) for part, offset in map(local_part, firsts.values())])


def lay_out(held: Held, dist: Context) -> Layout:
    """Deal out what the ranks hold. Raises ValueError where they do not hold parts of the same tensors."""
    described, parts = held
    kinds = list(dict.fromkeys(parts))  # few: blocks are alike, and so are the parts that a rank has of them
    number = {kind: i for i, kind in enumerate(kinds)}
    digest = hashlib.sha256(json.dumps([(name, str(d), s) for name, (d, s) in described.items()]).encode()).hexdigest()
    answers = on_every_rank(dist, lambda: [digest, kinds, [number[part] for part in parts]])
    for rank, (other, *_) in enumerate(answers):
        if other != answers[0][0]:
            raise ValueError(f"rank {rank} has other tensors than rank 0; they cannot make up one checkpoint")
    all_boxes = [[Box(tuple(offset), tuple(shape)) for offset, shape in kinds] for _, kinds, _ in answers]
    all_parts = [[boxes[i] for i in numbers] for boxes, (_, _, numbers) in zip(all_boxes, answers)]
    return Layout(described, deal(described, all_parts))


def tied_groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that stand for the same memory, together, in the order of the first of each."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        part, _ = local_part(tensor)
        # without memory of its own (empty, or on the meta device) only the object itself tells
        held = part.numel() and not part.is_meta
        place = (part.device, part.data_ptr(), part.dtype, tuple(tensor.shape), part.stride()) if held else id(tensor)
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def deal(
    described: Mapping[str, tuple[Any, Sequence[int]]], parts: Sequence[Sequence[Box]]
) -> dict[str, list[tuple[int, Box]]]:
    """The pieces of each tensor with the rank that writes each, where parts[r] is what rank r holds of every tensor."""
    pieces: dict[str, list[tuple[int, Box]]] = {}
    ropes: dict[tuple[int, ...], list[tuple[str, Box, int]]] = {}  # by the ranks that hold the same
    holders = functools.cache(holders_of)  # ranks may be many, but tensors are alike
    for (name, (dtype, shape)), boxes in zip(described.items(), zip(*parts), strict=True):
        if not math.prod(shape):
            pieces[name] = [(0, Box((0,) * len(shape), tuple(shape)))]
            continue
        alone, together = holders(boxes)
        pieces[name] = [*alone]
        for box, ranks in together:
            ropes.setdefault(ranks, []).append((name, box, dtype.itemsize))
    for ranks, rope in ropes.items():
        total = sum(itemsize * math.prod(box.shape) for _, box, itemsize in rope)
        at = 0  # bytes of the rope before the tensor
        for name, box, itemsize in rope:
            rows, *rest = box.shape or (1,)
            row = itemsize * math.prod(rest)
            # rank k of n writes the rows that begin from k / n of the rope on, up to (k + 1) / n
            begins = [-((at * len(ranks) - k * total) // (row * len(ranks))) for k in range(len(ranks) + 1)]
            begins = [min(max(begin, 0), rows) for begin in begins]
            for rank, begin, end in zip(ranks, begins, begins[1:]):
                if begin < end:
                    pieces[name].append((rank, rows_of(box, begin, end)))
            at += rows * row
    return pieces


def holders_of(boxes: Sequence[Box]) -> tuple[list[tuple[int, Box]], list[tuple[Box, tuple[int, ...]]]]:
    """Of what each rank holds of a tensor: the parts that one rank alone holds, and those that several hold alike."""
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(boxes):
        if math.prod(box.shape):
            holders.setdefault(box, []).append(rank)
    alone = [(ranks[0], box) for box, ranks in holders.items() if len(ranks) == 1]
    return alone, [(box, tuple(ranks)) for box, ranks in holders.items() if len(ranks) > 1]


def rows_of(box: Box, begin: int, end: int) -> Box:
    """Some of the rows of a box; a number has one, itself."""
    if not box.shape or end - begin == box.shape[0]:
        return box
    return Box((box.offset[0] + begin, *box.offset[1:]), (end - begin, *box.shape[1:]))


def own_pieces(layout: Layout, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What this rank writes: of each tensor that it has a piece of, that piece, a view of its memory."""
    own = {}
    for name, pieces in layout.pieces.items():
        for writer, box in pieces:
            if writer == rank:
                part, offset = local_part(tensors[name].detach())
                own[name] = narrowed(part, *box.within(Box(offset, tuple(part.shape))))
    return own


def make_up(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether boxes make up a whole: no overlap, no gap.

    A box is known by its corners with alternating signs: summed up from the origin, they give 1 inside and 0 outside.
    So boxes make up the whole exactly where their corners cancel out to those of the whole.
    """
    signs = list(itertools.product((0, 1), repeat=len(shape)))
    corners: Counter[tuple[int, ...]] = Counter()
    for weight, (offset, size) in [(-1, Box((0,) * len(shape), tuple(shape))), *((1, box) for box in boxes)]:
        if math.prod(size):
            for far in signs:
                corner = tuple(a + n * side for a, n, side in zip(offset, size, far))
                corners[corner] += -weight if sum(far) % 2 else weight
    return not any(corners.values())


def intersection(a: Box, b: Box) -> Box | None:
    """What two parts of a tensor have in common; None where that is nothing."""
    offset = tuple(map(max, a.offset, b.offset))
    ends = [min(p + n, q + m) for p, n, q, m in zip(a.offset, a.shape, b.offset, b.shape)]
    shape = tuple(end - begin for begin, end in zip(offset, ends))
    return Box(offset, shape) if all(n > 0 for n in shape) else None
