"""How fast training steps are on a GPU, what share of its arithmetic they use, and how much memory they take.

    python benchmarks/gpu.py [--sizes 124m 350m 1.3b 7b] [--changes all] [--steps 5] [--warmup 3] [--device auto]
    python benchmarks/gpu.py --tiny                                # the whole way through in seconds, also on a CPU

A step is `Trainer.step` with a `Loader`, built as train.py builds them, on random tokens: reading and copying rows,
every micro-batch forward and backward, the gradient's norm and limit, AdamW. Weights, gradients and both moments are
fp32 (16 bytes a parameter, also for 7B), matrix products bf16; a CPU computes in fp32. Each size is measured as
`SIZES` has it, and then with one setting changed at a time, each in a process of its own, so that its peak of memory
is its own and running out of it ends nothing else.

MFU is tokens/s x (6 N + 12 L D T) / peak: N parameters in matrix products, no halving for causal attention, peak the
dense bf16 figure of the maker's datasheet (`plan.flops_per_token`, `distributed.device.peak_flops`).
"""

import argparse
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from minillm.data.loader import Loader
from minillm.distributed.context import Context
from minillm.distributed.device import find_device, peak_flops, peak_memory, synchronize
from minillm.distributed.parallelize import parallelize
from minillm.model.config import ModelConfig
from minillm.model.presets import gpt2, llama2
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.plan import flops_per_token
from minillm.trainer import DTYPES, TrainConfig, Trainer


class Setting(NamedTuple):
    """A model, and everything that decides how fast it trains."""

    model: ModelConfig
    T: int
    batch_tokens: int
    micro_batch_size: int
    compile: bool = True
    activation_checkpointing: str = "none"
    fused: bool = True
    packing: bool = False


XL = {"dim": 2048, "n_layers": 24, "n_heads": 16, "max_seq_len": 2048}  # GPT-3 XL: Brown et al. 2020, table 2.1
SIZES = {
    "124m": Setting(gpt2("124m", vocab_multiple=128), 1024, 524_288, 64),
    "350m": Setting(gpt2("350m", vocab_multiple=128), 1024, 262_144, 32),
    "1.3b": Setting(gpt2("124m", vocab_multiple=128, **XL), 2048, 131_072, 8),
    "7b": Setting(llama2("7b"), 4096, 65_536, 2, activation_checkpointing="full"),
}
TINY = {"tiny": Setting(gpt2("124m", vocab_size=97, dim=32, n_layers=2, n_heads=2, max_seq_len=32), 32, 256, 4, False)}
# What a size is to reach on one H200, as a share of 989 TFLOP/s.
AIMS = {"124m": 0.48, "350m": 0.52, "1.3b": 0.56, "7b": 0.57}
PUBLISHED = """
| published | MFU |
|---|---|
| llm.c, 124M | 40.6% |
| llm.c, 1.6B | 48.7% |
| nanochat, d24 | 50% |
| torchtitan, 8B, eager | 33% |
| torchtitan, 8B, compiled | 39% |
| 7B on one H200, full activation checkpointing | 57.8% |
"""

