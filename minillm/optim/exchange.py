"""Whole matrices out of parts: each on one rank, so that what needs them whole is divided over the ranks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from minillm.tensors import local_part


class Box(NamedTuple):
    """A part of a matrix: where it begins, and how much it is."""

    row: int
    column: int
    rows: int
    columns: int

    def of(self, matrix: Tensor) -> Tensor:
        """This part of that matrix."""
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]


class Transfer(NamedTuple):
    """A part of the matrix of that index, sent from rank to rank."""

    source: int
    destination: int
    index: int
    box: Box


class Exchange:
    """Sends sharded matrices to ranks that own a share of them as a whole, and the parts of what becomes of them back.

    A rank sends and receives about as much as it holds, once there and once back: two all-to-alls. How the matrices
    are sharded does not matter, evenly or not, over one mesh axis or several, because all ranks tell each other first
    what they hold. So all ranks have to make an Exchange, of the same matrices, and call its methods together.

    Args: work: of each matrix; by it they are divided over the ranks.
    """

    def __init__(self, matrices: Sequence[Tensor], work: Sequence[int]):
        rank, world = torch_dist.get_rank(), torch_dist.get_world_size()
        held = [(*offset, *part.shape) for part, offset in map(local_part, matrices)]
        mine = torch.tensor(held, device=matrices[0].device)  # (P, 4)
        everyones = [torch.empty_like(mine) for _ in range(world)]
        torch_dist.all_gather(everyones, mine)
        boxes = [[Box(*box) for box in of_rank.tolist()] for of_rank in everyones]
        there, back = [], []
        owners = divided(work, world)
        for index, owner in enumerate(owners):
            holders = [(other, boxes[other][index]) for other in range(world)]
            holders = [(other, box) for other, box in holders if box.rows and box.columns]
            # of copies the one nearest to the owner is sent, which most likely is on the same machine
            nearest = {box: other for other, box in sorted(holders, key=lambda one: -abs(one[0] - owner))}
            there += [Transfer(other, owner, index, box) for box, other in nearest.items()]
            back += [Transfer(owner, other, index, box) for other, box in holders]
        self.owned = {index: matrices[index].shape for index, owner in enumerate(owners) if owner == rank}
        self.there, self.back = Route(there, rank, world), Route(back, rank, world)

    def gathered(self, pieces: Sequence[Tensor]) -> dict[int, Tensor]:
        """{index: matrix}: those that this rank owns, from all ranks' parts."""
        wholes = {index: pieces[0].new_empty(shape) for index, shape in self.owned.items()}
        self.there.send(lambda one: pieces[one.index], lambda one: one.box.of(wholes[one.index]), pieces[0])
        return wholes

    def returned(self, wholes: dict[int, Tensor], pieces: Sequence[Tensor]) -> None:
        """Write this rank's part of each matrix into `pieces`, from the ranks that own them."""
        self.back.send(lambda one: one.box.of(wholes[one.index]), lambda one: pieces[one.index], pieces[0])


class Route:
    """An all-to-all of parts of matrices: of all transfers those in which this rank takes part."""

    def __init__(self, transfers: Sequence[Transfer], rank: int, world: int):
        # between two ranks both have them in the same order
        self.out = sorted((one for one in transfers if one.source == rank), key=lambda one: one.destination)
        self.into = sorted((one for one in transfers if one.destination == rank), key=lambda one: one.source)
        self.sent, self.received = [0] * world, [0] * world  # how many numbers to and from each rank
        for one in self.out:
            self.sent[one.destination] += one.box.rows * one.box.columns
        for one in self.into:
            self.received[one.source] += one.box.rows * one.box.columns

    def send(self, read: Callable[[Transfer], Tensor], write: Callable[[Transfer], Tensor], like: Tensor) -> None:
        """Write at the destination what is read at the source; `like` has the dtype and device of it all."""
        sent, received = like.new_empty(sum(self.sent)), like.new_empty(sum(self.received))
        for one, place in zip(self.out, cut(sent, self.out)):
            place.copy_(read(one))
        torch_dist.all_to_all_single(received, sent, self.received, self.sent)
        for one, place in zip(self.into, cut(received, self.into)):
            write(one).copy_(place)


def cut(buffer: Tensor, transfers: Sequence[Transfer]) -> list[Tensor]:
    """The place of each transfer's part in a buffer that holds them one after the other."""
    places = buffer.split([one.box.rows * one.box.columns for one in transfers])
    return [place.view(one.box.rows, one.box.columns) for one, place in zip(transfers, places)]


def divided(work: Sequence[int], ranks: int) -> list[int]:
    """A rank for each piece of work, so that all have about as much: the longest first, to who has least so far."""
    owners, load = [0] * len(work), [0] * ranks
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += work[index]
    return owners
