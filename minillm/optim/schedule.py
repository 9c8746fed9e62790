"""The learning rate of each step: a pure function of the step, so that resuming cannot make it jump."""

import math

from minillm.optim.config import OptimConfig, chosen


def lr_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """The learning rate of a step, counted from 0 to max_steps - 1.

    Step 0 has lr / (warmup_steps + 1), step `warmup_steps` has lr, the last step has min_lr (lr, where the schedule is
    constant). With progress s from 0 to 1 over the decay, the rate is a mean of lr and min_lr, weighted w and 1 - w:

        cosine   w = (1 + cos(pi s)) / 2        Loshchilov and Hutter 2017
        linear   w = 1 - s
        wsd      w = 1 - sqrt(s)                over the last decay_fraction of the run: Haegele et al. 2024

    A run that is all warm-up never decays. inverse_sqrt has no end: lr sqrt((warmup_steps + 1) / (step + 1)), and
    min_lr where that is more (Vaswani et al. 2017, section 5.3).
    """
    lr, warmup_steps = chosen(config, "lr"), chosen(config, "warmup_steps")
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "inverse_sqrt":
        return max(config.min_lr, lr * math.sqrt((warmup_steps + 1) / (step + 1)))
    last = max_steps - 1
    start = warmup_steps
    if config.schedule == "wsd":
        start = max(start, last - max(1, round(config.decay_fraction * max_steps)))
    if config.schedule == "constant" or step <= start:
        return lr
    s = min(1.0, (step - start) / (last - start)) if last > start else 1.0
    weight = {"cosine": (1 + math.cos(math.pi * s)) / 2, "linear": 1 - s, "wsd": 1 - math.sqrt(s)}[config.schedule]
    return weight * lr + (1 - weight) * config.min_lr


def warmup_steps(config: OptimConfig, max_steps: int) -> int:
    """How long the warm-up lasts: as given, else a tenth of the run, at most 100 steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(100, max_steps // 10) if config.warmup_ratio is None else round(config.warmup_ratio * max_steps)
