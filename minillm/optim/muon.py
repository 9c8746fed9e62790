"""Muon: the momentum of a matrix, orthogonalised."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.optim.adamw import adamw

from minillm.optim.exchange import Exchange
from minillm.optim.gradients import run_closure
from minillm.optim.sharded import batched, parts
from minillm.tensors import is_sharded

# A quintic whose repeated application brings every singular value in (0, 1] near 1: Jordan 2024,
# https://kellerjordan.github.io/posts/muon/. It ends between 0.7 and 1.2, which trains as well as exactly 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# An orthogonal update has the root mean square 1/sqrt(larger side); AdamW's is about 0.2. With this factor AdamW's lr
# and weight decay serve for Muon (Liu et al. 2025, arXiv:2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2
# Matrices are stacked to keep a device busy with small ones; large ones do that alone and only cost memory.
MAX_STACKED_ELEMENTS = 2**25
# Of sharded matrices so many numbers a rank are on their way at once, which bounds the memory that this takes.
MAX_SENT_ELEMENTS = 2**27


class Muon(torch.optim.Optimizer):
    """Muon for groups named "muon", AdamW for all others.

    Muon keeps a running mean of the gradient and steps along the nearest orthogonal matrix: all directions of the
    matrix move equally far, also those that the gradient barely touches. A step of lr has the same root mean square
    as AdamW's, so both take the same learning rate.

    Only the orthogonal matrix needs a whole one; all else, and the state, stays in the parts that ranks hold. Each rank
    orthogonalises its share of the matrices (see Exchange).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"fused": fused})
        self.batches: dict[tuple[int, ...], list[tuple[list[Tensor], Exchange]]] = {}  # see `exchanges`
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["name"] == "muon" and parameter.ndim != 2:
                    raise ValueError(f"Muon updates matrices; this parameter has shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = run_closure(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.initial_state(group, parameter)
            if parameters and group["name"] == "muon":
                self.step_muon(parameters, group)
            elif parameters:
                self.step_adamw(parameters, group)
        return loss

    def initial_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """What is held for a parameter before its first step."""
        if group["name"] == "muon":
            return {"momentum_buffer": torch.zeros_like(parameter)}
        # the fused kernel counts steps where the parameter is; the other counts on the CPU
        device = parameter.device if group["fused"] else torch.device("cpu")
        return {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        whole = [p for p in parameters if not is_sharded(p)]
        if whole:
            self.apply(whole, orthogonalized(self.directions(whole, group)), group)
        for batch, exchange in self.exchanges([p for p in parameters if is_sharded(p)]):
            pieces = self.directions(batch, group)
            wholes = exchange.gathered(pieces)
            exchange.returned(dict(zip(wholes, orthogonalized(list(wholes.values())))), pieces)
            self.apply(batch, pieces, group)

    def exchanges(self, parameters: list[Tensor]) -> list[tuple[list[Tensor], Exchange]]:
        """Sharded matrices in batches of which each rank can take its share at once; made anew for new ones only."""
        key = tuple(id(p) for p in parameters)
        if parameters and key not in self.batches:
            batches = batched(parameters, MAX_SENT_ELEMENTS * torch_dist.get_world_size())
            self.batches[key] = [(batch, Exchange(batch, [work(p.shape) for p in batch])) for batch in batches]
        return self.batches.get(key, [])

    def directions(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What this rank's parts of the momenta are, a step ahead, in the dtype that they are orthogonalised in."""
        gradients = parts([p.grad for p in parameters])
        momenta = parts([self.state[p]["momentum_buffer"] for p in parameters])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        return [direction.to(orthogonalization_dtype(direction)) for direction in ahead]

    def apply(self, parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        weights = parts(parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for parameter, weight, update in zip(parameters, weights, updates):
            weight.add_(update, alpha=-group["lr"] * MUON_UPDATE_RMS * math.sqrt(max(parameter.shape)))

    def step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            parts(parameters),
            parts([p.grad for p in parameters]),
            parts([state["exp_avg"] for state in states]),
            parts([state["exp_avg_sq"] for state in states]),
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def work(shape: torch.Size) -> int:
    """How much work a matrix of that shape is to orthogonalise: products of one round of `newton_schulz`."""
    rows, columns = sorted(shape)
    return rows * rows * (2 * columns + rows)


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Near each matrix U S V^T the orthogonal U V^T; matrices of one shape, or its transpose, go through together."""
    together: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        together.setdefault((*sorted(matrix.shape), matrix.device, matrix.dtype), []).append(i)
    results = list(matrices)
    for (rows, columns, *_), members in together.items():
        size = max(1, MAX_STACKED_ELEMENTS // (rows * columns))
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            wide = torch.stack([matrices[i] if matrices[i].shape[0] == rows else matrices[i].mT for i in batch])
            for i, result in zip(batch, newton_schulz(wide)):
                results[i] = result if matrices[i].shape[0] == rows else result.mT
    return results


def newton_schulz(x: Tensor) -> Tensor:
    """Bring all singular values of (n, rows, columns) matrices near 1; rows <= columns makes the products small.

    X -> a X + b (X X^T) X + c (X X^T)^2 X is a polynomial in each singular value and leaves U and V alone.
    """
    a, b, c = NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=1e-7)).to(x.dtype)  # no singular value is above 1 now
    gram, step = x.new_empty(len(x), x.shape[1], x.shape[1]), torch.empty_like(x)
    for _ in range(NEWTON_SCHULZ_STEPS):
        torch.bmm(x, x.mT, out=gram)  # (n, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x, step = torch.baddbmm(x, polynomial, x, beta=a, out=step), x
    return x


def orthogonalization_dtype(x: Tensor) -> torch.dtype:
    """bf16, whose three digits are enough here, on a device that says it multiplies in it; otherwise x's own dtype."""
    says = getattr(torch.get_device_module(x.device), "is_bf16_supported", None)
    return torch.bfloat16 if x.dtype == torch.float32 and says and says() else x.dtype
