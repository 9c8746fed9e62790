"""Saving while training goes on: copy what is to be saved, return, and let a thread write the copy.

    step  step  save: copy | step  step  step  step  poll: all are done | step ...
                            `--- write, fsync, agree, rename: a thread --'

The copy is made in host memory that is kept from save to save, pinned where it comes from an accelerator. The threads
of the ranks agree over links of their own, so that their messages never meet those of training. A checkpoint is
complete when it is committed, as ever; what goes wrong before that is raised in the training loop, on all ranks alike.
"""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minillm.checkpoint.layout import Held, Layout, held_here, lay_out, own_pieces
from minillm.checkpoint.manifest import spell
from minillm.checkpoint.ranks import on_every_rank, on_main
from minillm.checkpoint.series import commit, folder_of
from minillm.distributed.context import Context, beside_training
from minillm.distributed.device import synchronize

PATIENCE = 3600.0  # seconds that a rank waits for the disk of another
GRACE = 5.0  # seconds that a program which ends with an error waits for a checkpoint that is being written

logger = logging.getLogger("minillm")


class Saver:
    """Saves checkpoints as `checkpoint.save` does; with `background`, `save` returns when it has a copy of the tensors.

    At most one is being written at a time. All ranks make the same calls in the same order. As a `with` block, it ends
    when everything is on the disk, but after an error it waits for that only a moment.
    """

    def __init__(self, dist: Context, background: bool = False):
        self.training, self.dist = dist, beside_training(dist, PATIENCE)
        self.background = background
        self.held: Held | None = None
        self.layout: Layout | None = None
        self.staging: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self,
        directory: str | Path,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict,
        keep_last: int = 0,
        best_step: int | None = None,
    ) -> Path:
        """Where the checkpoint is, or will be. Raises what went wrong with this one, or in the background before."""
        self.wait()
        layout = self.layout_of(tensors)
        own = own_pieces(layout, tensors, self.dist.rank)
        spelled = on_main(self.dist, lambda: spell(state))
        if not self.background:
            return commit(directory, step, layout, own, spelled, keep_last, best_step, self.dist)
        on_every_rank(self.dist, lambda: self.stage(own))

        def write() -> None:
            try:
                commit(directory, step, layout, self.staging, spelled, keep_last, best_step, self.dist)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=write, name=f"save step {step}", daemon=True)
        self.thread.start()
        return folder_of(directory, step)

    def layout_of(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Who writes what: worked out once, since the ranks go on holding what they hold."""
        held = held_here(tensors)
        if self.dist.any(held != self.held):
            self.held, self.layout = held, lay_out(held, self.dist)
        return self.layout

    def stage(self, own: Mapping[str, Tensor]) -> None:
        """Copy this rank's pieces into host memory, into that of the last save where it fits."""
        kept = self.staging
        self.staging = {
            name: kept[name]
            if name in kept and kept[name].shape == piece.shape and kept[name].dtype == piece.dtype
            else host_memory_for(piece)
            for name, piece in own.items()
        }
        for name, piece in own.items():
            self.staging[name].copy_(piece, non_blocking=True)
        synchronize(self.training.device)

    def poll(self) -> None:
        """Raise what went wrong in the background, as soon as all ranks are done; for every step of training.

        The ranks communicate only while something is being written.
        """
        if self.thread is not None and not self.training.any(self.thread.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written any more; raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is not None:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join(GRACE)
            if self.error is not None or self.thread.is_alive():
                logger.warning("%s: not finished (%s)", self.thread.name, self.error or "the program ends before")


def host_memory_for(piece: Tensor) -> Tensor:
    """Room for a piece in host memory; pinned, for a fast copy, where the piece is on a device that can do that."""
    if piece.device.type != "cpu":
        try:
            return torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
        except RuntimeError:
            logger.debug("no pinned memory for %s", piece.device)
    return torch.empty(piece.shape, dtype=piece.dtype)
