"""How fast a training step is beside transformers and litgpt on the same shapes, and how much memory it takes.

    python benchmarks/train_step.py [--compile] [--shapes llama-26m gpt2-30m] [--threads 2] [--rounds 9] [--device cpu]
    python benchmarks/train_step.py --memory [--shapes llama-100m]

A step is everything from a batch of tokens to changed weights: forward, loss, backward, the gradient's norm and its
limit, AdamW, gradients dropped. minillm's is `Trainer.step`, built as train.py builds it. The others run as their
authors run them, at their best: see `transformers_step` and `litgpt_step`. All learn from the same random tokens, in
fp32 on a CPU and under bf16 autocast elsewhere. A peer that cannot be imported is named and left out.

Speed: one process, all models in it, one step of each in turn, so that a machine that speeds up and slows down meets
all alike. Printed are medians over the rounds: of tokens a second, and of the other's time divided by minillm's in the
same round (above 1: minillm is faster), on the wall and, for a CPU that others use too, in CPU time.

Memory: each model in a fresh process; the largest resident size (on an accelerator, allocated size) during three steps
less that before the first. Weights are not in it; gradients and AdamW's moments are, 12 bytes a parameter.
"""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from beside import LLAMA_26M, Seconds, as_transformers, compared, importable, in_fresh_process, machine, table, timed
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.distributed.context import Context
from minillm.distributed.device import find_device, peak_memory
from minillm.distributed.parallelize import parallelize
from minillm.model.config import ModelConfig
from minillm.model.presets import gpt2, llama2
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.trainer import TrainConfig, Trainer

LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0

Step = Callable[[Batch], float]  # returns the mean loss, which also waits for the device


class Shape(NamedTuple):
    """A model, and the batch it learns from: B sequences of T tokens."""

    model: ModelConfig
    B: int
    T: int


class Contender(NamedTuple):
    """A library's model with all that a step of it needs."""

    name: str
    parameters: int
    step: Step


GPT2_30M = {"dim": 384, "n_layers": 6, "n_heads": 6}
SHAPES = {
    "llama-26m": Shape(llama2(vocab_size=6400, max_seq_len=512, **LLAMA_26M), B=4, T=512),
    "llama-100m": Shape(llama2(vocab_size=151_936, max_seq_len=512, **LLAMA_26M), B=4, T=512),
    "gpt2-30m": Shape(gpt2(vocab_size=50_304, max_seq_len=256, **GPT2_30M), B=8, T=256),
    "llama-tiny": Shape(llama2(vocab_size=96, max_seq_len=16, **LLAMA_26M | {"dim": 32, "ffn_dim": 64}), B=2, T=16),
    "gpt2-tiny": Shape(gpt2(vocab_size=96, max_seq_len=16, **GPT2_30M | {"dim": 36}), B=2, T=16),
}


# --- the contenders ---------------------------------------------------------------------------------------------------


class OneBatch:
    """A loader that has only the batch it is given, so that no time goes into loading."""

    def __init__(self, shape: Shape):
        self.samples_per_step = self.samples_per_epoch = shape.B
        self.tokens_per_step = shape.B * shape.T
        self.batch: Batch | None = None

    def batches(self, cursor: int) -> list[Batch]:
        return [self.batch]


def minillm_step(shape: Shape, device: torch.device, compile: bool) -> Contender:
    """The trainer's own step, with everything that is in it."""
    model = Transformer(shape.model).to(device)
    optim = OptimConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY, grad_clip=GRAD_CLIP)
    optimizer = build_optimizer(model, optim)
    parallelize(model, "none", compile)
    loader = OneBatch(shape)
    trainer = Trainer(
        model,
        optimizer,
        NextToken(shape.model.vocab_size),
        loader,
        TrainConfig(precision="fp32" if device.type == "cpu" else "bf16", micro_batch_size=shape.B),
        steps=10**9,
        lr_at=lambda step: LR,
        dist=Context(device),
        grad_clip=optim.grad_clip,
    )

    def step(batch: Batch) -> float:
        loader.batch = batch
        return trainer.step()["loss"]

    return Contender("minillm", count(model), step)


def transformers_step(shape: Shape, device: torch.device, compile: bool) -> Contender:
    """transformers: its model with SDPA, its default, and its own loss; no key/value cache, which is for generation."""
    model = as_transformers(Transformer(shape.model)).to(device).train()
    model.config.use_cache = False
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        # shift_labels: targets that are shifted already, which saves it that work
        return forward(input_ids=batch.tokens, labels=batch.tokens, shift_labels=batch.targets).loss

    return Contender("transformers", count(model), plain_step(model, loss, device))


