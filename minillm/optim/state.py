"""An optimizer's state by name: what a checkpoint saves, and loads into."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.optim.lamb import Lamb
from minillm.optim.muon import Muon

ADAM = ("exp_avg", "exp_avg_sq")
# What torch's optimizers hold for each parameter before its first step: tensors of zeros, and scalars. (Adagrad makes
# its own when it is built.)
STATE: dict[type[torch.optim.Optimizer], tuple[tuple[str, ...], dict[str, float]]] = {
    torch.optim.AdamW: (ADAM, {"step": 0.0}),
    torch.optim.Adam: (ADAM, {"step": 0.0}),
    torch.optim.Adamax: (("exp_avg", "exp_inf"), {"step": 0.0}),
    torch.optim.NAdam: (ADAM, {"step": 0.0, "mu_product": 1.0}),
    torch.optim.Adadelta: (("square_avg", "acc_delta"), {"step": 0.0}),
    torch.optim.RMSprop: (("square_avg",), {"step": 0.0}),
    torch.optim.SGD: ((), {}),
}


def initial_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer holds for a parameter before its first step."""
    if isinstance(optimizer, (Muon, Lamb)):
        return optimizer.initial_state(group, parameter)
    if type(optimizer) not in STATE or group.get("amsgrad"):
        names = ", ".join(one.__name__ for one in STATE)
        raise ValueError(f"the state of {type(optimizer).__name__} is not known here; those of {names} are")
    tensors, scalars = STATE[type(optimizer)]
    if group.get("momentum"):
        tensors = (*tensors, "momentum_buffer")
    # a fused kernel counts steps where the parameter is; the others count on the CPU
    device = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    state = {name: torch.full((), value, dtype=torch.float32, device=device) for name, value in scalars.items()}
    return state | {name: torch.zeros_like(parameter) for name in tensors}


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
