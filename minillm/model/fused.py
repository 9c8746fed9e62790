"""Formulas whose gradients are written out by hand, because autograd would keep or write more than it needs.

Autograd keeps every intermediate result until the backward pass. Here only the inputs are kept and the rest is worked
out again, which costs less than reading it back from memory. The values are those of the plain formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The y and the r of `RMSNormFunction`, without keeping anything."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse, and fp16 too small
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)  # (..., 1)
    r = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight).to(x.dtype), r


class RMSNormFunction(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), keeping x and one r a vector.

    Backward, with n = x r (the normalised x), g the gradient of y, and means over the last dim:
        dw = sum over vectors of g n,    dx = r (g w - n mean(g w n)).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        n = x * r  # (..., D), in the dtype of r
        gn = g * n
        d_weight = gn.sum(dim=tuple(range(g.dim() - 1)))
        mean = gn.mul_(weight).mean(dim=-1, keepdim=True)  # (..., 1)
        d_x = (g * weight).sub_(n.mul_(mean)).mul_(r)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class SwiGLUFunction(torch.autograd.Function):
    """y = silu(gate) up, keeping gate and up but not silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


class OverlappingSlices(torch.autograd.Function):
    """Slices of dim 2, such as the keys of each block of queries, without a copy.

    Autograd by itself would make a gradient of full size for each slice; here all are added up in one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ranges: tuple[range, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[:, :, r.start : r.stop] for r in ranges)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        d_x = gradients[0].new_zeros(ctx.shape)
        for r, gradient in zip(ctx.ranges, gradients):
            d_x[:, :, r.start : r.stop] += gradient
        return d_x, None
