"""Low-rank adapters: a frozen matrix learns through two small ones beside it.

    LoRA      y = W x + s B A x                              W (O, I) frozen; A (r, I), B (O, r) trained; s = alpha / r
    rsLoRA    the same with s = alpha / sqrt(r)
    DoRA      y = m / |W + s B A| * (W x + s B A x)          m (O,) trained: the norm of each row, apart from its
                                                             direction; |.| counts as a constant in the gradient

An adapted layer keeps the names of its weights, so that what is stored of the base fits the model with adapters and
without; `lora_a`, `lora_b` and `magnitude` stand beside them. B begins at 0 and m at |W|: the model begins as its base.

Sources: Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732), Liu et al. 2024 (arXiv:2402.09353).
Shapes: O outputs, I inputs, r rank.
"""

import dataclasses
import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.losses import matmul_dtype
from minillm.model.init import parameter_seed
from minillm.tensors import is_sharded, local_part, narrowed, parameter_names

ADAPTER = ("lora_a", "lora_b", "magnitude")  # the parameters that an adapted layer has beside those of the base
PATTERNS = {"all": "blocks.*", "attn": "blocks.*.attn.*", "mlp": "blocks.*.mlp.*"}  # what the words of `targets` mean

logger = logging.getLogger("minillm")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters to train instead of the weights."""

    r: Annotated[int, "rank of the adapters; 0 trains the weights themselves", ">= 0"] = 0
    alpha: Annotated[float | None, "what adapters add is scaled by alpha / r; none: 2 r, a scale of 2", "> 0"] = None
    dropout: Annotated[float, "part of an adapter's inputs that is dropped in training", ">= 0, < 1"] = 0.0
    targets: Annotated[list[str], "layers to adapt: all | attn | mlp | names or patterns, as q_proj,blocks.0.mlp.*"] = (
        field(default_factory=lambda: ["all"])
    )
    rslora: Annotated[bool, "scale by alpha / sqrt(r), so that large ranks learn as fast"] = False
    dora: Annotated[bool, "train the norm of each row of a weight too, apart from its direction"] = False
    modules_to_save: Annotated[list[str], "other modules, trained and saved in full: embed, lm_head, *norm"] = field(
        default_factory=list
    )
    base_precision: Annotated[
        Literal["bf16"] | None, "bf16: adapted matrices are stored in half the memory (none: as they are)"
    ] = None

    def __post_init__(self):
        problems = []
        if self.r == 0:
            given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != default_of(f)]
            problems += [f"{name}: has no effect with r 0, which trains without adapters; set lora.r" for name in given]
        if not self.targets:
            problems.append("targets: names no layer; give all, attn, mlp or names")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def actual_alpha(self) -> float:
        """`alpha`, or 2 r where none is given."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """By which the product of the two small matrices is multiplied."""
        return self.actual_alpha / (math.sqrt(self.r) if self.rslora else self.r)


def default_of(config_field: dataclasses.Field) -> object:
    factory = config_field.default_factory
    return config_field.default if factory is dataclasses.MISSING else factory()


# --- one layer --------------------------------------------------------------------------------------------------------


class FrozenProduct(torch.autograd.Function):
    """x W^T + b in a dtype, where W and b get no gradient: kept for backward is W as it is stored, no copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:  # nothing below is trained
            return None, None, None, None
        (weight,) = ctx.saved_tensors
        return (g @ weight.to(g.dtype)).to(ctx.dtype), None, None, None


class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter: (..., I) -> (..., O)."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.replaced = type(linear)  # which merge_lora puts back
        self.weight, self.bias = linear.weight, linear.bias
        if config.base_precision == "bf16":
            self.weight.data = self.weight.data.bfloat16()
        new = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_a = nn.Parameter(torch.empty(config.r, self.in_features, **new))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, config.r, **new))
        self.magnitude = nn.Parameter(torch.empty(self.out_features, **new)) if config.dora else None
        self.config, self.scale = config, config.scale
        self.dropout = nn.Dropout(config.dropout)
        self.enabled = True
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        dtype = matmul_dtype(x)
        late_bias = self.enabled and self.magnitude is not None  # which DoRA does not scale
        y = FrozenProduct.apply(x, self.weight, None if late_bias else self.bias, dtype)
        if not self.enabled:
            return y
        h = F.linear(self.dropout(x).to(dtype), self.lora_a.to(dtype))  # (..., r)
        rows = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.lora_b.to(dtype).T, alpha=self.scale)
        y = rows.view(y.shape)  # (..., O)
        if self.magnitude is not None:
            y = y * (self.magnitude / row_norms(self.unscaled())).to(dtype)
            y = y if self.bias is None else y + self.bias.to(dtype)
        return y

    @torch.no_grad()
    def unscaled(self) -> Tensor:
        """W + s B A in fp32, (O, I)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight.float(), self.lora_b.float(), self.lora_a.float(), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one matrix that does what the layer does, in fp32, (O, I)."""
        weight = self.unscaled()
        if self.magnitude is not None:
            weight *= (self.magnitude.float() / row_norms(weight))[:, None]
        return weight


