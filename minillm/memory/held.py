"""What of a model's parameters a rank holds, and of the optimizer's moments: counted over a model without memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import NamedTuple

import torch

from minillm.distributed.config import Layout
from minillm.distributed.parallelize import ONE
from minillm.lora import adapted
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.optim import OptimConfig, build_optimizer, optimizer_tensors

FP32 = 4  # bytes
Adapt = Callable[[Transformer], object]
SECOND = ("o_proj", "down_proj")  # of the pairs of matrices that tensor parallelism cuts


@dataclass(frozen=True)
class Held:
    """Numbers of parameters on the fullest rank, which is the first: shards are cut from the front."""

    own: int  # its part of all, each once
    bytes: int  # of these
    root: int  # embed, norm and lm_head, gathered over dp_shard
    blocks: int  # all blocks, gathered
    block: int  # the largest of them
    matmul: int  # in linear layers that keep copies of them, gathered
    table: int  # lm_head, gathered
    trained: int  # of own; and of the others
    trained_root: int
    trained_blocks: int
    trained_block: int
    trained_table: int
    reached: int  # blocks through which the gradient passes


class Parameter(NamedTuple):
    """What a parameter is, of a model without memory."""

    name: str
    shape: tuple[int, ...]
    bytes: int  # of a number
    linear: bool  # whether it is a matrix that autocast copies for the backward pass
    trained: bool


@lru_cache(maxsize=64)
def held_parameters(config: ModelConfig, layout: Layout = ONE, adapt: Adapt | None = None) -> Held:
    """Counted over the shapes of all parameters."""
    shards = layout.dp_shard if layout.strategy != "ddp" else 1
    parameters = parameters_of(config, adapt)
    places = ["root", *(f"block {number}" for number in range(config.n_layers))]
    gathered, trained = Counter(dict.fromkeys(places, 0)), Counter(dict.fromkeys(places, 0))
    own, size, own_trained, matmul, table, trained_table = 0, 0, 0, 0, 0, 0
    for parameter in parameters:
        first, *others = tensor_parallel_shape(parameter.name, parameter.shape, layout.tp)
        part = ceil(first / shards) * prod(others)
        whole = part * shards  # padded, so that all parts are equal
        own, size, own_trained = own + part, size + parameter.bytes * part, own_trained + part * parameter.trained
        place = f"block {parameter.name.split('.')[1]}" if parameter.name.startswith("blocks.") else "root"
        gathered[place] += whole
        trained[place] += whole * parameter.trained
        if parameter.linear:
            matmul += whole
        if parameter.name in ("lm_head.weight", "embed.weight"):
            table, trained_table = whole, whole * parameter.trained
    blocks = places[1:]
    embeds = any(parameter.trained for parameter in parameters if parameter.name.split(".")[0].endswith("embed"))
    below = 0 if embeds else next((i for i, block in enumerate(blocks) if trained[block]), len(blocks))
    return Held(
        own=own,
        bytes=size,
        root=gathered["root"],
        blocks=sum(gathered[block] for block in blocks),
        block=max(gathered[block] for block in blocks),
        matmul=matmul,
        table=table,
        trained=own_trained,
        trained_root=trained["root"],
        trained_blocks=sum(trained[block] for block in blocks),
        trained_block=max(trained[block] for block in blocks),
        trained_table=trained_table,
        reached=len(blocks) - below,
    )


def on_meta(config: ModelConfig, adapt: Adapt | None = None) -> Transformer:
    """The model as it is trained, without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    if adapt is not None:
        adapt(model)
    return model


@lru_cache(maxsize=8)
def parameters_of(config: ModelConfig, adapt: Adapt | None = None) -> list[Parameter]:
    """Each parameter; tied ones once, by their first name."""
    model = on_meta(config, adapt)
    copied = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    for layer in adapted(model).values():  # of its frozen weight it keeps no copy
        copied |= {id(layer.lora_a), id(layer.lora_b)}
    return [
        Parameter(name, tuple(p.shape), p.element_size(), id(p) in copied, p.requires_grad)
        for name, p in model.named_parameters()
    ]


def tensor_parallel_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """What a rank of the tp axis holds of a parameter.

    The second matrix of each pair is cut by its inputs, all others by their rows; what follows the second is whole.
    """
    module = name.split(".")[-2]
    if tp == 1 or "norm" in module or (module in SECOND and len(shape) < 2):
        return shape
    dim = 1 if module in SECOND else 0
    return tuple(ceil(size / tp) if i == dim else size for i, size in enumerate(shape))


@lru_cache(maxsize=64)
def moment_bytes(
    config: ModelConfig, name: str, momentum: float | None, layout: Layout = ONE, adapt: Adapt | None = None
) -> int:
    """What the optimizer of that name holds."""
    shards = layout.dp_shard if layout.strategy != "ddp" else 1
    total = 0
    for parameter, shape, size in moment_shapes(config, name, momentum, adapt):
        first, *others = tensor_parallel_shape(parameter, shape, layout.tp) if shape else (shards,)  # or one number
        total += size * ceil(first / shards) * prod(others)
    return total


@lru_cache(maxsize=8)
def moment_shapes(
    config: ModelConfig, name: str, momentum: float | None, adapt: Adapt | None
) -> list[tuple[str, tuple[int, ...], int]]:
    """(parameter, shape, bytes of a number) of each tensor of the optimizer, of one that has no memory."""
    model = on_meta(config, adapt)
    optimizer = build_optimizer(model, OptimConfig(name=name, momentum=momentum, lr=1.0))
    state = optimizer_tensors(optimizer, dict(model.named_parameters()))
    return [(key.split(".", 2)[2], tuple(value.shape), value.element_size()) for key, value in state.items()]
