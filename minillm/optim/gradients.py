"""What happens to the gradients between backward and the optimizer's step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from minillm.optim.sharded import parts, whole_norms
from minillm.tensors import is_sharded


@torch.no_grad()
def gradient_norms(parameters: Iterable[Tensor]) -> Tensor:
    """(P,): the norm of each parameter's gradient, 0 where it has none; the result stays on the device.

    It is a plain tensor, equal on all ranks, also where they hold parts of the parameters.
    """
    parameters = list(parameters)
    with_gradient = [p for p in parameters if p.grad is not None]
    gradients = parts([p.grad for p in with_gradient])
    norms = iter(whole_norms(gradients, with_gradient) if gradients else ())
    zero = parts(parameters[:1])[0].new_zeros(())
    return torch.stack([zero if p.grad is None else next(norms) for p in parameters])


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None, each_norm: Tensor | None = None) -> Tensor:
    """Scale the gradients so that their norm, taken over all of them, is at most max_norm; returns the norm before.

    Args: each_norm: the `gradient_norms`, where they are known already.

    The result stays on the device: nothing waits for it. Where it is not finite the gradients stay as they are, so that
    the caller can see which of them is to blame.
    """
    parameters = list(parameters)
    norm = torch.linalg.vector_norm(gradient_norms(parameters) if each_norm is None else each_norm)
    gradients = parts([p.grad for p in parameters if p.grad is not None])
    # the factor is at most 1; where looking is free, spare it
    if gradients and max_norm is not None and not (norm.device.type == "cpu" and norm + 1e-6 <= max_norm):
        factor = (max_norm / (norm.where(norm.isfinite(), 0) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
    return norm


@torch.no_grad()
def unscale_(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Divide the gradients by the loss's scale; all ranks agree on whether any of them is not finite.

    Left to itself GradScaler asks the ranks that share the first parameter, which another may be sharded over too.
    """
    scaler.unscale_(optimizer)
    if scaler.is_enabled() and any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        for found in scaler._found_inf_per_device(optimizer).values():
            torch_dist.all_reduce(found, torch_dist.ReduceOp.MAX)


@torch.no_grad()
def add_l1(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: add the gradient of l1 |w|, which is l1 sign(w), in the groups that ask for it."""
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if group["l1"] and parameters:
            gradients = parts([p.grad for p in parameters])
            torch._foreach_add_(gradients, torch._foreach_sign(parts(parameters)), alpha=group["l1"])


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """What torch's optimizers do with a closure: it computes the loss and its gradients anew."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
