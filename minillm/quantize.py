"""Weight-only int8: every matrix in a byte a number and one scale an output channel, for inference.

    weight (O, I)  ->  weight (O, I) int8 from -127 to 127, scale (O,);  a row is its whole numbers times its scale

The scale is the channel's largest absolute value / 127, so a weight moves by at most half a scale. Channels do not
share one, because the largest value of a matrix is often far above that of most of its rows. Activations stay as they
are.

Shapes: O output channels (of an embedding: tokens), I inputs, D dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.transformer import Transformer

LARGEST = 127  # of int8 without -128, so that both signs reach equally far
HEADROOM = 2.0**-7  # weights enter the product as fractions of 128: as whole numbers their sum could exceed fp16
# Weights turned into floats at a time: on a CPU few enough to stay in its cache, elsewhere mostly the whole matrix,
# because each slice costs a launch.
SLICE = {"cpu": 2**18}
SLICE_ELSEWHERE = 2**26


class Int8Linear(nn.Module):
    """nn.Linear with an int8 weight: (..., I) -> (..., O)."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale = fixed(weight), fixed(scale)
        self.bias = None if bias is None else fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, SLICE.get(x.device.type, SLICE_ELSEWHERE) // self.in_features)
        x = x * HEADROOM
        parts = [F.linear(x, part.to(x.dtype)) for part in self.weight.split(rows)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # (..., O)
        y = y * (self.scale / HEADROOM)  # after the product, which has fewer numbers than the weight
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """nn.Embedding with an int8 weight: (...) -> (..., D)."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.scale = fixed(weight), fixed(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        scale = self.scale[tokens].unsqueeze(-1)  # (..., 1)
        return self.weight[tokens].to(scale.dtype) * scale


def fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def quantize_int8(model: Transformer) -> Transformer:
    """Turn the linear layers and embeddings of a model into int8, in place, one after another; returns the model.

    The scales have the dtype that the weights had. What was tied stays tied. Raises ValueError where a weight is not
    finite.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            weight, scale = to_int8(module.weight.detach(), name)
            if isinstance(module, nn.Linear):
                made = Int8Linear(weight, scale, module.bias)
            else:
                made = Int8Embedding(weight, scale)
            model.set_submodule(name, made.train(module.training))
    model.tie_embeddings()
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has int8 weights."""
    return any(isinstance(module, Int8Linear | Int8Embedding) for module in model.modules())


def to_int8(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """(int8 weight, scale) of a matrix (O, I): weight x scale[:, None] is nearest to it."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)  # (O, 1)
    if not weight.is_meta and not largest.isfinite().all():
        raise ValueError(f"{name}: has weights that are not finite, which int8 cannot hold")
    scale = (largest / LARGEST).to(weight.dtype)  # rounded first, so that the weights fit the scale that is kept
    smallest = torch.finfo(torch.float32).tiny  # for channels that are zero
    whole = (weight.float() / scale.float().clamp(min=smallest)).round().clamp(-LARGEST, LARGEST)
    return whole.to(torch.int8), scale[:, 0]
