"""What a model costs before it exists: parameters and floating-point operations."""

from dataclasses import dataclass

import torch

from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model learns."""

    total: int  # each parameter once, tied ones too
    embedding: int  # looked up, not multiplied: embed (where it is not also lm_head's) and pos_embed
    matmul: int  # in the weights of linear layers: those that cost 6 operations a token; lm_head is one of them


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts on the meta device: no memory is taken, whatever the size."""
    with torch.device("meta"):
        model = Transformer(config)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    lookup_only = embeddings - {module.weight for module in linears}
    return ParameterCount(
        total=sum(parameter.numel() for parameter in model.parameters()),
        embedding=sum(weight.numel() for weight in lookup_only),
        matmul=sum(module.weight.numel() for module in linears),
    )


def flops_per_token(config: ModelConfig, T: int) -> int:
    """Operations of a training step, forward and backward, per token of sequences of length T.

    6 N + 12 L D T: each weight of a matmul multiplies and adds once forward and twice backward; each layer computes
    q k^T and the weighted sum of v over T keys, with D = n_heads * head_dim. Causal halves are not taken off, as is
    the custom for MFU. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * T
    return 6 * count_parameters(config).matmul + attention
