"""What is applied to a model from outside, in this order.

    tensor parallel              each layer is cut over the ranks of the tp axis
    activation checkpointing     what is kept for the backward pass
    compile                      block by block
    FSDP2                        each block's weights are cut over dp_shard, gathered when it is their turn
    memory, and first weights    only now is it known what this rank holds
    DDP                          or: each rank has all weights, and gradients are averaged

The model knows nothing of it; it only has to offer `embed`, `blocks` (each with an `attn`), `norm` and `lm_head`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup
from torch.futures import Future

from minillm.distributed.config import Layout
from minillm.distributed.context import Context
from minillm.distributed.tensor_parallel import apply_tensor_parallel

DDP = nn.parallel.DistributedDataParallel
ONE = Layout("ddp", 1, 1, 1)


def parallelize(
    model: nn.Module,
    activation_checkpointing: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
    *,
    dist: Context | None = None,
    layout: Layout = ONE,
    dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    compress: Literal["none", "bf16"] = "none",
    init: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Apply all that is asked for to a model, in place, and return what is to be called in its stead.

    Args:
        model: on the meta device with `init`, so that no rank ever holds more than its part.
        activation_checkpointing: "selective" recomputes attention in the backward pass, whose activations are many for
            the little work they cost (Korthikanti et al. 2022, section 5); "full" recomputes whole blocks and keeps
            only their inputs.
        dist: with its mesh, which is of this layout; None: one process.
        dtype: of the matrix products, which is what FSDP2 gathers the weights of blocks in.
        reshard_after_forward: free what FSDP2 gathered after forward and gather it again in backward.
        compress: sum gradients in bf16.
        init: fills the parameters, or what this rank holds of them, once they have memory on the device.

    Parameter names stay as they are, seen through `minillm.tensors.parameter_names`.
    """
    if layout.tp > 1:
        if compile and activation_checkpointing == "selective":
            raise ValueError(
                "train.activation_checkpointing: selective cannot be compiled under parallel.tp; choose full or none, "
                "or train.compile false"
            )
        apply_tensor_parallel(model, dist.mesh["tp"])
    checkpoint_and_compile(model, activation_checkpointing, compile, shared=layout.tp > 1)
    # DDP takes no DTensors; FSDP2 over shards of one rank averages their gradients in its stead
    fsdp = layout.dp_replicate * layout.dp_shard > 1 and (layout.strategy != "ddp" or layout.tp > 1)
    if fsdp:
        shard(model, dist, layout, dtype, reshard_after_forward, compress)
    if init is not None:
        model.to_empty(device=dist.device if dist is not None else "cpu")
        init(model)
    if not fsdp and layout.dp_replicate > 1:
        model = replicate(model, dist, compress)
    return model


def checkpoint_and_compile(model: nn.Module, activation_checkpointing: str, compile: bool, shared: bool) -> None:
    """Wrap and compile block by block; `shared`: by tensor-parallel ranks."""
    if activation_checkpointing != "none":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    for index, block in enumerate(model.blocks):
        if activation_checkpointing == "selective":
            block.attn = checkpoint_wrapper(block.attn)
        if compile and shared:  # torch 2.13 cannot compile a checkpoint around DTensors, but one can be put around that
            block.compile()
        if activation_checkpointing == "full":
            block = model.blocks[index] = checkpoint_wrapper(block)
        if compile and not shared:
            block.compile()


def shard(
    model: nn.Module, dist: Context, layout: Layout, dtype: torch.dtype, reshard_after_forward: bool, compress: str
) -> None:
    """FSDP2: each block a unit, and the root with embed, norm and lm_head, which so stay tied where they are.

    Blocks are gathered in the dtype of the matrix products. The root stays in fp32, as its tables are under autocast:
    the residual stream is what it is in one process. Gradients are summed in fp32 unless compressed.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.mesh["dp_shard"] if layout.strategy == "fsdp" else dist.mesh["dp_replicate", "dp_shard"]
    reduce_dtype = torch.bfloat16 if compress == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    root_policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # the root's tables are needed at both ends of forward and at once in backward: they stay
    fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)


def replicate(model: nn.Module, dist: Context, compress: str) -> nn.Module:
    """DDP: gradients are averaged in buckets while the backward pass goes on, and lie in the buckets themselves."""
    wrapped = DDP(model, process_group=dist.dp_group, gradient_as_bucket_view=True)
    if compress == "bf16":
        wrapped.register_comm_hook(dist.dp_group, sum_in_bf16)
    return wrapped


def sum_in_bf16(group: ProcessGroup | None, bucket: GradBucket) -> Future[Tensor]:
    """Torch's hook, which by itself is refused where the backend is gloo, although gloo sums bf16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(group, bucket)


@contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: whether its gradients are the step's last.

    DDP sends them only then. FSDP2 sums over the shards of a copy each time, so that a rank never holds more than its
    part of the gradients, and over the copies (hsdp) only then.
    """
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
    with model.no_sync() if isinstance(model, DDP) and not last else nullcontext():
        yield
