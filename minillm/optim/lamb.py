"""LAMB: Adam's direction, each layer's step as long as a share of its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.optim.gradients import run_closure
from minillm.optim.sharded import batched, parts, whole_norms

MAX_ELEMENTS = 2**25  # that are updated at once, which bounds the memory that this takes


class Lamb(torch.optim.Optimizer):
    """Steps of length lr |w| along Adam's direction r + weight_decay w, for each parameter tensor by itself.

    m and v are Adam's means with their bias corrections, r = m / (sqrt(v) + eps), and

        w <- w - lr |w| / |r + weight_decay w| (r + weight_decay w)

    where either norm is 0, the ratio is 1. Of a parameter that ranks hold in parts both norms are those of the whole.
    Source: You et al. 2020 (arXiv:1904.00962), algorithm 2 with phi(z) = z.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = run_closure(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.initial_state(group, parameter)
            for batch in batched(parameters, MAX_ELEMENTS):
                self.step_batch(batch, group)
        return loss

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """What is held for a parameter before its first step."""
        step = torch.zeros((), dtype=torch.float32)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def step_batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states, (beta1, beta2) = [self.state[p] for p in parameters], group["betas"]
        weights, gradients = parts(parameters), parts([p.grad for p in parameters])
        m, v = (parts([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [int(state["step"]) for state in states]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(v, [1 - beta2**t for t in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(m, [1 - beta1**t for t in steps])
        torch._foreach_div_(updates, roots)
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        weight_norms, update_norms = whole_norms([*weights, *updates], [*parameters, *parameters]).chunk(2)
        both = (weight_norms > 0) & (update_norms > 0)
        lengths = group["lr"] * torch.where(both, weight_norms / update_norms, 1.0)
        torch._foreach_mul_(updates, lengths.unbind())
        torch._foreach_sub_(weights, updates)
