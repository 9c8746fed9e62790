"""LAMB: Adam's direction, each layer's step as long as a share of its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.optim.gradients import run_closure


class Lamb(torch.optim.Optimizer):
    """Steps of length lr |w| along Adam's direction r + weight_decay w, for each parameter tensor by itself.

    m and v are Adam's means with their bias corrections, r = m / (sqrt(v) + eps), and

        w <- w - lr |w| / |r + weight_decay w| (r + weight_decay w)

    where either norm is 0, the ratio is 1. Source: You et al. 2020 (arXiv:1904.00962), algorithm 2 with phi(z) = z.
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_one(parameter, group)
        return loss

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """What is held for a parameter before its first step."""
        step = torch.zeros((), dtype=torch.float32)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self.initial_state(group, parameter)
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] += 1
        t = int(state["step"])
        m = state["exp_avg"].lerp_(parameter.grad, 1 - beta1) / (1 - beta1**t)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2) / (1 - beta2**t)
        update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * parameter
        weight_norm, update_norm = parameter.norm(), update.norm()
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        parameter.sub_(update * (group["lr"] * ratio))
