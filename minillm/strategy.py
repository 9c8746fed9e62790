"""Which strategy suits a model, a machine and a number of ranks: what `parallel.strategy = auto` means.

The one that sends the least of those that fit, by the estimate of memory. DDP sends each gradient once a step. FSDP2
that keeps the weights between forward and backward (ZeRO-2) gathers them once a micro-batch, and one that frees them
(ZeRO-3) twice. Over several nodes HSDP does that within a node, where links are fast, and sums gradients across.
"""

import dataclasses
import logging
import os

from minillm.distributed.config import Layout, ParallelConfig, layout
from minillm.distributed.context import Context
from minillm.distributed.device import free_memory
from minillm.memory import GIB, Setting, estimate, usable
from minillm.model.config import ModelConfig
from minillm.optim import OptimConfig

logger = logging.getLogger("minillm")


def resolve(
    parallel: ParallelConfig, config: ModelConfig, optim: OptimConfig, setting: Setting, dist: Context
) -> tuple[ParallelConfig, Layout]:
    """The section with auto decided, by the least memory that a rank has, and the layout that it makes.

    The section can be kept: a run that goes on from it, also on other ranks, has the same strategy, and the numbers of
    ranks, where they are left open, follow from how many there are.
    """
    ranks_per_node, free = ranks_here(dist.world_size), free_memory(dist.device)
    if free is not None and dist.device.type == "cpu":
        free //= ranks_per_node  # they share it
    known = not dist.any(free is None)
    room = -dist.max(-usable(free, dist.device.type)) if known else None
    chosen, why = choose_strategy(config, optim, setting, parallel, dist.world_size, ranks_per_node, room)
    shape = layout(chosen, dist.world_size, chosen.strategy, ranks_per_node)
    if dist.world_size == 1:
        return parallel, shape
    if parallel.strategy == "auto":
        logger.info("parallel.strategy auto: %s", why)
    kept = {"strategy": chosen.strategy, "reshard_after_forward": chosen.reshard_after_forward}
    return dataclasses.replace(parallel, **kept), shape


def ranks_here(world_size: int) -> int:
    """How many of the ranks are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def choose_strategy(
    config: ModelConfig,
    optim: OptimConfig,
    setting: Setting,
    parallel: ParallelConfig,
    world_size: int,
    ranks_per_node: int,
    room: int | None,
) -> tuple[ParallelConfig, str]:
    """The section with auto decided, and why, in words; other strategies stay as they are.

    Args: room: bytes of tensors that a rank's device takes (`minillm.memory.usable`); None where it does not tell.
    Raises ValueError where the section's numbers make no layout of so many ranks.
    """
    if parallel.strategy != "auto":
        return parallel, "as parallel.strategy says"
    found = layouts(parallel, world_size, ranks_per_node)
    if world_size == 1:
        return dataclasses.replace(parallel, strategy="ddp"), "one process"
    peaks = [
        estimate(config, optim, dataclasses.replace(setting, reshard_after_forward=reshard), shape).peak
        for shape, reshard in found
    ]
    fits = [i for i, peak in enumerate(peaks) if room is None or peak <= room]
    i = fits[0] if fits else min(range(len(peaks)), key=peaks.__getitem__)
    shape, reshard = found[i]
    why = [f"{layout_name(shape, reshard)} takes {peaks[i] / GIB:.2g} GiB a rank by estimate"]
    if room is None:
        why += ["the device does not say how much it has"]
    elif not fits:
        why += [f"which is the least, but more than the {room / GIB:.2g} that there are"]
    else:
        why += [f"of {room / GIB:.2g}"]
    why += [f"{layout_name(*found[j])} would take {peaks[j] / GIB:.2g}" for j in range(i) if peaks[j] > peaks[i]]
    chosen = dataclasses.replace(
        parallel,
        strategy=shape.strategy,
        dp_replicate=shape.dp_replicate,
        dp_shard=shape.dp_shard,
        reshard_after_forward=reshard,
    )
    return chosen, ", ".join(why)


def layouts(parallel: ParallelConfig, world_size: int, ranks_per_node: int) -> list[tuple[Layout, bool]]:
    """(layout, reshard_after_forward) of each way that the section leaves open; what sends the least comes first.

    Raises ValueError where its numbers make no layout of so many ranks.
    """
    order = ("ddp", "hsdp", "fsdp") if world_size > ranks_per_node else ("ddp", "fsdp", "hsdp")
    auto = parallel.strategy == "auto"
    found, problem = [], None
    for strategy in order if auto else (parallel.strategy,):
        try:
            shape = layout(parallel, world_size, strategy, ranks_per_node)
        except ValueError as error:  # numbers that are another strategy's
            problem = error
            continue
        if auto and strategy == "hsdp" and 1 in (shape.dp_replicate, shape.dp_shard):
            continue  # one of the other two
        if auto and strategy == "ddp" and shape.tp > 1 and shape.dp_replicate > 1:
            continue  # DDP takes no parameters that tensor parallelism has cut
        # what the section says of it counts where it says which strategy
        settings = [False, True] if auto and strategy != "ddp" else [parallel.reshard_after_forward]
        found += [(shape, reshard) for reshard in settings]
    if not found:
        raise problem or ValueError(f"parallel: {parallel} makes no layout of {world_size} ranks")
    return found


def layout_name(shape: Layout, reshard: bool) -> str:
    """A layout in words: hsdp 8 x 8, ZeRO-2."""
    if shape.strategy == "ddp":
        said = "ddp"
    else:
        ranks = shape.dp_shard if shape.strategy == "fsdp" else f"{shape.dp_replicate} x {shape.dp_shard}"
        said = f"{shape.strategy} {ranks} {'ZeRO-3' if reshard else 'ZeRO-2'}"
    return said + (f", tp {shape.tp}" if shape.tp > 1 else "")
