"""Norms of each parameter: its weight, its gradient, and by what share a step changes it.

A healthy update ratio is about 1e-3; far more in one layer is a step about to diverge, far less is a layer that does
not learn. Nothing is computed, and no memory taken, on the steps for which nobody asked.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minillm.optim import parts, whole_norms


@contextmanager
def norms_noted(
    notes: list[tuple[str, dict[str, Any]]], step: int, parameters: Mapping[str, Tensor], gradient_norms: Tensor
) -> Iterator[None]:
    """Around the optimizer's step: note a row of norms.jsonl, with three numbers a parameter.

    weight_norm/NAME before the step; grad_norm/NAME before clipping; update_ratio/NAME, the norm of the step's change
    over that of the weight (None for a weight of zeros).
    """
    wholes = list(parameters.values())
    with torch.no_grad():
        weights = parts(wholes)
        before = torch._foreach_mul(weights, 1.0)  # a copy: the optimizer changes the weights in place
        norms = whole_norms(before, wholes)
    yield
    with torch.no_grad():
        changes = whole_norms(torch._foreach_sub(before, weights), wholes)
    row: dict[str, Any] = {"step": step}
    for name, weight, gradient, change in zip(parameters, *(x.tolist() for x in (norms, gradient_norms, changes))):
        ratio = change / weight if weight else None
        row |= {f"weight_norm/{name}": weight, f"grad_norm/{name}": gradient, f"update_ratio/{name}": ratio}
    notes.append(("norms", row))
