"""Each way to lay a run out over its GPUs: memory, bytes sent, and the time of a step.

Memory is the estimate of minillm.memory, bytes sent are counted as docs/parallelism.md does, and time is a model of
three numbers that the user gives or that stand in config.py: the share of its peak that a GPU reaches while it
computes, and the bytes a second of links inside a node and out of it.

    step = max(computing, sending of data parallelism) + sending of tensor parallelism

because DDP and FSDP2 send while the GPU computes, and tensor parallelism waits for what is sent.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

from minillm.distributed.config import Layout
from minillm.distributed.tensor_parallel import tensor_parallel_problems
from minillm.memory import FP32, GIB, Adapt, Memory, Setting, estimate, held_parameters, number_bytes, usable
from minillm.model.config import ModelConfig
from minillm.plan import flops_per_token
from minillm.simulate.config import Plan, Run
from minillm.strategy import layout_name, layouts

MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """One way to lay the run out, and what it takes."""

    layout: Layout
    vocab_multiple: int  # of the model, so that the tp axis divides the rows of its tables
    setting: Setting
    memory: Memory
    fits: bool
    sent: int  # bytes a GPU a step
    seconds: float  # a step

    @property
    def name(self) -> str:
        return layout_name(self.layout, self.setting.reshard_after_forward)


def candidates(plan: Plan, run: Run) -> list[Candidate]:
    """Every way to lay the run out that the sections leave open. Raises ValueError where there is none."""
    found, problems = [], []
    for tp in tensor_parallel_sizes(plan):
        model = dataclasses.replace(run.model, vocab_multiple=math.lcm(run.model.vocab_multiple, tp))
        wrong = tensor_parallel_problems(model, tp, run.seq_len) if tp > 1 else []
        if plan.gpus % tp:
            wrong = [f"parallel.tp: {tp} does not divide the {plan.gpus} GPUs"]
        if wrong:
            problems += wrong
            continue
        cut, parallel = dataclasses.replace(run, model=model), dataclasses.replace(plan.parallel, tp=tp)
        for layout, reshard in layouts(parallel, plan.gpus, plan.gpus_per_node):
            dp_size = layout.dp_replicate * layout.dp_shard
            if dp_size > run.samples:
                problems.append(
                    f"gpus: {dp_size} data-parallel ranks share {run.samples} sequences a step, so that some would "
                    "have none; raise train.batch_tokens, or take fewer"
                )
                continue
            most = -(-run.samples // dp_size)
            rows = [plan.train.micro_batch_size] if plan.train.micro_batch_size else powers_of_two(most)
            for mode in MODES[MODES.index(plan.train.activation_checkpointing) :]:
                found += [candidate(plan, cut, layout, reshard, mode, min(n, most)) for n in rows]
    if not found:
        raise ValueError(problems[0])
    return found


def tensor_parallel_sizes(plan: Plan) -> list[int]:
    """Sizes of the tp axis: that given, or 1, 2, 4, 8 as far as they stay inside a node; 1 with adapters."""
    if plan.lora.r:
        return [1]
    return [plan.parallel.tp] if plan.parallel.tp > 1 else powers_of_two(min(plan.gpus, plan.gpus_per_node, 8))


def powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def candidate(plan: Plan, run: Run, layout: Layout, reshard: bool, mode: str, rows: int) -> Candidate:
    """What a layout takes."""
    forwards = -(-run.samples // (rows * layout.dp_replicate * layout.dp_shard))
    setting = Setting(
        rows=rows,
        seq_len=run.seq_len,
        precision=run.precision,
        activation_checkpointing=mode,
        accumulates=forwards > 1,
        device_type="cuda",
        reshard_after_forward=reshard,
        adapt=run.adapt,
    )
    memory = estimate(run.model, run.optim, setting, layout)
    if plan.dpo.reference == "frozen":
        copy = FP32 * held_parameters(run.model, layout, run.adapt).trained
        memory = dataclasses.replace(memory, weights=memory.weights + copy, peak=memory.peak + copy)
    data_parallel, tensor_parallel = sending(plan, run, layout, setting, forwards)
    tokens = forwards * rows * run.seq_len  # of each data-parallel rank, those of padding included
    flops = step_flops(run.model, run.seq_len, mode, run.adapt)
    if plan.dpo.reference in ("frozen", "adapters"):  # a forward more
        flops += flops_per_token(run.model, run.seq_len) / 3
    computing = tokens * flops / layout.tp / (plan.mfu * plan.peak_of_gpu)
    seconds = max(computing, data_parallel.seconds) + tensor_parallel.seconds
    sent = round(data_parallel.bytes + tensor_parallel.bytes)
    room = usable(round(plan.memory_of_gpu * GIB), "cuda")
    return Candidate(layout, run.model.vocab_multiple, setting, memory, memory.peak <= room, sent, seconds)


@lru_cache(maxsize=8)  # asked for each of many layouts of one model
def step_flops(config: ModelConfig, T: int, mode: str, adapt: Adapt | None = None) -> float:
    """Operations a token, those done a second time under activation checkpointing included."""
    total = flops_per_token(config, T, adapt)
    table = config.padded_vocab_size * config.dim
    forward_of_blocks = (flops_per_token(config, T) - 6 * table) / 3  # adapters are next to nothing
    mlp = 2 * (3 if config.mlp in ("swiglu", "geglu") else 2) * config.dim * config.ffn_dim * config.n_layers
    return total + {"none": 0, "selective": forward_of_blocks - mlp, "full": forward_of_blocks}[mode]


@dataclass(frozen=True)
class Sending:
    """What a GPU sends in a step."""

    bytes: float
    seconds: float


def sending(plan: Plan, run: Run, layout: Layout, setting: Setting, forwards: int) -> tuple[Sending, Sending]:
    """(data parallelism, tensor parallelism): of S bytes over n ranks, a gather or a scatter sends S (n - 1) / n."""
    held, gradient = held_parameters(run.model, layout, run.adapt), 2 if plan.parallel.compress == "bf16" else FP32
    in_node = max(1, plan.gpus_per_node // layout.tp)  # data-parallel ranks of a node; those of a shard are neighbours

    def send(size: float, ranks: int, neighbours: int) -> Sending:
        size *= (ranks - 1) / ranks
        inside = ranks <= neighbours
        # all ranks of a group that share a node send out of it, each over a link of its own
        bandwidth = plan.node_bandwidth if inside else min(plan.node_bandwidth, plan.network_bandwidth * neighbours)
        return Sending(size, size / bandwidth)

    # a sum is a scatter and a gather; once a step
    summed = send(2 * gradient * held.trained, layout.dp_replicate, max(1, in_node // layout.dp_shard))
    gathered = Sending(0, 0)
    if layout.strategy != "ddp":
        blocks = number_bytes(setting) * held.blocks * (2 if setting.reshard_after_forward else 1)
        each = blocks + FP32 * held.root + gradient * (held.trained_blocks + held.trained_root)
        gathered = send(forwards * each, layout.dp_shard, in_node)
    # around attention and around the MLP a gather and a scatter, forward, backward, and where forward is done again
    again = {"none": 0, "selective": 1, "full": 2}[setting.activation_checkpointing]
    stream = FP32 * run.model.dim * setting.rows * setting.seq_len
    tensor_parallel = send(forwards * run.model.n_layers * (8 + 2 * again) * stream, layout.tp, plan.gpus_per_node)
    data_parallel = Sending(summed.bytes + gathered.bytes, summed.seconds + gathered.seconds)
    return data_parallel, tensor_parallel


def suggest(found: list[Candidate]) -> Candidate | None:
    """The fastest that fits; of those within a hundredth, the first, which is the simplest."""
    fits = [one for one in found if one.fits]
    least = min((one.seconds for one in fits), default=math.inf)
    return next((one for one in fits if one.seconds <= 1.01 * least), None)