# name -> the setting with that one thing changed; None where there is nothing to change
CHANGES: dict[str, Callable[[Setting], Setting | None]] = {
    "eager": lambda one: one._replace(compile=False) if one.compile else None,
    "half the micro-batch": lambda one: (
        one._replace(micro_batch_size=one.micro_batch_size // 2) if one.micro_batch_size > 1 else None
    ),
    "twice the micro-batch": lambda one: one._replace(micro_batch_size=2 * one.micro_batch_size),
    "no checkpointing": lambda one: checkpointed(one, "none"),
    "selective checkpointing": lambda one: checkpointed(one, "selective"),
    "full checkpointing": lambda one: checkpointed(one, "full"),
    "vocabulary not padded": lambda one: padded(one, 1),
    "vocabulary padded to 128": lambda one: padded(one, 128),
    "optimizer not fused": lambda one: one._replace(fused=False),
    "packed documents": lambda one: one._replace(packing=True),
}


def checkpointed(setting: Setting, kind: str) -> Setting | None:
    if setting.activation_checkpointing == kind:
        return None
    return setting._replace(activation_checkpointing=kind)


def padded(setting: Setting, multiple: int) -> Setting | None:
    values = {name: value for name, value in vars(setting.model).items() if name != "vocab_multiple"}
    model = ModelConfig(**values, vocab_multiple=multiple)
    return setting._replace(model=model) if model.padded_vocab_size != setting.model.padded_vocab_size else None


# --- one measurement --------------------------------------------------------------------------------------------------


class RandomTokens:
    """A text without meaning, in documents of about 500 tokens: enough for the loader to do all of its work."""

    def __init__(self, vocab_size: int, n_tokens: int, mean_length: int = 500):
        generator = np.random.default_rng(0)
        self.n_tokens = n_tokens
        self.ids = generator.integers(vocab_size, size=n_tokens, dtype=np.uint32)
        lengths = generator.integers(2, 2 * mean_length, size=n_tokens // mean_length + 1)
        inside = np.cumsum(lengths)
        self.document_offsets = np.concatenate([[0], inside[inside < n_tokens - 1], [n_tokens]])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def source(self, document: int) -> str:
        return f"random:{document}"


class Measured(NamedTuple):
    """What came out of a setting."""

    seconds: float  # a step, median
    peak_bytes: int
    loss: float  # of the first step


def make_trainer(setting: Setting, device: torch.device, steps: int) -> Trainer:
    """The parts that train.py makes, on random tokens."""
    with torch.device("meta"):
        model = Transformer(setting.model)
    model.to_empty(device=device)
    begin(model)
    optim = OptimConfig(lr=1e-4)
    optimizer = build_optimizer(model, optim)
    if not setting.fused:
        for group in optimizer.param_groups:
            group["fused"] = False
    parallelize(model, setting.activation_checkpointing, setting.compile)
    rows = setting.batch_tokens // setting.T
    loader = Loader(
        RandomTokens(setting.model.vocab_size, (steps + 2) * setting.batch_tokens),
        seq_len=setting.T,
        packing=setting.packing,
        micro_batch_size=setting.micro_batch_size,
        samples_per_step=rows,
        seed=0,
        device=device,
    )
    return Trainer(
        model,
        optimizer,
        NextToken(setting.model.vocab_size),
        loader,
        TrainConfig(precision="fp32" if device.type == "cpu" else "bf16"),
        steps=steps,
        lr_at=lambda step: 1e-4,
        dist=Context(device),
        grad_clip=optim.grad_clip,
    )


@torch.no_grad()
def begin(model: torch.nn.Module) -> None:
    """Weights drawn where they are: the library's own, drawn on the CPU, take a minute for 7B."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02 if "embed" not in name else parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def measure(setting: Setting, device_name: str, steps: int, warmup: int) -> Measured | None:
    """Time the steps of a setting in this process; None where the memory is not enough."""
    device = find_device(device_name)
    try:
        trainer = make_trainer(setting, device, warmup + steps)
        seconds, losses = [], []
        for _ in range(warmup + steps):
            synchronize(device)
            start = time.perf_counter()
            losses.append(trainer.step()["loss"])
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        trainer.loader.close()
    except torch.OutOfMemoryError:
        return None
    guessing = math.log(setting.model.vocab_size)
    assert abs(losses[0] - guessing) < 2, f"the first loss is {losses[0]:.2f}, that of guessing {guessing:.2f}"
    return Measured(statistics.median(seconds[warmup:]), peak_memory(device), losses[0])


def in_fresh_process(function: Callable[[], Measured | None]) -> Measured | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


# --- what is printed --------------------------------------------------------------------------------------------------


def row(size: str, change: str, setting: Setting, found: Measured | None, peak: float, base: Measured | None) -> str:
    """A line of the table; the last figure compares with the size as it is in SIZES."""
    cells = [size, change, str(setting.micro_batch_size)]
    if found is None:
        return f"| {' | '.join([*cells, 'out of memory', '', '', '', ''])} |"
    rate = setting.batch_tokens / found.seconds
    mfu = rate * flops_per_token(setting.model, setting.T) / peak
    ratio = base.seconds / found.seconds if base else 1.0
    cells += [f"{1000 * found.seconds:,.0f}", f"{rate:,.0f}", f"{mfu:.1%}", f"{found.peak_bytes / 2**30:.1f}"]
    return f"| {' | '.join([*cells, f'{ratio:.2f}'])} |"


def where(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--changes", nargs="*", choices=["all", *CHANGES], default=[], help="settings to change, too")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters instead")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, in which blocks are compiled")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    device = find_device(options.device)
    sizes = TINY if options.tiny else {name: SIZES[name] for name in options.sizes}
    changes = list(CHANGES) if "all" in options.changes else options.changes
    peak = peak_flops(device, DTYPES["fp32" if device.type == "cpu" else "bf16"])
    print(f"{where(device)}; peak {peak / 1e12:,.2f} TFLOP/s")
    columns = ["size", "changed", "micro-batch", "ms a step", "tokens/s", "MFU", "peak GiB", "speed"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for size, setting in sizes.items():
        run = partial(measure, device_name=options.device, steps=options.steps, warmup=options.warmup)
        base = in_fresh_process(partial(run, setting))
        print(row(size, "", setting, base, peak, base), flush=True)
        for change in changes:
            changed = CHANGES[change](setting)
            if changed is not None:
                print(row(size, change, changed, in_fresh_process(partial(run, changed)), peak, base), flush=True)
    aims = ", ".join(f"{name} {aim:.0%}" for name, aim in AIMS.items())
    print(f"\naimed at on one H200: {aims}\n{PUBLISHED}", end="")


if __name__ == "__main__":
    main()
