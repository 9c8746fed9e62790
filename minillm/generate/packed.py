"""Weights in the order in which a CPU multiplies some rows by them, for as long as texts are generated.

torch's usual product arranges the weights anew each time, which for a few rows takes longer than the product. oneDNN
can be handed weights that were arranged before: 8 rows of a 26M model then take half the time in fp32 (x86 with AVX512;
three quarters with AVX2). What is arranged is a copy, so it takes the memory of the weights once more, and does not see
what becomes of them until it is made anew.

Shapes: n rows, I inputs, O outputs.
"""

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from minillm.distributed.device import free_memory
from minillm.model.layers import Linear

FEWEST_ROWS = 3  # below, `Linear` is as fast
MOST_OF_FREE_MEMORY = 0.5


class PackedLinear(Linear):
    """A linear layer of fp32 on a CPU, with a copy of its weight as oneDNN wants it. Without gradients."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() < FEWEST_ROWS * self.in_features or x.dtype != torch.float32:  # autocast may have begun since
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(module: nn.Module) -> nn.Module:
    """The module with its linear layers packed; it shares everything else with the one that is given, which stays."""
    if type(module) in (Linear, nn.Linear) and not has_hooks(module):
        return PackedLinear(module)
    if stays(module):
        return module
    twin = copy.copy(module)
    twin._modules = {name: None if child is None else pack(child) for name, child in module._modules.items()}
    return twin


def stays(module: nn.Module) -> bool:
    """Whether a module has no twin: torch.compile made it of another, or its weights are computed as they are read."""
    return "_orig_mod" in module._modules or "parametrizations" in module._modules


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through a module, which a layer in its place would not tell."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def can_pack(model: nn.Module) -> bool:
    """Whether a model's linear layers can be packed here, and there is memory for it."""
    weights = list(model.parameters())
    plain = all(type(p) is nn.Parameter and p.is_cpu and p.dtype == torch.float32 for p in weights)
    if not plain or stays(model) or torch.is_autocast_enabled("cpu") or not has_packing():
        return False
    free = free_memory(torch.device("cpu"))
    return free is None or sum(p.nbytes for p in weights) <= MOST_OF_FREE_MEMORY * free


@lru_cache
def has_packing() -> bool:
    """Whether this build of torch can do it and gives the right numbers: by trying it."""
    with torch.inference_mode(), torch.device("cpu"):
        numbers = torch.linspace(-1, 1, 32 * 48, dtype=torch.float32)  # random ones would be missed by who draws next
        linear = skip_init(nn.Linear, 48, 32, dtype=torch.float32)
        linear.weight.copy_(numbers.sin().view(32, 48))
        linear.bias.copy_(numbers[:32])
        x = numbers[: 5 * 48].view(5, 48)
        try:
            y = PackedLinear(linear)(x)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
        return torch.allclose(y, F.linear(x, linear.weight, linear.bias), atol=1e-5)
