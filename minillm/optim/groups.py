"""Which parameters decay, which go to Muon, and at which learning rate.

- Weight decay pulls on matrices only. Norm weights and biases set scales and offsets, where zero is no simpler than any
  other value. Embeddings (tied ones too) do not decay either: a row gets a gradient only in steps where its token
  occurs but would shrink in all, and small embeddings mean large gradients behind the first norm (Takase et al. 2023,
  arXiv:2312.16903; OLMo 2, arXiv:2501.00656).
- Muon takes the matrices inside the model. Embeddings, the head, norms and biases stay with AdamW: a row of an
  embedding or of the head belongs to one token, and only occurs with it (Jordan 2024). So do the two matrices of an
  adapter, which are a step only together: what they add to a weight is their product.
"""

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from minillm.optim.config import OptimConfig, chosen
from minillm.tensors import parameter_names

KINDS = ("muon", "decay", "no_decay")
NOT_FOR_MUON = {"lm_head", "lora_a", "lora_b"}  # parts of the names of matrices that stay with AdamW


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, sorted into groups: "muon" (where asked for), "decay", "no_decay".

    A group holds its own weight_decay and l1, and lr_scale, by which the step's learning rate is multiplied; where
    `lr_scales` tells parameters of one kind apart they are groups of their own. Raises ValueError where nothing is
    trainable, and where a pattern fits no parameter.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    scales = config.scales()
    sorted_out: dict[tuple[str, float], list[Tensor]] = {}
    for name, parameter in parameter_names(model).items():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            kind = "no_decay"
        elif config.name == "muon" and parameter.ndim == 2 and NOT_FOR_MUON.isdisjoint(name.split(".")):
            kind = "muon"
        else:
            kind = "decay"
        scale = next((factor for pattern, factor in scales if fnmatchcase(name, pattern)), 1.0)
        sorted_out.setdefault((kind, scale), []).append(parameter)
    if not sorted_out:
        raise ValueError("no parameter is trainable: requires_grad is off for all of them")
    if problems := unmatched_patterns(model, config):
        raise ValueError("\n".join(problems))
    muon_scale = config.muon_lr / chosen(config, "lr") if config.muon_lr else 1.0
    return [
        {
            "name": kind,
            "params": parameters,
            "weight_decay": 0.0 if kind == "no_decay" else config.weight_decay,
            "l1": 0.0 if kind == "no_decay" else config.l1,
            "lr_scale": scale * (muon_scale if kind == "muon" else 1.0),
        }
        for (kind, scale), parameters in sorted(sorted_out.items(), key=lambda item: KINDS.index(item[0][0]))
    ]


def unmatched_patterns(model: nn.Module, config: OptimConfig) -> list[str]:
    """A line for each pattern of `lr_scales` that fits no parameter of the model."""
    names = list(parameter_names(model))
    return [
        f"optim.lr_scales: {pattern!r} fits no parameter; they are called {names[0]}, ..., {names[-1]}"
        for pattern, _ in config.scales()
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
