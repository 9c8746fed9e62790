"""From the section to an optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minillm.optim.config import MOMENTUM, OptimConfig, chosen
from minillm.optim.gradients import add_l1
from minillm.optim.groups import param_groups
from minillm.optim.lamb import Lamb
from minillm.optim.muon import Muon


def adam_options(config: OptimConfig) -> dict[str, Any]:
    return {"betas": (config.beta1, config.beta2), "eps": config.eps}


def momentum(config: OptimConfig) -> float:
    return MOMENTUM[config.name] if config.momentum is None else config.momentum


# name -> (class, its options beside lr and the groups)
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], Callable[[OptimConfig], dict[str, Any]]]] = {
    "adamw": (torch.optim.AdamW, adam_options),
    "muon": (Muon, lambda config: adam_options(config) | {"momentum": momentum(config)}),
    "lamb": (Lamb, adam_options),
    "adam": (torch.optim.Adam, adam_options),
    "adamax": (torch.optim.Adamax, adam_options),
    "nadam": (torch.optim.NAdam, adam_options),
    "adagrad": (torch.optim.Adagrad, lambda config: {"eps": config.eps}),
    "adadelta": (torch.optim.Adadelta, lambda config: {"rho": config.beta2, "eps": config.eps}),
    "rmsprop": (
        torch.optim.RMSprop,
        lambda config: {"alpha": config.beta2, "eps": config.eps, "momentum": momentum(config)},
    ),
    "sgd": (torch.optim.SGD, lambda config: {"momentum": momentum(config)}),
}
FUSED = ("adamw", "adam", "muon")  # those with one kernel for all parameters, where the device has it


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The section's optimizer over the model's trainable parameters, fused into one kernel where the device has it."""
    groups = param_groups(model, config)
    optimizer_class, options_of = OPTIMIZERS[config.name]
    options = options_of(config)
    if config.name in FUSED:
        options["fused"] = has_fused_adamw(p for group in groups for p in group["params"])
    optimizer = optimizer_class(groups, lr=chosen(config, "lr"), **options)
    if config.l1:
        optimizer.register_step_pre_hook(add_l1)
    return optimizer


def has_fused_adamw(parameters: Iterable[Tensor]) -> bool:
    """Whether torch can update these parameters in one fused kernel: it says so itself when asked to."""
    try:
        torch.optim.AdamW(parameters, fused=True)
    except RuntimeError:
        return False
    return True
