"""The optimizer: which parameters decay, AdamW or Muon, the learning rate of each step, the limit on the gradient.

Rules that the code below follows, in one place:

- Weight decay pulls on matrices only. Norm weights and biases set scales and offsets, where zero is no simpler than any
  other value. Embeddings (tied ones too) do not decay either: a row gets a gradient only in steps where its token
  occurs but would shrink in all, and small embeddings mean large gradients behind the first norm (Takase et al. 2023,
  arXiv:2312.16903; OLMo 2, arXiv:2501.00656).
- Muon takes the matrices inside the model. Embeddings, the head, norms and biases stay with AdamW: a row of an
  embedding or of the head belongs to one token, and only occurs with it (Jordan 2024).
- The learning rate is a pure function of the step, so resuming cannot make it jump.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

# A quintic whose repeated application brings every singular value in (0, 1] near 1: Jordan 2024,
# https://kellerjordan.github.io/posts/muon/. It ends between 0.7 and 1.2, which trains as well as exactly 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# An orthogonal update has the root mean square 1/sqrt(larger side); AdamW's is about 0.2. With this factor AdamW's lr
# and weight decay serve for Muon (Liu et al. 2025, arXiv:2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2
# Matrices are stacked to keep a device busy with small ones; large ones do that alone and only cost memory.
MAX_STACKED_ELEMENTS = 2**25


@dataclass(frozen=True)
class OptimConfig:
    """What happens to the weights at each step."""

    name: Annotated[Literal["adamw", "muon"], "optimizer; muon: Muon for the blocks' matrices, AdamW for the rest"] = (
        "adamw"
    )
    lr: Annotated[float | None, "peak learning rate; none: chosen for the size of the corpus", "> 0"] = None
    min_lr: Annotated[float, "learning rate of the last step", ">= 0"] = 0.0
    warmup_steps: Annotated[int | None, "steps of linear warm-up; none: chosen for the length of the run", ">= 0"] = (
        None
    )
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"], "from lr to min_lr; wsd stays at lr, then decays at the end"
    ] = "cosine"
    decay_fraction: Annotated[float, "part of the run in which wsd decays", "> 0, <= 1"] = 0.2
    weight_decay: Annotated[float, "pull of matrices towards 0, times lr", ">= 0"] = 0.1
    beta1: Annotated[float, "AdamW: memory of the gradient", ">= 0, < 1"] = 0.9
    beta2: Annotated[float, "AdamW: memory of the squared gradient", ">= 0, < 1"] = 0.95
    eps: Annotated[float, "AdamW: added to the root of the squared gradient", "> 0"] = 1e-8
    muon_momentum: Annotated[float, "Muon: memory of the gradient", ">= 0, < 1"] = 0.95
    muon_lr: Annotated[float | None, "Muon: peak learning rate of its matrices; none: lr", "> 0"] = None
    grad_clip: Annotated[float | None, "limit on the norm of the whole gradient; none: no limit", "> 0"] = 1.0

    def __post_init__(self):
        problems = []
        if self.lr is not None and self.min_lr > self.lr:
            problems.append(f"min_lr: {self.min_lr:g} is above lr {self.lr:g}; the rate falls from lr to min_lr")
        if self.muon_lr is not None and self.name != "muon":
            problems.append(f"muon_lr: {self.muon_lr:g} has no effect with name {self.name}; set name muon, or lr")
        if problems:
            raise ValueError("\n".join(problems))


# --- learning rate ----------------------------------------------------------------------------------------------------


def lr_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """The learning rate of a step, counted from 0 to max_steps - 1.

    Step 0 has lr / (warmup_steps + 1), step `warmup_steps` has lr, the last step has min_lr (lr, where the schedule is
    constant). With progress s from 0 to 1 over the decay, the rate is a mean of lr and min_lr, weighted w and 1 - w:

        cosine   w = (1 + cos(pi s)) / 2        Loshchilov and Hutter 2017
        linear   w = 1 - s
        wsd      w = 1 - sqrt(s)                over the last decay_fraction of the run: Haegele et al. 2024

    A run that is all warm-up never decays.
    """
    lr, warmup_steps = chosen(config, "lr"), chosen(config, "warmup_steps")
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    last = max_steps - 1
    start = warmup_steps
    if config.schedule == "wsd":
        start = max(start, last - max(1, round(config.decay_fraction * max_steps)))
    if config.schedule == "constant" or step <= start:
        return lr
    s = min(1.0, (step - start) / (last - start)) if last > start else 1.0
    weight = {"cosine": (1 + math.cos(math.pi * s)) / 2, "linear": 1 - s, "wsd": 1 - math.sqrt(s)}[config.schedule]
    return weight * lr + (1 - weight) * config.min_lr


def chosen(config: OptimConfig, field: str) -> Any:
    """A field that may be left open until the corpus is known, now that it is needed."""
    value = getattr(config, field)
    if value is None:
        raise ValueError(f"{field}: none is chosen yet; give a number")
    return value


# --- which parameter gets what ----------------------------------------------------------------------------------------


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, sorted into groups: "muon" (where asked for), "decay", "no_decay".

    A group holds its own weight_decay, and lr_scale, by which the step's learning rate is multiplied. Raises ValueError
    where nothing is trainable.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sorted_out: dict[str, list[Tensor]] = {"muon": [], "decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            kind = "no_decay"
        elif config.name == "muon" and parameter.ndim == 2 and "lm_head" not in name.split("."):
            kind = "muon"
        else:
            kind = "decay"
        sorted_out[kind].append(parameter)
    if not any(sorted_out.values()):
        raise ValueError("no parameter is trainable: requires_grad is off for all of them")
    muon_scale = config.muon_lr / chosen(config, "lr") if config.muon_lr else 1.0
    return [
        {
            "name": kind,
            "params": parameters,
            "weight_decay": 0.0 if kind == "no_decay" else config.weight_decay,
            "lr_scale": muon_scale if kind == "muon" else 1.0,
        }
        for kind, parameters in sorted_out.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or Muon over the model's trainable parameters, fused into one kernel where the device has it."""
    groups = param_groups(model, config)
    options = {"lr": chosen(config, "lr"), "betas": (config.beta1, config.beta2), "eps": config.eps}
    options["fused"] = has_fused_adamw(p for group in groups for p in group["params"])
    if config.name == "muon":
        return Muon(groups, momentum=config.muon_momentum, **options)
    return torch.optim.AdamW(groups, **options)


