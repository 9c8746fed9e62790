"""Keys and values of the texts in the making: a slot each, in memory taken once.

    slot 0   k k k k k k k k . . . .        12 tokens fit, 8 are there
    slot 1   k k k . . . . . . . . .
    slot 2   k k k k k k . . . . . .
    slot 3   . . . . . . . . . . . .        free

The model sees the slots in one of two ways. New prompts come packed end to end in one row, and the keys and values of
each go into its slot (`PackedPrompts`). After that the first slots get a token each, at the place where each of them
ends (`NextTokens`).

Shapes: B slots that get a token, K kv heads, T packed tokens, S keys of the longest slot, d head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """The slots of one block. Their memory is taken when the first keys arrive, which say of what kind it is."""

    def __init__(self, rows: int, capacity: int, static: bool):
        self.rows, self.capacity, self.static = rows, capacity, static
        self.k = self.v = torch.empty(0)  # (rows, K, capacity, d)

    def take_memory(self, k: Tensor) -> None:
        """Takes it for keys such as these, once."""
        if not self.k.numel():
            shape = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.k, self.v = k.new_zeros(shape), k.new_zeros(shape)  # what is masked is multiplied by 0: no NaN then
            if self.static:
                torch._dynamo.mark_static_address(self.k)
                torch._dynamo.mark_static_address(self.v)


class PackedPrompts:
    """A block's slots as a row of new prompts sees them: nothing is there yet."""

    length, lengths = 0, None

    def __init__(self, slots: Slots, pieces: Sequence[tuple[int, range]]):
        self.slots = slots
        self.pieces = pieces  # (slot, where its prompt stands in the row)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts each prompt's keys and values, of (1, K, T, d), into its slot; returns them as they are."""
        self.slots.take_memory(k)
        for slot, piece in self.pieces:
            self.slots.k[slot, :, : len(piece)] = k[0, :, piece.start : piece.stop]
            self.slots.v[slot, :, : len(piece)] = v[0, :, piece.start : piece.stop]
        return k, v


class NextTokens:
    """A block's first slots as a step of decoding sees them: a token joins each."""

    def __init__(self, slots: Slots, rows: int, length: int, lengths: Tensor | None):
        self.slots, self.rows = slots, rows
        self.length = length  # of the longest
        self.lengths = lengths  # (B,), or None where all are as long

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new (B, K, 1, d) where each slot ends; returns what the slots hold, (B, K, S, d)."""
        stop = self.length + 1
        all_k, all_v = self.slots.k[: self.rows, :, :stop], self.slots.v[: self.rows, :, :stop]
        if self.lengths is None:
            all_k[:, :, self.length :] = k
            all_v[:, :, self.length :] = v
        else:
            rows = torch.arange(self.rows, device=k.device)
            all_k[rows, :, self.lengths] = k[:, :, 0]
            all_v[rows, :, self.lengths] = v[:, :, 0]
        return all_k, all_v


class KVCache:
    """The slots of all blocks, and how many tokens each holds.

    static: for compiled steps, whose CUDA graphs have to know that the memory will stay where it is.
    """

    def __init__(self, n_layers: int, rows: int, capacity: int, static: bool = False):
        self.capacity = capacity
        self.blocks = [Slots(rows, capacity, static) for _ in range(n_layers)]
        self.lengths = [0] * rows

    def packed_prompts(self, slots: Sequence[int], lengths: Sequence[int]) -> list[PackedPrompts]:
        """What to hand to the model with prompts of these lengths, packed in this order, for these slots."""
        pieces, start = [], 0
        for slot, length in zip(slots, lengths):
            pieces.append((slot, range(start, start + length)))
            self.lengths[slot] = length
            start += length
        return [PackedPrompts(block, pieces) for block in self.blocks]

    def next_tokens(self, rows: int, device: torch.device, padded_rows: int | None = None) -> list[NextTokens]:
        """What to hand to the model with a token for each of the first slots, which hold it from then on.

        padded_rows: for shapes that stay the same from step to step: so many rows, of slots that are as if full; tokens
        of rows beyond the slots in use are forgotten.
        """
        held = self.lengths[:rows]
        self.lengths[:rows] = [length + 1 for length in held]
        if padded_rows is not None:
            places = torch.tensor(held + [0] * (padded_rows - rows), device=device)
            return [NextTokens(block, padded_rows, self.capacity - 1, places) for block in self.blocks]
        differ = min(held) < max(held)
        places = torch.tensor(held, device=device) if differ else None
        return [NextTokens(block, rows, max(held), places) for block in self.blocks]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The targets come to hold what the sources held, all at once: a target may be another's source."""
        pairs = [(source, target) for source, target in zip(sources, targets) if source != target]
        if not pairs:
            return
        sources, targets = (list(slots) for slots in zip(*pairs))
        held = [self.lengths[source] for source in sources]
        for target, length in zip(targets, held):
            self.lengths[target] = length
        for block in self.blocks:
            for memory in (block.k, block.v):
                memory[targets, :, : max(held)] = memory[sources, :, : max(held)]
