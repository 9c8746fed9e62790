"""The `train` section: how long a run is, how much a step, in which precision, how often to look and to save."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch

from minillm.distributed.device import best_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much a step, in which precision, how often to look and to save."""

    max_steps: Annotated[int | None, "optimizer steps; none: chosen for the size of the corpus", ">= 1"] = None
    max_tokens: Annotated[int | None, "also stop after this many tokens", ">= 1"] = None
    max_epochs: Annotated[float | None, "also stop after this many passes over the corpus", "> 0"] = None
    max_hours: Annotated[float | None, "also stop after this many hours of training", "> 0"] = None
    batch_tokens: Annotated[int | None, "tokens a step over all ranks; none: chosen", ">= 1"] = None
    micro_batch_size: Annotated[int | None, "sequences a forward; none: as many as fit well", ">= 1"] = None
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 where the device is fast at it"] = "auto"
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"], "recompute nothing, attention, or whole blocks to save memory"
    ] = "none"
    compile: Annotated[bool, "compile each block (minutes at the start, faster steps after)"] = False
    eval_every: Annotated[int | None, "steps between evaluations; none: ten a run", ">= 1"] = None
    save_every: Annotated[int | None, "steps between checkpoints; none: five a run", ">= 1"] = None
    async_save: Annotated[
        bool | None, "write checkpoints while training goes on, from a copy in host memory; none: on an accelerator"
    ] = None
    keep_last: Annotated[int, "checkpoints kept; under patience also the best", ">= 1"] = 2
    patience: Annotated[int | None, "stop after so many evaluations in a row without a better val_loss", ">= 1"] = None
    spike: Annotated[
        Literal["off", "report", "skip"], "a loss or gradient norm far above the usual: nothing, a report, no update"
    ] = "report"
    spike_threshold: Annotated[
        float, "standard deviations above the usual, by statistics that a spike does not move", "> 0"
    ] = 6.0
    label_smoothing: Annotated[float, "share of the target that goes to all tokens alike", ">= 0, < 1"] = 0.0
    z_loss: Annotated[float, "weight of the squared log normaliser, as a penalty; 1e-4 is usual", ">= 0"] = 0.0
    max_bad_steps: Annotated[int, "non-finite steps in a row after which the run stops", ">= 1"] = 10


class Loader(Protocol):
    """Where batches come from: a pure function of how many samples the run has consumed.

    A batch is what the objective takes, in host memory: a tuple of tensors, or something with `to(device)`.
    """

    samples_per_step: int
    samples_per_epoch: int
    tokens_per_step: int

    def batches(self, cursor: int) -> Sequence[Any]: ...


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on the device."""
    return batch.to(device) if hasattr(batch, "to") else tuple(x.to(device, non_blocking=True) for x in batch)


def total_steps(config: TrainConfig, loader: Loader) -> int:
    """The step at which a run ends, from whichever of max_steps, max_tokens and max_epochs comes first."""
    limits = [
        config.max_steps,
        config.max_tokens and math.ceil(config.max_tokens / loader.tokens_per_step),
        config.max_epochs and math.ceil(config.max_epochs * loader.samples_per_epoch / loader.samples_per_step),
    ]
    if not any(limits):
        raise ValueError("train.max_steps: no end is set; give train.max_steps, train.max_tokens or train.max_epochs")
    return min(limit for limit in limits if limit)


def completed(config: TrainConfig, steps: int, device: torch.device) -> TrainConfig:
    """The config with what it leaves open about the loop decided for a run of so many steps on that device."""
    return dataclasses.replace(
        config,
        precision=best_precision(device) if config.precision == "auto" else config.precision,
        eval_every=config.eval_every or math.ceil(steps / 10),
        save_every=config.save_every or math.ceil(steps / 5),
        # on a CPU the copy would lie beside the weights, and writing would take from the cores that train
        async_save=device.type != "cpu" if config.async_save is None else config.async_save,
    )