def litgpt_step(shape: Shape, device: torch.device, compile: bool) -> Contender:
    """litgpt: its model and its chunked loss, as its pretraining script calls them.

    It has no learned positions: a GPT-2 shape goes without any there, which saves it some work.
    """
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    config = shape.model
    is_llama = config.position == "rope"
    model = litgpt.GPT(
        litgpt.Config(
            block_size=config.max_seq_len,
            n_layer=config.n_layers,
            n_embd=config.dim,
            n_head=config.n_heads,
            n_query_groups=config.n_kv_heads,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            intermediate_size=config.ffn_dim,
            norm_class_name="RMSNorm" if is_llama else "LayerNorm",
            norm_eps=config.norm_eps,
            mlp_class_name="LLaMAMLP" if is_llama else "GptNeoxMLP",
            gelu_approximate="tanh",
            rotary_percentage=1.0 if is_llama else 0.0,
            bias=config.qkv_bias,
            parallel_residual=False,
        )
    )
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight
    model = model.to(device).train()
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        return chunked_cross_entropy(forward(batch.tokens), batch.targets)

    return Contender("litgpt", count(model), plain_step(model, loss, device))


def plain_step(model: nn.Module, mean_loss: Callable[[Batch], Tensor], device: torch.device) -> Step:
    """A step as it is usually written, with torch's fused AdamW: what minillm uses, and transformers by default."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch: Batch) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = mean_loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


CONTENDERS = {"minillm": minillm_step, "transformers": transformers_step, "litgpt": litgpt_step}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def random_batch(shape: Shape, seed: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(shape.model.vocab_size, (shape.B, shape.T + 1), generator=generator).to(device)  # (B, T+1)
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None, None)


# --- speed ------------------------------------------------------------------------------------------------------------


def measure_speed(name: str, names: list[str], device: torch.device, options: argparse.Namespace) -> None:
    """Print the rows of one shape."""
    shape = SHAPES[name]
    contenders = [CONTENDERS[peer](shape, device, options.compile) for peer in names]
    for seed in range(options.warmup):
        for contender in contenders:
            check_loss(contender, contender.step(random_batch(shape, seed, device)), shape)
    seconds: dict[str, list[Seconds]] = {contender.name: [] for contender in contenders}
    for seed in range(options.rounds):
        batch = random_batch(shape, options.warmup + seed, device)
        for contender in contenders:
            seconds[contender.name].append(timed(contender.step, batch, device))
    mode = "compiled" if options.compile else "eager"
    for contender, one in zip(contenders, compared(seconds, shape.B * shape.T)):
        row = f"| {name} | {mode} | {one.name} | {contender.parameters:,} | {one.rate:,.0f} |"
        print(f"{row} {one.wall:.2f} | {one.cpu:.2f} |", flush=True)


def check_loss(contender: Contender, loss: float, shape: Shape) -> None:
    """Random tokens are all that the models see: a loss far from that of guessing means that something is not right."""
    guessing = math.log(shape.model.vocab_size)
    assert abs(loss - guessing) < 1, f"{contender.name}: the loss is {loss:.3f}, that of guessing is {guessing:.3f}"


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_of_steps(peer: str, name: str, device: str, threads: int, steps: int = 3) -> tuple[int, int]:
    """(parameters, bytes that `steps` steps needed beside what was there before), in the process that calls it."""
    torch.set_num_threads(threads)
    shape, on = SHAPES[name], find_device(device)
    contender = CONTENDERS[peer](shape, on, compile=False)
    batches = [random_batch(shape, seed, on) for seed in range(steps)]
    before = memory_now(on)
    for batch in batches:
        check_loss(contender, contender.step(batch), shape)
    return contender.parameters, peak_memory(on) - before


def memory_now(device: torch.device) -> int:
    """Bytes in use: of the device where it counts them, else of the process (from /proc, so on Linux)."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_memory(name: str, names: list[str], options: argparse.Namespace) -> None:
    """Print the rows of one shape."""
    results = {
        peer: in_fresh_process(partial(memory_of_steps, peer, name, options.device, options.threads)) for peer in names
    }
    ours = results["minillm"][1]
    for peer, (parameters, needed) in results.items():
        state = 12 * parameters  # fp32: the gradient and two moments
        print(
            f"| {name} | {peer} | {parameters:,} | {megabytes(4 * parameters)} | {megabytes(state)} | "
            f"{megabytes(needed - state)} | {megabytes(needed)} | {ours / needed:.2f} |",
            flush=True,
        )


def megabytes(n: int) -> str:
    return f"{n / 1e6:,.0f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="llama-26m gpt2-30m; with --memory llama-100m")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    print(machine(device, options.threads, ["transformers", "litgpt"]))
    names = importable([name for name in CONTENDERS if name in ("minillm", *options.contenders)])
    if options.memory:
        table("shape", "", "parameters", "weights MB", "gradients, moments", "the rest", "needed MB", "minillm's share")
        for name in options.shapes or ["llama-100m"]:
            measure_memory(name, names, options)
        return
    table("shape", "mode", "", "parameters", "tokens/s", "its time / minillm's", "in CPU time")
    for name in options.shapes or ["llama-26m", "gpt2-30m"]:
        measure_speed(name, names, device, options)


if __name__ == "__main__":
    main()
