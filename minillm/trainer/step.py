"""One step as far as it is arithmetic: the gradient of a global batch, the means over it, what is wrong with them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from minillm.distributed.context import Context
from minillm.distributed.parallelize import gradient_sync
from minillm.log import LOGGER
from minillm.objectives import Objective
from minillm.trainer.config import moved
from minillm.trainer.progress import dropout_seed


def of_this_step(
    objective: Objective,
    model: nn.Module,
    micro_batches: Sequence[Any],
    autocast: Callable[[], AbstractContextManager],
    dist: Context,
    step: int,
) -> Objective:
    """The objective that knows what it must of the whole global batch; `step`: how many came before."""
    if not hasattr(objective, "prepare"):
        return objective
    dist.at(f"step {step + 1}: looking at the global batch")
    with autocast():
        return objective.prepare(model, micro_batches, dist.sum)


def accumulate_gradients(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[Any],
    n: int,
    autocast: Callable[[], AbstractContextManager],
    scaler: torch.amp.GradScaler,
    dist: Context,
    seed: int,
    step: int,
) -> tuple[list[Tensor], dict[str, list[tuple]]]:
    """Add up the gradient of the mean over the n units of the global batch, which this rank has some micro-batches of.

    Args: step: how many came before. Returns: the summed loss of each micro-batch, and the (sum, count) of each metric.
    """
    losses, metrics = [], {}
    for i, batch in enumerate(micro_batches):
        dist.at(f"step {step + 1}: forward {i + 1} of {len(micro_batches)}")
        torch.manual_seed(dropout_seed(seed, step, i, dist.rank))
        with gradient_sync(model, last=i + 1 == len(micro_batches)):
            with autocast():
                loss_sum, pairs = objective(model, moved(batch, dist.device))
            dist.at(f"step {step + 1}: backward {i + 1} of {len(micro_batches)}")
            scaler.scale(loss_sum * (dist.dp_size / n)).backward()  # undoes the mean over data-parallel ranks
        losses.append(loss_sum.detach())
        for name, pair in pairs.items():
            metrics.setdefault(name, []).append(pair)
    return losses, metrics


def mean_figures(
    losses: Sequence[Tensor], metrics: Mapping[str, Sequence[tuple]], n: int, dist: Context
) -> dict[str, float | None]:
    """The loss and the metrics, as means over the global batch."""
    sums = [torch.stack(losses).cpu().double().sum()]
    for pairs in metrics.values():
        sums += torch.tensor([[float(number) for number in pair] for pair in pairs], dtype=torch.float64).sum(0)
    loss_sum, *sums = dist.sum(torch.stack(sums)).tolist()
    means = {name: total / count if count else None for name, total, count in zip(metrics, sums[::2], sums[1::2])}
    return {"loss": loss_sum / n} | means


def report_non_finite(
    step: int, figures: Mapping[str, float], norms: Mapping[str, float], scaler: torch.amp.GradScaler
) -> bool:
    """Name what is not finite in a step that is skipped, among it the parameters, whose gradients have these norms.

    Returns: whether something is wrong; an overflow of fp16, after which the loss scale is lowered, is usual.
    """
    loss_is_finite = math.isfinite(figures["loss"])
    if scaler.is_enabled() and loss_is_finite and scaler.get_scale() > 1:
        LOGGER.info("step %d: fp16 overflow at loss scale %g; skipped", step, scaler.get_scale())
        return False
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    where = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    what = f"the gradient is not finite in {where}" if loss_is_finite else f"the loss is {figures['loss']}"
    LOGGER.warning("step %d: %s; skipped", step, what)
    return True
