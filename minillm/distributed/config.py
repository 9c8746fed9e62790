"""The `parallel` section: how the ranks of a run divide its work and its memory."""

from dataclasses import dataclass
from typing import Annotated, Literal

Strategy = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share a run; one process needs none of it."""

    strategy: Annotated[
        Literal["auto", "ddp", "fsdp", "hsdp"],
        "ddp: each rank a whole model; fsdp: each a shard; hsdp: shards within groups that are copies; auto: what fits",
    ] = "auto"
    dp_replicate: Annotated[int | None, "copies of the model; none: as the strategy has it", ">= 1"] = None
    dp_shard: Annotated[int | None, "ranks that a copy is cut over; none: as the strategy has it", ">= 1"] = None
    tp: Annotated[int, "ranks that compute each layer together, on one batch", ">= 1"] = 1
    reshard_after_forward: Annotated[
        bool, "fsdp: free a block's weights between forward and backward (ZeRO-3), or keep them (false: ZeRO-2)"
    ] = True
    compress: Annotated[Literal["none", "bf16"], "send gradients in half the bytes, summed in bf16"] = "none"
    timeout: Annotated[float, "seconds that a rank waits for the others before the run ends", "> 0"] = 600.0


@dataclass(frozen=True)
class Layout:
    """A strategy with its numbers: dp_replicate x dp_shard x tp ranks."""

    strategy: Strategy
    dp_replicate: int
    dp_shard: int
    tp: int


def layout(config: ParallelConfig, world_size: int, strategy: Strategy, ranks_per_node: int) -> Layout:
    """The ranks along each axis, from what the config says and leaves open. Raises ValueError where it cannot be.

    Args: strategy: config's, or what was chosen for auto. ranks_per_node: what a copy of hsdp is cut over by default.
    """
    tp, replicate, shard = config.tp, config.dp_replicate, config.dp_shard
    if world_size % tp:
        raise ValueError(f"parallel.tp: {tp} does not divide the {world_size} ranks")
    dp_size = world_size // tp
    if strategy == "ddp":
        fixed, replicate, shard = {"dp_shard": shard}, replicate or dp_size, 1
    elif strategy == "fsdp":
        fixed, replicate, shard = {"dp_replicate": replicate}, 1, shard or dp_size
    else:
        fixed = {}
        if replicate is None and shard is None:
            shard = max(1, min(dp_size, ranks_per_node // tp))
        replicate = replicate or max(1, dp_size // shard)
        shard = shard or max(1, dp_size // replicate)
    for name, given in fixed.items():
        if given not in (None, 1):
            raise ValueError(f"parallel.{name}: {given} with strategy {strategy}; both together are strategy hsdp")
    if replicate * shard * tp != world_size:
        raise ValueError(
            f"parallel: dp_replicate {replicate} x dp_shard {shard} x tp {tp} are {replicate * shard * tp} ranks, "
            f"but {world_size} were started; dp_replicate and dp_shard none follow from them"
        )
    return Layout(strategy, replicate, shard, tp)
