"""The small parts of a block: normalisation, and the kinds of MLP.

Shapes: B batch, T time, D dim, F ffn_dim.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.config import ModelConfig
from minillm.model.fused import RMSNormFunction, SwiGLUFunction, rms_norm

FEW_ROWS = 4  # vectors at once, on a CPU


class Linear(nn.Linear):
    """nn.Linear; on a CPU a few vectors are multiplied from the other side, and one as if there were two: faster.

    What takes the time is reading the weights. MKL reads those of 1408 x 512 in fp32 (x86 with AVX512, one thread) in
    0.29 ms for one vector, 0.39 for two and 0.34 for four; as W x^T in 0.14 for two, 0.23 for four and 0.59 for eight.
    """

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // self.in_features
        if torch.is_grad_enabled() or not x.is_cpu or not 0 < n <= FEW_ROWS:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(n, -1)  # (n, in)
        rows = rows if n > 1 else rows.expand(2, -1).contiguous()
        y = (self.weight @ rows.T)[:, :n].T.contiguous().view(*x.shape[:-1], -1)  # (..., out)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1, then by a learned weight: x / sqrt(mean(x^2) + eps) * weight.

    The mean is taken in fp32 whatever the dtype of x. Source: Zhang and Sennrich 2019.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.weight)

    def scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        """x at a root mean square of 1, times the weight."""
        if not x.is_cpu:
            return F.rms_norm(x, weight.shape, weight, self.eps).type_as(x)
        if torch.is_grad_enabled():  # torch has no kernel for it there, and its composite form takes four times as long
            return RMSNormFunction.apply(x, weight, self.eps)
        return rms_norm(x, weight, self.eps)[0]


class RMSNormPlusOne(RMSNorm):
    """RMSNorm that scales by 1 + weight, so that weights begin at 0. Source: Gemma Team 2024, in their code."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, 1 + self.weight)


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
        self.gate_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))  # (B, T, F) inside, (B, T, D)


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, F) inside, (B, T, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return SwiGLUFunction.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


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
