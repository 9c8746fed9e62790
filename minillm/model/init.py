"""The one place where weights begin.

Each parameter is drawn from a generator of its own, seeded by (seed, name), on the CPU: the same numbers on every
device, under every parallel strategy, and whatever else the model has.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from minillm.model.config import ModelConfig
from minillm.tensors import local_part, narrowed, parameter_names

EMBEDDINGS = ("embed.weight", "pos_embed.weight")
MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
RESIDUAL = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Fills every parameter of a Transformer in place; also right after meta construction and `to_empty`.

    Of a sharded one each rank fills its part.
    """
    for name, parameter in parameter_names(model).items():
        part, offset = local_part(parameter)
        weight = initial_weight(model.config, name, parameter.shape, seed)
        part.copy_(narrowed(weight, offset, part.shape))


def initial_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """The starting value of one parameter, a pure function of its arguments, in fp32 on the CPU.

    | parameter            | starts as                                    | source                                   |
    |----------------------|----------------------------------------------|------------------------------------------|
    | embed, pos_embed     | normal, std 1: what a token is stays visible | Takase et al. 2023 (arXiv:2312.16903)    |
    |                      | beside what the blocks add to it             |                                          |
    | lm_head              | normal, std 1 / dim: logits begin near 0     | Yang et al. 2022 (arXiv:2203.03466)      |
    | the two when tied    | normal, std 1 / sqrt(dim): logits of std 1   | Vaswani et al. 2017, in their code       |
    | q, k, v, gate, up    | normal, std 1 / sqrt(inputs)                 | LeCun et al. 1998, section 4.6           |
    | o_proj, down_proj    | the same / sqrt(2 n_layers): as many         | Radford et al. 2019 (GPT-2), section 2.3 |
    |                      | branches add up in the residual stream       |                                          |
    | biases               | 0                                            |                                          |
    | norm weights         | 1; 0 where the norm adds 1 to them           |                                          |
    | rows beyond the      | 0: they take part in nothing                 |                                          |
    | vocabulary           |                                              |                                          |
    """
    if name.endswith("norm.weight"):
        plus_one = config.norm == "rmsnorm_plus_one" and not name.endswith(("q_norm.weight", "k_norm.weight"))
        return torch.zeros(shape) if plus_one else torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    dim = shape[1]  # of what a row is multiplied with, or of an embedding
    if name in EMBEDDINGS:
        std = dim**-0.5 if config.tie_embeddings else 1.0
    elif name == "lm_head.weight":
        std = 1 / dim
    elif name.endswith(MATRICES):
        std = dim**-0.5
    elif name.endswith(RESIDUAL):
        std = dim**-0.5 / math.sqrt(2 * config.n_layers)
    else:
        raise ValueError(f"{name}: no rule says how this parameter begins; add one to minillm/model/init.py")
    # padding rows are not drawn, so that padding does not change what the real rows begin with
    rows = config.vocab_size if name in ("embed.weight", "lm_head.weight") else shape[0]
    weight = torch.zeros(shape)
    weight[:rows].normal_(0.0, std, generator=torch.Generator().manual_seed(parameter_seed(seed, name)))
    return weight


def parameter_seed(seed: int, name: str) -> int:
    """A generator seed that depends on both and on nothing else; Python's own hash changes with every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
