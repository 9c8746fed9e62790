"""How much memory training takes, by part, before it is begun; and which settings fit.

What a step holds at its peak: the weights and the optimizer's moments all the time, and either what the forward pass
keeps for the backward pass (activations) with the loss on top, or the gradients that take their place. Where several
micro-batches add up, the gradients of the earlier ones are there too.

The activations are counted from what each operation keeps for its backward pass, in numbers a token:

    a norm          its input                     D
    a projection    its input                     D or F, shared by those that read the same one
    attention       q, k, v and the output        2 H d + 2 K d, and a number a head
    a gated MLP     gate, up and their product    3 F

Only the residual stream is fp32 under autocast; the rest is half as large, but each projection keeps its own copy.

Shapes: D dim, F ffn_dim, H heads, K key/value heads, d head_dim, T length, V vocab.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from minillm.losses.heads import default_chunk_tokens
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.optim import OptimConfig, build_optimizer, optimizer_tensors
from minillm.plan import count_parameters

Checkpointing = Literal["none", "selective", "full"]
FP32 = 4  # bytes
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a step takes, beside the model."""

    rows: int  # sequences a forward: micro_batch_size
    seq_len: int
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Checkpointing = "none"
    accumulates: bool = False  # whether a step has more than one micro-batch
    device_type: str = "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and the most at once."""

    weights: int
    moments: int
    gradients: int
    activations: int  # kept for the backward pass, and one block's working memory there
    loss: int  # logits of a chunk of tokens, and the gradients that the chunked loss makes at once
    peak: int

    def describe(self) -> str:
        """The parts in one line."""
        parts = ("weights", "moments", "gradients", "activations", "loss")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.2g}" for name in parts)


def estimate(config: ModelConfig, optim: OptimConfig, setting: Setting) -> Memory:
    """The memory of a training step by part, the device's own libraries left out."""
    mode, tokens, number = setting.activation_checkpointing, setting.rows * setting.seq_len, number_bytes(setting)
    count, moments = parameter_count(config), moment_bytes(config, optim.name, optim.momentum)
    weights = gradients = FP32 * count.total
    # autocast makes a copy of each matrix, which is kept until the backward pass has used it
    copies = 0 if setting.precision == "fp32" else number * count.matmul
    attention, rest = block_bytes(config, setting)
    kept = {"none": attention + rest, "selective": FP32 * config.dim + rest, "full": FP32 * config.dim}[mode]
    again = {"none": 0, "selective": attention, "full": attention + rest}[mode]
    # backward through a block: what is computed again, and gradients of the MLP's inner vectors and of the stream
    working = tokens * (again + number * (2 * config.ffn_dim + 2 * config.dim))
    activations = tokens * (config.n_layers * kept + 2 * FP32 * config.dim)  # the final norm's input and output too

    head = FP32 * config.padded_vocab_size * config.dim  # the loss makes its gradients, of weight and rows, at once
    rows = FP32 * config.dim * tokens
    chunk_tokens = default_chunk_tokens(tokens, config.vocab_size, torch.device(setting.device_type))
    logits = chunk_tokens * config.vocab_size * (FP32 if number == FP32 else FP32 + number)
    earlier = gradients if setting.accumulates else 0
    at_the_loss = copies + activations + head + rows + max(logits, working) + earlier
    # at the end all gradients are there; of tied tables, that of the embedding beside that of the head
    at_the_end = gradients + working + (head if config.tie_embeddings else 0)
    peak = weights + moments + max(at_the_loss, at_the_end)
    return Memory(weights + copies, moments, gradients, activations + working, head + rows + logits, peak)


def number_bytes(setting: Setting) -> int:
    """Bytes of a number that a matrix product reads."""
    return FP32 if setting.precision == "fp32" else 2


parameter_count = lru_cache(maxsize=8)(count_parameters)  # asked for each of many settings of one model


@lru_cache(maxsize=8)
def moment_bytes(config: ModelConfig, name: str, momentum: float | None) -> int:
    """What the optimizer of that name holds, counted on one that has no memory."""
    with torch.device("meta"):
        model = Transformer(config)
    optimizer = build_optimizer(model, OptimConfig(name=name, momentum=momentum, lr=1.0))
    state = optimizer_tensors(optimizer, dict(model.named_parameters()))
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def block_bytes(config: ModelConfig, setting: Setting) -> tuple[int, int]:
    """Bytes a token that the attention of a block keeps, and those that the rest of it keeps."""
    D, F, number = config.dim, config.ffn_dim, number_bytes(setting)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    gated, shared = config.mlp in ("swiglu", "geglu"), number == FP32  # autocast makes each projection its own input
    attention = number * ((1 if shared else 3) * D + 2 * q + 2 * kv) + FP32 * config.n_heads
    if config.qk_norm:
        attention += number * (q + kv)
    if setting.device_type == "cpu":  # its attention works on parts, whose outputs are joined in a copy
        attention += number * q
    inner = {"swiglu": 3, "geglu": 4}.get(config.mlp, 2)
    rest = FP32 * 2 * D + number * ((1 if shared or not gated else 2) * D + inner * F)
    if config.dropout:
        rest += number * 2 * D
        if setting.device_type == "cpu":  # no fused kernel drops out: the weights, the mask and their product are kept
            attention += 3 * number * config.n_heads * setting.seq_len
    return attention, rest


# --- what fits --------------------------------------------------------------------------------------------------------


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


def memory_advice(config: ModelConfig, optim: OptimConfig, setting: Setting, free: int | None) -> str:
    """What a run that ran out of memory needed, and the settings that would fit; `free`: bytes there were for it."""
    needed = estimate(config, optim, setting)
    said = f"by estimate training takes {needed.peak / GIB:.2g} GiB ({needed.describe()})"
    if free is None:
        return f"{said}; lower train.micro_batch_size, or set train.activation_checkpointing to full"
    room, least = usable(free, setting.device_type), needed.peak
    said += f", and {free / GIB:.2g} GiB were free, which hold {max(0, room) / GIB:.2g} of tensors"
    for change, smaller, other in alternatives(setting, optim):
        peak = estimate(config, other, smaller).peak
        if peak <= room:
            words = " ".join(f"--{name} {value}" for name, value in change.items())
            return f"{said}; what would fit: {words} ({peak / GIB:.2g} GiB)"
        least = min(least, peak)
    return (
        f"{said}; no setting fits, the least takes {least / GIB:.2g} GiB: choose a smaller model (model.dim, "
        "model.n_layers, tokenizer.vocab_size) or a shorter data.seq_len"
    )
