"""How much memory training takes on each rank, by part, before it is begun; and which settings fit.

What a step holds at its peak: the weights and the optimizer's moments all the time, and either what the forward pass
keeps for the backward pass (activations) with the loss on top, or the gradients that take their place. Where several
micro-batches add up, the gradients of the earlier ones are there too. A layout says how much of the parameters a rank
holds of its own (shard.py), and what comes beside it (buffers): DDP's gradients lie in buckets that always exist; FSDP2
gathers a block when it is its turn, and the tables of the root for the whole step.

The activations are counted from what each operation keeps for its backward pass, in numbers a token:

    a norm          its input                     D
    a projection    its input                     D or F, shared by those that read the same one
    attention       q, k, v and the output        2 H d + 2 K d, and a number a head
    a gated MLP     gate, up and their product    3 F

Only the residual stream is fp32 under autocast; the rest is half as large, but each projection keeps its own copy.

Frozen weights have neither gradients nor moments, and blocks below all that is trained keep no activations. An adapter
keeps r numbers more, its inputs once more under dropout, and the layer's output under DoRA.

Shapes: D dim, F ffn_dim, H heads, K key/value heads, d head_dim, T length, V vocab.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from minillm.distributed.config import Layout
from minillm.distributed.parallelize import ONE
from minillm.lora import adapted
from minillm.losses.heads import default_chunk_tokens
from minillm.memory.held import FP32, Adapt, held_parameters, moment_bytes, on_meta
from minillm.model.config import ModelConfig
from minillm.optim import OptimConfig

Checkpointing = Literal["none", "selective", "full"]
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a step takes, beside the model and the layout."""

    rows: int  # sequences a forward: micro_batch_size
    seq_len: int
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Checkpointing = "none"
    accumulates: bool = False  # whether a step has more than one micro-batch
    device_type: str = "cpu"
    reshard_after_forward: bool = True
    adapt: Adapt | None = None  # freezes weights of a model and adds adapters; None: all is trained


@dataclass(frozen=True)
class Memory:
    """Bytes by part on the fullest rank, and the most at once, which is less than their sum."""

    weights: int
    gradients: int
    moments: int
    activations: int  # kept for the backward pass, and one block's working memory there
    logits: int  # of a chunk of tokens, and the gradients that the chunked loss makes at once
    buffers: int  # half-precision copies of weights; what FSDP2 gathers, and sends
    peak: int

    def describe(self) -> str:
        """The parts in one line."""
        parts = ("weights", "gradients", "moments", "activations", "logits", "buffers")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.2g}" for name in parts)


