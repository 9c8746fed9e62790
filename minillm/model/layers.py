"""The small parts of a block: normalisation, rotary positions, and the two kinds of MLP.

Shapes: B batch, T time, D dim, F ffn_dim, H heads, d head_dim.
"""

from collections.abc import Callable

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


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that the config names, over the residual stream."""
    norm = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return norm(config.dim, eps=config.norm_eps)


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


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one projection decides how much of the other passes. Source: Shazeer 2020."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x))  # (B, T, F): silu(gate) * up
        return self.down_proj(y)  # (B, T, D)


class GELU(nn.Module):
    """down(gelu(up(x))), with GPT-2's tanh approximation. Source: Hendrycks and Gimpel 2016."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up_proj(x), approximate="tanh")  # (B, T, F)
        return self.down_proj(y)  # (B, T, D)


def make_mlp(config: ModelConfig) -> nn.Module:
    """The MLP that the config names."""
    return {"swiglu": SwiGLU, "gelu": GELU}[config.mlp](config)
