"""What happens to the gradients between backward and the optimizer's step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_


def gradient_norms(parameters: Iterable[Tensor]) -> Tensor:
    """(P,): the norm of each parameter's gradient, 0 where it has none; the result stays on the device."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = iter(torch._foreach_norm(gradients) if gradients else ())
    found = torch.stack([parameters[0].new_zeros(()) if p.grad is None else next(norms) for p in parameters])
    # of sharded gradients each rank has the norms of its part
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None, each_norm: Tensor | None = None) -> Tensor:
    """Scale the gradients so that their norm, taken over all of them, is at most max_norm; returns the norm before.

    Args: each_norm: the `gradient_norms`, where they are known already.

    The result stays on the device: nothing waits for it. Where it is not finite the gradients stay as they are, so that
    the caller can see which of them is to blame.
    """
    parameters = list(parameters)
    norm = torch.linalg.vector_norm(gradient_norms(parameters) if each_norm is None else each_norm)
    # clip_grads_with_norm_ multiplies by max_norm / (norm + 1e-6), or 1; where looking is free, spare the factor 1
    if max_norm is not None and not (norm.device.type == "cpu" and norm + 1e-6 <= max_norm):
        with_gradient = [p for p in parameters if p.grad is not None]
        clip_grads_with_norm_(with_gradient, max_norm, norm.where(norm.isfinite(), 0))
    return norm


@torch.no_grad()
def add_l1(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: add the gradient of l1 |w|, which is l1 sign(w), in the groups that ask for it."""
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if group["l1"] and parameters:
            torch._foreach_add_([p.grad for p in parameters], torch._foreach_sign(parameters), alpha=group["l1"])


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """What torch's optimizers do with a closure: it computes the loss and its gradients anew."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
