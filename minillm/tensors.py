"""Parameters as they were named and shaped before anything was put around them or cut into parts.

What is applied from outside wraps modules, which changes the names of their parameters, and shards tensors, so that a
rank holds a part of each. Whoever saves, starts or optimises a model sees through both here.
"""

from collections.abc import Sequence

from torch import Tensor, nn

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, or itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names they had before any wrapping; tied ones once."""
    named = {}
    for name, parameter in unwrapped(model).named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = parameter
    return named


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. (Asked by what it has: to import its class takes most of a second.)"""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in the whole it begins; a plain tensor is here wholly.

    The part shares the tensor's memory. It is empty where there are more ranks than rows.
    """
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def narrowed(whole: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The part of a tensor that begins at `offset` and has that shape, sharing its memory."""
    for dim, (start, length) in enumerate(zip(offset, shape)):
        whole = whole.narrow(dim, start if length else 0, length)
    return whole