def has_fused_adamw(parameters: Iterable[Tensor]) -> bool:
    """Whether torch can update these parameters in one fused kernel: it says so itself when asked to."""
    try:
        torch.optim.AdamW(parameters, fused=True)
    except RuntimeError:
        return False
    return True


# --- Muon -------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon for groups named "muon", AdamW for all others.

    Muon keeps a running mean of the gradient and steps along the nearest orthogonal matrix: all directions of the
    matrix move equally far, also those that the gradient barely touches. A step of lr has the same root mean square
    as AdamW's, so both take the same learning rate.

    Only `orthogonalized` needs a matrix as a whole; the rest works on any shard of it.
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
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["name"] == "muon" and parameter.ndim != 2:
                    raise ValueError(f"Muon updates matrices; this parameter has shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = initial_state(self, group, parameter)
            if parameters and group["name"] == "muon":
                self.step_muon(parameters, group)
            elif parameters:
                self.step_adamw(parameters, group)
        return loss

    def step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters]
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov: a step ahead
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, update in zip(parameters, orthogonalized(directions)):
            parameter.add_(update, alpha=-group["lr"] * MUON_UPDATE_RMS * math.sqrt(max(parameter.shape)))

    def step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
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
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1 now
    x = x.to(orthogonalization_dtype(x))
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


# --- gradient norm and state ------------------------------------------------------------------------------------------


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients so that their norm, taken over all of them, is at most max_norm; returns the norm before.

    The result stays on the device: nothing waits for it. Where it is not finite the gradients stay as they are, so that
    the caller can see which of them is to blame.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    if hasattr(norm, "full_tensor"):  # sharded gradients: each rank has the norm of its part
        norm = norm.full_tensor()
    # clip_grads_with_norm_ multiplies by max_norm / (norm + 1e-6), or 1; where looking is free, spare the factor 1
    if max_norm is not None and not (norm.device.type == "cpu" and norm + 1e-6 <= max_norm):
        clip_grads_with_norm_(parameters, max_norm, norm.where(norm.isfinite(), 0))
    return norm


def initial_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer holds for a parameter before its first step."""
    if isinstance(optimizer, Muon) and group["name"] == "muon":
        return {"momentum_buffer": torch.zeros_like(parameter)}
    if isinstance(optimizer, (Muon, torch.optim.AdamW)) and not group.get("amsgrad"):
        # the fused kernel counts steps where the parameter is; the others count on the CPU
        device = parameter.device if group["fused"] or group.get("capturable") else torch.device("cpu")
        return {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    raise ValueError(f"the state of {type(optimizer).__name__} is not known here; those of AdamW and Muon are")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The optimizer's state as {"optim.exp_avg.NAME": tensor, ...}: what a checkpoint saves, and loads into.

    The tensors are the optimizer's own. State that a parameter does not have yet is made, as the first step would make
    it; copying saved tensors into the result therefore restores an optimizer bitwise.
    """
    names = {id(p): name for name, p in dict(named_parameters).items()}
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = initial_state(optimizer, group, parameter)
            for key, value in optimizer.state[parameter].items():
                tensors[f"optim.{key}.{names[id(parameter)]}"] = value
    return tensors
