"""How fast several ranks are beside one, at the same batch.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/scaling.py [--rounds 7] [--device cpu]

One step of each way in turn, so that a machine that speeds up and slows down meets all alike:

    alone        rank 0 computes the whole batch, the others wait
    apart        every rank its share of the batch, as runs of their own that send nothing: what the machine can give
    ddp, fsdp    the ranks together, as `train.py --parallel.strategy` has them

A step is all of `Trainer.step`: forward, loss, backward, what is sent, the norm, AdamW. On a CPU each rank has one
thread, on a core of its own where the system lets it choose. Printed are medians over the rounds of alone's time
divided by the other's in the same round: with n ranks, n would be perfect. The last column has the same for the CPU
time of the rank that took most: what it would be if nobody else used the machine, and nobody waited.
"""

import argparse
import os
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch
from beside import cpu_name, table

from minillm.data.batch import Batch
from minillm.distributed.config import Layout
from minillm.distributed.context import Context, connect, with_mesh
from minillm.distributed.device import synchronize
from minillm.distributed.parallelize import ONE, parallelize
from minillm.model.init import init_weights
from minillm.model.presets import llama2
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.trainer import DTYPES, TrainConfig, Trainer

TINY = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64}
LLAMA_26M = {"vocab_size": 6400, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 1408}
LLAMA_1B = {"vocab_size": 32_000, "dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "ffn_dim": 5632}


class Shape(NamedTuple):
    """A model, and the rows of T tokens in a micro-batch; a batch is one micro-batch for each rank."""

    model: dict[str, int]
    B: int
    T: int


SHAPES = {
    "llama-tiny": Shape(TINY, B=1, T=16),
    "llama-26m": Shape(LLAMA_26M, B=4, T=512),
    "llama-1b": Shape(LLAMA_1B, B=8, T=2048),
}


class Micro:
    """A loader of random tokens that are made once: as many micro-batches at every step."""

    def __init__(self, shape: Shape, numbers: list[int]):
        self.micro_batches = []
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            rows = torch.randint(shape.model["vocab_size"], (shape.B, shape.T + 1), generator=generator)  # (B, T+1)
            self.micro_batches.append(Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
        self.samples_per_step = self.samples_per_epoch = shape.B * len(numbers)
        self.tokens_per_step = self.samples_per_step * shape.T

    def batches(self, cursor: int) -> list[Batch]:
        return self.micro_batches


def make_trainer(shape: Shape, dist: Context, layout: Layout, numbers: list[int]) -> Trainer:
    """A trainer as train.py makes it, of the micro-batches of those numbers."""
    dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
    precision = "fp32" if dist.device.type == "cpu" else "bf16"
    with torch.device("meta"):
        model = Transformer(llama2(**shape.model, max_seq_len=shape.T, tie_embeddings=True))
    init = partial(init_weights, seed=0)
    model = parallelize(model, dist=dist, layout=layout, dtype=DTYPES[precision], init=init)
    return Trainer(
        model,
        build_optimizer(model, OptimConfig(name="adamw", lr=3e-4)),
        NextToken(shape.model["vocab_size"]),
        Micro(shape, numbers),
        TrainConfig(precision=precision, spike="off"),
        steps=10**9,
        lr_at=lambda step: 3e-4,
        dist=dist,
    )


class Seconds(NamedTuple):
    wall: float
    cpu: float


def timed(trainer: Trainer | None, dist: Context) -> Seconds:
    """From when all ranks are here until all are through: on the wall, and the CPU time of the busiest."""
    synchronize(dist.device)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    if trainer is not None:
        trainer.step()
        synchronize(dist.device)
    cpu = time.process_time() - cpu
    dist.barrier()
    wall = time.perf_counter() - wall
    return Seconds(dist.max(wall), dist.max(cpu))


def measure(shape: Shape, dist: Context, options: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Times of each way, a round after the other."""
    n, single = dist.world_size, Context(dist.device)
    ways = {
        "alone": make_trainer(shape, single, ONE, list(range(n))) if dist.is_main else None,
        "apart": make_trainer(shape, single, ONE, [dist.rank]),
        "ddp": make_trainer(shape, dist, Layout("ddp", n, 1, 1), [dist.rank]),
        "fsdp": make_trainer(shape, dist, Layout("fsdp", 1, n, 1), [dist.rank]),
    }
    ways = {name: trainer for name, trainer in ways.items() if name in ("alone", *options.ways)}
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(options.warmup + options.rounds):
        for name, trainer in ways.items():
            seconds[name].append(timed(trainer, dist))
    check_losses(ways, dist)
    return {name: found[options.warmup :] for name, found in seconds.items()}


def check_losses(ways: dict[str, Trainer | None], dist: Context) -> None:
    """The ranks together have trained what one trained alone."""
    losses = {name: ways[name].step()["loss"] for name in ways if name != "apart" and ways[name] is not None}
    for name, loss in losses.items():
        expected = losses.get("alone", loss)
        assert abs(loss - expected) < 1e-3 * expected, f"{name}: the loss is {loss}, alone it is {expected}"


def use_one_core(dist: Context) -> None:
    """A core for each rank, where there are as many and the system lets a process choose."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= dist.world_size:
            os.sched_setaffinity(0, {cores[dist.local_rank]})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-26m")
    parser.add_argument("--ways", nargs="+", choices=["apart", "ddp", "fsdp"], default=["apart", "ddp", "fsdp"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape]
    with connect(options.device) as dist:
        if dist.device.type == "cpu":
            use_one_core(dist)
        if dist.is_main:
            print(machine(dist.device))
            table("shape", "", "ranks", "tokens/s", "times as fast as alone", "in CPU time")
        seconds = measure(shape, dist, options)
        if dist.is_main:
            for row in rows(options.shape, dist.world_size, seconds):
                print(row)


def machine(device: torch.device) -> str:
    """Where and with what this was measured."""
    if device.type == "cpu":
        where = f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
    else:
        where = torch.get_device_module(device).get_device_name(device)
    return f"{where}; torch {torch.__version__}"


def rows(name: str, ranks: int, seconds: dict[str, list[Seconds]]) -> list[str]:
    shape, alone, found = SHAPES[name], seconds["alone"], []
    for way, theirs in seconds.items():
        rate = ranks * shape.B * shape.T / statistics.median(one.wall for one in theirs)
        wall = statistics.median(a.wall / b.wall for a, b in zip(alone, theirs))
        cpu = statistics.median(a.cpu / b.cpu for a, b in zip(alone, theirs))
        found.append(f"| {name} | {way} | {1 if way == 'alone' else ranks} | {rate:,.0f} | {wall:.2f} | {cpu:.2f} |")
    return found


if __name__ == "__main__":
    main()