def row_norms(weight: Tensor) -> Tensor:
    """(O, I) -> (O,), in fp32; never 0, so that a row of zeros stays one when it is divided by its norm."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)


# --- a model ----------------------------------------------------------------------------------------------------------


def apply_lora(model: M, config: LoRAConfig, seed: int = 0) -> M:
    """Freeze a model and give the layers that the config names an adapter, in place; returns the model.

    Says what it adapted. Before `parallelize`, and on the meta device too, where `init_lora` must follow once the base
    has its weights. With r = 0 nothing is changed. Raises ValueError where a name fits nothing.
    """
    if config.r == 0:
        return model
    add_adapters(model, config)
    if not next(model.parameters()).is_meta:
        init_lora(model, seed)
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in adapted(model))
    in_full = [name for name, p in base_parameters(model).items() if p.requires_grad]
    sizes = [(p.numel(), p.requires_grad) for p in parameter_names(model).values()]
    trained, total = sum(size for size, grad in sizes if grad), sum(size for size, _ in sizes)
    logger.info(
        "LoRA of rank %d, scale %g, on %d layers (%s)%s: %s of %s parameters are trained (%.2f%%)",
        *(config.r, config.scale, kinds.total(), ", ".join(f"{n} {kind}" for kind, n in kinds.items())),
        f", in full {', '.join(in_full)}" if in_full else "",
        *(f"{trained:,}", f"{total:,}", 100 * trained / total),
    )
    return model


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """`apply_lora` without a word, and without values for the adapters."""
    if adapted(model):
        raise ValueError("the model has adapters already; merge_lora makes them a part of its weights")
    if any(map(is_sharded, model.parameters())):
        raise ValueError("the model is cut over ranks already; apply_lora comes before parallelize")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    modules = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    targets = matching("lora.targets", [PATTERNS.get(word, word) for word in config.targets], layers)
    in_full = matching("lora.modules_to_save", config.modules_to_save, modules)
    if both := sorted(targets & in_full):
        raise ValueError(f"lora.modules_to_save: {both[0]} is one of lora.targets too; name it in one of them")
    model.requires_grad_(False)
    for name in in_full:
        model.get_submodule(name).requires_grad_(True)
    for name in targets:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), config))


def matching(where: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that the patterns fit, in full or in their last part. Raises ValueError where one fits none."""
    fits = {p: {name for name in names if any(fnmatchcase(n, p) for n in (name, last(name)))} for p in patterns}
    for pattern in (pattern for pattern, found in fits.items() if not found):
        known = list(dict.fromkeys(map(last, names)))
        close = difflib.get_close_matches(last(pattern), known, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        if pattern == "lm_head":
            meant = "the losses read its weight alone, so train it in full: lora.modules_to_save lm_head. "
        raise ValueError(f"{where}: {pattern!r} fits nothing; {meant}There are {', '.join(known) or 'none'}")
    return set().union(*fits.values())


def last(name: str) -> str:
    return name.rpartition(".")[2]


@torch.no_grad()
def init_lora(model: nn.Module, seed: int = 0) -> None:
    """Fill the adapters of a model whose base has its weights, in place; of sharded ones each rank fills its part.

    A is uniform within 1 / sqrt(I), as in the code of Hu et al., a pure function of (seed, name); B is 0; the magnitude
    is the norm of each row of the base.
    """
    named = parameter_names(model)
    for name, parameter in named.items():
        part, offset = local_part(parameter)
        if last(name) == "lora_a":
            generator = torch.Generator().manual_seed(parameter_seed(seed, name))
            bound = parameter.shape[1] ** -0.5
            whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            part.copy_(narrowed(whole, offset, part.shape))
        elif last(name) == "lora_b":
            part.zero_()
        elif last(name) == "magnitude":  # cut by rows as the weight is, so that a rank has the rows that it needs
            part.copy_(row_norms(local_part(named[name.removesuffix("magnitude") + "weight"])[0]))


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a model has without adapters, by the names that they have there."""
    return {name: p for name, p in parameter_names(model).items() if last(name) not in ADAPTER}


def merge_lora(model: M) -> M:
    """Make each adapter a part of the weight beside it, in place, for good; returns the model, plain and trainable.

    The sum is formed in fp32 and rounded once, to the dtype of the weight.
    """
    for name, layer in needed(model).items():
        with torch.device("meta"):
            linear = layer.replaced(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(layer.merged().to(layer.weight.dtype))
        linear.bias = layer.bias
        model.set_submodule(name, linear.train(layer.training))
    return model.requires_grad_(True)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are a part of the weights, so that they cost no time; then the base is back, bit for bit."""
    layers = needed(model).values()
    kept = [layer.weight.data for layer in layers]
    try:
        for layer in layers:
            layer.weight.data, layer.enabled = layer.merged().to(layer.weight.dtype), False
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.weight.data, layer.enabled = weight, True


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base.

    Raises ValueError where modules are trained in full: what they were before is not kept.
    """
    layers = needed(model, whole=False).values()
    if in_full := [name for name, p in base_parameters(model).items() if p.requires_grad]:
        raise ValueError(
            f"{', '.join(in_full)}: trained in full (lora.modules_to_save), so that the base is no longer there; "
            "load it as a model of its own"
        )
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def needed(model: nn.Module, whole: bool = True) -> dict[str, LoRALinear]:
    """`adapted`, of which there must be some, at work, and, if asked for, whole on this rank."""
    layers = adapted(model)
    if not layers:
        raise ValueError("the model has no adapters; apply_lora gives it some")
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the model's adapters are merged or disabled at the moment; end that block first")
    if whole and any(map(is_sharded, model.parameters())):
        raise ValueError("the model is cut over ranks; save its adapters, and merge them on one process")
    return layers
