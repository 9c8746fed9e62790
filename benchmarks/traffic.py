"""How many bytes a rank sends in a training step, by strategy: counted during a real step, beside docs/parallelism.md.

    torchrun --nproc_per_node 4 benchmarks/traffic.py [--dim 256] [--device cpu]

Every collective of one `Trainer.step` is seen on its way to the process group, with the tensors it is given, and taken
for what a ring sends of them; no link is measured. So it does not matter on what it runs. The formulas leave out the
numbers that a step sums beside the gradients: targets, losses, norms. What is counted is therefore a little more.
"""

import argparse
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.data.batch import Batch
from minillm.distributed.config import Layout
from minillm.distributed.context import Context, connect, with_mesh
from minillm.distributed.parallelize import parallelize
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.trainer import DTYPES, TrainConfig, Trainer

SEND_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather")
V, T, ROWS, LAYERS = 256, 16, 2, 2


# --- what is sent -----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts, while it is entered, the bytes that this rank sends, by collective."""

    def __init__(self):
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if "c10d" in namespace and name not in SEND_NOTHING:
            self.count(name, args)
        return func(*args, **(kwargs or {}))

    def count(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "allreduce_":
            ranks = torch_dist.ProcessGroup.unbox(args[1]).size()
            self.sent["all-reduce"] += sum(map(size, args[0])) * 2 * (ranks - 1) / ranks
        elif name == "_allgather_base_":
            self.sent["all-gather"] += size(args[0]) - size(args[1])
        elif name == "_reduce_scatter_base_":
            self.sent["reduce-scatter"] += size(args[1]) - size(args[0])
        elif name == "all_reduce":  # from here on: what DTensors send
            ranks = torch_dist.distributed_c10d._resolve_process_group(args[2]).size()
            self.sent["all-reduce"] += size(args[0]) * 2 * (ranks - 1) / ranks
        elif name == "all_gather_into_tensor":
            self.sent["all-gather"] += size(args[0]) * (args[1] - 1)
        elif name == "reduce_scatter_tensor":
            self.sent["reduce-scatter"] += size(args[0]) * (args[2] - 1) / args[2]
        else:
            raise ValueError(f"{name}: no rule says how much a rank sends for it")


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- what the chapter says --------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A way to train, as the options of `parallelize` have it, in m micro-batches on each rank."""

    layout: Layout
    m: int
    precision: str = "fp32"
    reshard_after_forward: bool = True
    compress: str = "none"


def expected(setting: Setting, P: int, R: int, dim: int) -> float:
    """Bytes that a rank sends in a step, of P parameters, R of them in the root."""
    layout, number = setting.layout, DTYPES[setting.precision].itemsize
    copies, shards, tp = layout.dp_replicate, layout.dp_shard, layout.tp
    P, R = P / tp, R / tp
    gradient = 2 if setting.compress == "bf16" else 4
    averaged = 2 * gradient * P / shards * (copies - 1) / copies  # an all-reduce of what a rank holds
    gathers = 2 if setting.reshard_after_forward else 1
    gathered = 4 * R + gathers * number * (P - R)
    # of a block: two gathers and two sums, forward and backward, in the dtype of the products; and at the two ends
    streams = ROWS * T * dim * (LAYERS * 8 * number + 20)
    sharded = (gradient * P + gathered) * (shards - 1) / shards
    return averaged + setting.m * (sharded + streams * (tp - 1) / tp)


# --- counting ---------------------------------------------------------------------------------------------------------


class OneBatch:
    """The same micro-batches at every step."""

    samples_per_epoch = samples_per_step = 1
    tokens_per_step = T

    def __init__(self, m: int):
        rows = torch.randint(V, (m, ROWS, T + 1), generator=torch.Generator().manual_seed(0))
        self.micro_batches = [Batch(each[:, :-1], each[:, 1:]) for each in rows]

    def batches(self, cursor: int) -> list[Batch]:
        return self.micro_batches


def counted(dist: Context, setting: Setting, dim: int) -> tuple[Counter[str], int, int]:
    """(bytes sent by collective, P, R) of the third step: at the second, DDP still agrees on its buckets."""
    layout = setting.layout
    dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=V, dim=dim, n_layers=LAYERS, n_heads=4, max_seq_len=T))
    P = sum(parameter.numel() for parameter in model.parameters())
    R = P - sum(parameter.numel() for parameter in model.blocks.parameters())
    model = parallelize(
        model,
        dist=dist,
        layout=layout,
        dtype=DTYPES[setting.precision],
        reshard_after_forward=setting.reshard_after_forward,
        compress=setting.compress,
        init=partial(init_weights, seed=0),
    )
    trainer = Trainer(
        model,
        build_optimizer(model, OptimConfig(name="adamw", lr=1e-3)),
        NextToken(V),
        OneBatch(setting.m),
        TrainConfig(precision=setting.precision),
        steps=3,
        lr_at=lambda step: 1e-3,
        dist=dist,
    )
    trainer.step()
    trainer.step()
    with Traffic() as traffic:
        trainer.step()
    return traffic.sent, P, R


def settings(ranks: int) -> list[Setting]:
    """The strategies that so many ranks can be laid out in."""
    ddp, fsdp = Layout("ddp", ranks, 1, 1), Layout("fsdp", 1, ranks, 1)
    found = [
        Setting(ddp, m=2),
        Setting(ddp, m=2, compress="bf16"),
        Setting(fsdp, m=1),
        Setting(fsdp, m=2),
        Setting(fsdp, m=2, reshard_after_forward=False),
        Setting(fsdp, m=2, precision="bf16"),
        Setting(fsdp, m=2, precision="bf16", compress="bf16"),
        Setting(Layout("ddp", 1, 1, ranks), m=2),
        Setting(Layout("ddp", 1, 1, ranks), m=2, precision="bf16"),
    ]
    if ranks >= 4 and ranks % 2 == 0:
        found.append(Setting(Layout("hsdp", 2, ranks // 2, 1), m=2))
        found.append(Setting(Layout("fsdp", 1, ranks // 2, 2), m=2))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    columns = ("strategy", "ranks", "micro-batches", *COLLECTIVES, "kB sent", "/ formula")
    with connect(options.device) as dist:
        if dist.is_main:
            print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        for setting in settings(dist.world_size):
            sent, P, R = counted(dist, setting, options.dim)
            if dist.is_main:
                print(row(setting, sent, expected(setting, P, R, options.dim)), flush=True)


def row(setting: Setting, sent: Counter[str], formula: float) -> str:
    name, replicate, shard, tp = vars(setting.layout).values()
    words = ["tp" if replicate * shard == 1 else name, setting.precision]
    if not setting.reshard_after_forward:
        words.append("ZeRO-2")
    if setting.compress != "none":
        words.append(f"compress {setting.compress}")
    cells = [
        ", ".join(words),
        f"{replicate} x {shard} x {tp}",
        setting.m,
        *(f"{sent[name] / 1e3:,.0f}" for name in COLLECTIVES),
        f"{sent.total() / 1e3:,.0f}",
        f"{sent.total() / formula:.4f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
