"""What to set where memory is wanting: the settings that would fit."""

import dataclasses
from collections.abc import Iterator

from minillm.distributed.config import Layout
from minillm.distributed.parallelize import ONE
from minillm.memory.estimate import GIB, Setting, estimate
from minillm.model.config import ModelConfig
from minillm.optim import OptimConfig


def usable(free: int, device_type: str) -> int:
    """Bytes of tensors that go into so many that are free: allocators leave gaps between them.

    On the CPU: libraries take 0.1 GB when they are first used, and glibc's allocator keeps what was freed for blocks of
    up to 32 MB, so that a process took 2.2 times its tensors (12 layers, dim 64, 4 to 22 rows of 256 tokens).
    """
    return int((free - 1e8) / 2.2) if device_type == "cpu" else int(0.9 * free)


def alternatives(setting: Setting, optim: OptimConfig) -> Iterator[tuple[dict[str, object], Setting, OptimConfig]]:
    """(what to set, the setting, the optimizer) of what may take less: the least change first, then the most rows."""
    others: list[dict[str, str]] = [{}]
    if setting.precision == "fp32" and setting.device_type != "cpu":
        others.append({"train.precision": "bf16"})
    if optim.name not in ("muon", "sgd", "rmsprop", "adagrad"):  # two moments, where Muon has one of most weights
        others.append({"optim.name": "muon"})
    modes = ("none", "selective", "full")
    for other in others:
        other_optim = OptimConfig(name=other["optim.name"]) if "optim.name" in other else optim
        for mode in modes[modes.index(setting.activation_checkpointing) :]:
            change: dict[str, object] = dict(other)
            if mode != setting.activation_checkpointing:
                change["train.activation_checkpointing"] = mode
            for rows in range(setting.rows if change else setting.rows - 1, 0, -1):
                fewer = {"train.micro_batch_size": rows} if rows < setting.rows else {}
                smaller = dataclasses.replace(
                    setting,
                    rows=rows,
                    precision=other.get("train.precision", setting.precision),
                    activation_checkpointing=mode,
                    accumulates=setting.accumulates or bool(fewer),
                )
                yield fewer | change, smaller, other_optim


def memory_advice(
    config: ModelConfig, optim: OptimConfig, setting: Setting, free: int | None, layout: Layout = ONE
) -> str:
    """What a run that ran out of memory needed, and the settings that would fit; `free`: bytes there were for it."""
    needed = estimate(config, optim, setting, layout)
    said = f"by estimate training takes {needed.peak / GIB:.2g} GiB ({needed.describe()})"
    if free is None:
        return f"{said}; lower train.micro_batch_size, or set train.activation_checkpointing to full"
    room, least = usable(free, setting.device_type), needed.peak
    said += f", and {free / GIB:.2g} GiB were free, which hold {max(0, room) / GIB:.2g} of tensors"
    for change, smaller, other in alternatives(setting, optim):
        peak = estimate(config, other, smaller, layout).peak
        if peak <= room:
            words = " ".join(f"--{name} {value}" for name, value in change.items())
            return f"{said}; what would fit: {words} ({peak / GIB:.2g} GiB)"
        least = min(least, peak)
    return (
        f"{said}; no setting fits, the least takes {least / GIB:.2g} GiB: choose a smaller model (model.dim, "
        "model.n_layers, tokenizer.vocab_size) or a shorter data.seq_len"
    )
