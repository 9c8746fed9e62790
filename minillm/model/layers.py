"""The small parts of a block: normalisation, rotary positions, and the kinds of MLP.

Shapes: B batch, T time, D dim, F ffn_dim, H heads, d head_dim.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.config import ModelConfig
from minillm.model.fused import RMSNormFunction, SwiGLUFunction


class RMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1, then by a learned weight: x / sqrt(mean(x^2) + eps) * weight.

    The mean is taken in fp32 whatever the dtype of x. Source: Zhang and Sennrich 2019.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:  # torch has no kernel for it there, and its composite form takes four times as long
            return RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).type_as(x)


class RMSNormPlusOne(RMSNorm):
    """RMSNorm that scales by 1 + weight, so that weights begin at 0. Source: Gemma Team 2024, in their code."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            return RMSNormFunction.apply(x, 1 + self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps).type_as(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that the config names, over the residual stream."""
    norms = {
        "rmsnorm": RMSNorm,
        "rmsnorm_plus_one": RMSNormPlusOne,
        "layernorm": nn.LayerNorm,
        "layernorm_plain": partial(
            nn.LayerNorm, elementwise_affine=False
        ),  # Groeneveld et al. 2024 (OLMo), section 2.1
    }
    return norms[config.norm](config.dim, eps=config.norm_eps)


class Rope:
    """Rotary positions: turns the pair (x[i], x[i + d/2]) of a head by the angle position * theta^(-2i/d).

    A query at position m and a key at position n then meet at an angle that depends on m - n alone. Computed from
    positions once a forward and handed to every block: no buffers, and fp32 angles however the model is cast.
    Source: Su et al. 2021, with the pairing of the Llama weights on the Hugging Face hub.
    """

    def __init__(self, positions: Tensor, head_dim: int, theta: float):
        """positions: (B, T), or (1, T) where all rows share them."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # (d/2,)
        angles = positions[:, None, :, None] * (1.0 / theta**exponents)  # (B, 1, T, d/2): the heads share them
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, H, T, d) -> the same shape and dtype, rotated."""
        x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, d/2) each
        rotated = torch.cat([x1 * self.cos - x2 * self.sin, x2 * self.cos + x1 * self.sin], dim=-1)
        return rotated.type_as(x)


Rotation = Callable[[Tensor], Tensor]  # of queries or keys: a Rope, or no_rotation


def no_rotation(x: Tensor) -> Tensor:
    """Stands where Rope would, in models with learned positions or none."""
    return x


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form of GPT-2. Source: Hendrycks and Gimpel 2016."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU. Source: So et al. 2021 (Primer)."""
    return F.relu(x).square()


class GatedMLP(nn.Module):
    """down(gated(gate(x), up(x))): one projection decides how much of the other passes. Source: Shazeer 2020."""

    def __init__(self, config: ModelConfig, gated: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.gated = gated
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))  # (B, T, F) inside, (B, T, D)


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, F) inside, (B, T, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return SwiGLUFunction.apply(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up."""
    return gelu(gate) * up


MLPS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "swiglu": partial(GatedMLP, gated=swiglu),
    "geglu": partial(GatedMLP, gated=geglu),
    "gelu": partial(PlainMLP, activation=gelu),
    "gelu_exact": partial(PlainMLP, activation=F.gelu),
    "relu2": partial(PlainMLP, activation=relu2),
}


def make_mlp(config: ModelConfig) -> nn.Module:
    """The MLP that the config names."""
    return MLPS[config.mlp](config)
