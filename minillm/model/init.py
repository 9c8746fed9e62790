"""The one place where weights begin.

Each parameter is drawn from a generator of its own, seeded by (seed, name), on the CPU: the same numbers on every
device, under every parallel strategy, and whatever else the model has.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from minillm.model.config import ModelConfig

RESIDUAL = ("attn.o_proj.weight", "mlp.down_proj.weight")
MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Fills every parameter of a Transformer in place; also right after meta construction and `to_empty`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_weight(model.config, name, parameter.shape, seed))


def initial_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """The starting value of one parameter, a pure function of its arguments, in fp32 on the CPU.

    | parameter            | rule                     | source                                                       |
    |----------------------|--------------------------|--------------------------------------------------------------|
    | embed, lm_head       | normal, std 0.02         | GPT-2 (Radford et al. 2019)                                  |
    | pos_embed            | normal, std 0.02         | GPT-2's code has 0.01; 0.02 as in its Hugging Face form      |
    | q, k, v, gate, up    | normal, sqrt(2 / 5 dim)  | Nguyen and Salazar 2019; 0.02 at width 1000, more below      |
    | o_proj, down_proj    | that / sqrt(2 n_layers)  | GPT-2: 2 n_layers branches add up in the residual stream     |
    | biases               | 0                        |                                                              |
    | norm weights         | 1                        |                                                              |
    | rows beyond the vocabulary | 0                  | they take part in nothing                                    |
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    if name in ("embed.weight", "lm_head.weight"):
        weight = torch.zeros(shape)
        # drawn without the padding rows, so that padding does not change what the real rows begin with
        weight[: config.vocab_size] = 0.02 * torch.randn(config.vocab_size, shape[1], generator=generator)
        return weight
    if name == "pos_embed.weight":
        return 0.02 * torch.randn(shape, generator=generator)
    std = math.sqrt(2 / (5 * config.dim))
    if name.endswith(RESIDUAL):
        return std / math.sqrt(2 * config.n_layers) * torch.randn(shape, generator=generator)
    if name.endswith(MATRICES):
        return std * torch.randn(shape, generator=generator)
    raise ValueError(f"{name}: no rule says how this parameter begins; add one to minillm/model/init.py")


def parameter_seed(seed: int, name: str) -> int:
    """A generator seed that depends on both and on nothing else; Python's own hash changes with every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