def estimate(config: ModelConfig, optim: OptimConfig, setting: Setting, layout: Layout = ONE) -> Memory:
    """The memory of a training step by part, the device's own libraries left out."""
    mode, tokens, number = setting.activation_checkpointing, setting.rows * setting.seq_len, number_bytes(setting)
    sharded, bucketed = layout.strategy != "ddp", layout.strategy == "ddp" and layout.dp_replicate > 1
    held, tied = held_parameters(config, layout, setting.adapt), config.tie_embeddings
    weights, gradients = held.bytes, FP32 * held.trained
    moments = moment_bytes(config, optim.name, optim.momentum, layout, setting.adapt)

    attention, rest = block_bytes(config, setting, layout.tp)
    adapters = adapter_bytes(config, setting.adapt, number) if setting.adapt else 0
    stream = FP32 * config.dim // layout.tp  # tensor parallelism cuts it along the sequence
    kept = {"none": attention + rest, "selective": stream + rest, "full": stream}[mode]
    again = {"none": 0, "selective": attention, "full": attention + rest}[mode]
    # backward through a block: what is computed again, and gradients of the MLP's inner vectors and of the stream
    working = tokens * (again + number * (2 * config.ffn_dim // layout.tp + 2 * config.dim))
    activations = tokens * (held.reached * kept + {"none": adapters, "selective": adapters, "full": 0}[mode])

    table = FP32 * held.trained_table  # the loss makes its gradients, of the head's weight and of rows, at once
    rows = FP32 * config.dim * tokens
    chunk_tokens = default_chunk_tokens(tokens, config.vocab_size, torch.device(setting.device_type))
    logits = chunk_tokens * (config.vocab_size // layout.tp) * (FP32 if number == FP32 else FP32 + number)

    # autocast makes a copy of each matrix, which is kept until the backward pass has used it; FSDP2 gathers blocks as
    # such copies, and the root's tables, in fp32, for the whole step
    copies = 0 if number == FP32 else number * (held.table if sharded else held.matmul)
    root, root_gradient = (FP32 * held.root, FP32 * held.trained_root) if sharded else (0, 0)
    kept_blocks = number * held.blocks if sharded and not setting.reshard_after_forward else 0
    # of a block in backward: its weights, those of the next, which come early, and its gradients; where those are few,
    # the weights of the one before, which go late
    passing = number * (3 * held.block if setting.reshard_after_forward else held.trained_block) if sharded else 0
    block_sent = FP32 * held.trained_block if sharded else 0  # what gradients of the one before are sent from

    # gradients of earlier micro-batches; DDP's buckets are there from the start, beside them, and FSDP2 keeps the
    # buffer that it sent the root's from
    earlier = gradients * (bucketed + setting.accumulates) + root_gradient * setting.accumulates

    final_norm = tokens * (stream + FP32 * config.dim)  # its input and its output
    until_backward = copies + root + kept_blocks + activations + table + rows + earlier
    if sharded:
        # a block's gradients are sent when it is through, the root's last, from a buffer that a CPU fills from another
        blocks_done = held.trained_blocks - held.trained_block
        done = gradients if setting.accumulates else FP32 * blocks_done // layout.dp_shard
        sent = 2 * root_gradient + table if setting.device_type == "cpu" else root_gradient + (1 if tied else 2) * table
        sent += root_gradient // layout.dp_shard  # and what is received
        at_the_end = done + max(
            root + working + passing + block_sent + table, rows + root + (3 if tied else 2) * table, rows + sent
        )
    else:
        # the gradients of tied tables wait for each other, to be added up into a third; a bucket gets a copy
        # of it, and two more are on the way where tensor parallelism has cut the table
        waiting = (2 if tied else 0) + bucketed + (2 if layout.tp > 1 else 0)
        at_the_end = gradients + max(working + tied * bucketed * table, rows + waiting * table)
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        activations=activations + final_norm + working,
        logits=table + rows + logits,
        buffers=copies + root + kept_blocks + passing + block_sent,
        peak=weights + moments + max(until_backward + max(final_norm + logits, working + passing), at_the_end),
    )


def number_bytes(setting: Setting) -> int:
    """Bytes of a number that a matrix product reads."""
    return FP32 if setting.precision == "fp32" else 2


def block_bytes(config: ModelConfig, setting: Setting, tp: int = 1) -> tuple[int, int]:
    """Bytes a token that the attention of a block keeps, and those that the rest of it keeps.

    Each rank of the tp axis has a part of the heads, of the MLP's width, and of the sequence that the norms read.
    """
    D, F, number = config.dim, config.ffn_dim // tp, number_bytes(setting)
    heads = config.n_heads // tp
    q, kv = heads * config.head_dim, config.n_kv_heads * config.head_dim // tp
    gated, shared = config.mlp in ("swiglu", "geglu"), number == FP32  # autocast makes each projection its own input
    attention = number * ((1 if shared else 3) * D + 2 * q + 2 * kv) + FP32 * heads
    if config.qk_norm:
        attention += number * (q + kv)
    if setting.device_type == "cpu":  # its attention works on parts, whose outputs are joined in a copy
        attention += number * q
    inner = {"swiglu": 3, "geglu": 4}.get(config.mlp, 2)
    rest = FP32 * 2 * D // tp + number * ((1 if shared or not gated else 2) * D + inner * F)
    if config.dropout:
        rest += number * 2 * D
        if setting.device_type == "cpu":  # no fused kernel drops out: the weights, the mask and their product are kept
            attention += 3 * number * heads * setting.seq_len
    return attention, rest


@lru_cache(maxsize=8)
def adapter_bytes(config: ModelConfig, adapt: Adapt, number: int) -> int:
    """Bytes a token that adapters keep for the backward pass, over all blocks, beside what the layers keep."""
    total = 0
    for layer in adapted(on_meta(config, adapt)).values():
        total += number * layer.config.r
        if layer.config.dropout:  # the inputs that are left, and which
            total += (number + 1) * layer.in_features
        if layer.magnitude is not None:
            total += number * layer.out_features
    return total
