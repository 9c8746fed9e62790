"""What a model costs before it exists: parameters, floating-point operations, and how much text suits it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minillm.model.config import ModelConfig
from minillm.model.presets import PRESETS
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
    lookup_only = {table.weight for table in embeddings(model)} - {module.weight for module in linears}
    return ParameterCount(
        total=sum(parameter.numel() for parameter in model.parameters()),
        embedding=sum(weight.numel() for weight in lookup_only),
        matmul=sum(module.weight.numel() for module in linears),
    )


def flops_per_token(config: ModelConfig, T: int, adapt: Callable[[Transformer], object] | None = None) -> int:
    """Operations of a training step, forward and backward, per token of sequences of length T.

    6 N + 12 L D T: each weight of a matmul multiplies and adds once forward and twice backward; each layer computes
    q k^T and the weighted sum of v over T keys, or those of its window, with D = n_heads * head_dim. Causal halves are
    not taken off, as is the custom for MFU. Source: Chowdhery et al. 2022 (PaLM), appendix B.

    `adapt` freezes weights of a model and adds adapters. A frozen weight takes 4 N, as it has no gradient of its own;
    and blocks below all that is trained take no backward pass.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if adapt is not None:
        adapt(model)
    embeds = any(parameter.requires_grad for table in embeddings(model) for parameter in table.parameters())
    reached, total = embeds, 0
    for block, window in zip(model.blocks, config.windows):
        matrices = [parameter for parameter in block.parameters() if parameter.ndim == 2]
        reached = reached or any(parameter.requires_grad for parameter in block.parameters())
        matmul, trained = (sum(p.numel() for p in some) for some in (matrices, filter(is_trained, matrices)))
        attention = 4 * min(T, window or T) * config.n_heads * config.head_dim
        total += (2 * matmul + attention) + reached * 2 * (matmul + attention) + 2 * trained
    reached = reached or any(map(is_trained, model.norm.parameters()))
    head = model.lm_head.weight
    return total + (2 + 2 * reached + 2 * head.requires_grad) * head.numel()


def embeddings(model: Transformer) -> list[torch.nn.Embedding]:
    """The tables of tokens and of positions."""
    return [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def is_trained(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


# --- how much text suits a model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimalTokens:
    """Tokens after which the compute would have been better spent on a larger model, by three fits."""

    hoffmann: float
    hoffmann_parametric: float
    kaplan: float


def optimal_tokens(count: ParameterCount, config: ModelConfig) -> OptimalTokens:
    """The compute-optimal number of tokens for a model of that size."""
    return OptimalTokens(
        hoffmann=hoffmann_tokens(count.total),
        hoffmann_parametric=hoffmann_parametric_tokens(count.total),
        kaplan=kaplan_tokens(count.total - embedding_tables(config)),
    )


def embedding_tables(config: ModelConfig) -> int:
    """Parameters that Kaplan et al. 2020 leave out: the tables of tokens, in and out, and of positions."""
    tables = config.padded_vocab_size * (1 if config.tie_embeddings else 2)
    return config.dim * (tables + (config.max_seq_len if config.position == "learned" else 0))


def hoffmann_tokens(parameters: int) -> float:
    """About 20 tokens a parameter: D = 20.2e9 (N / 1e9)^1.0074, N being all parameters.

    A straight line, in logarithms, through 1B (20.2B tokens) and 10T (216.2T tokens) of Hoffmann et al. 2022, table 3,
    which is their approach 1, the lower envelope of training curves.
    """
    return 20.2e9 * (parameters / 1e9) ** 1.0074


def hoffmann_parametric_tokens(parameters: int) -> float:
    """The least loss L = E + A / N^alpha + B / D^beta for a given compute C = 6 N D, solved for D.

    N = G (C / 6)^a and D = (C / 6)^b / G with G = (alpha A / (beta B))^(1 / (alpha + beta)), a = beta / (alpha + beta)
    and b = alpha / (alpha + beta). Source: Hoffmann et al. 2022, eq. 4, with the fit of their approach 3 (eq. 10).
    """
    A, B, alpha, beta = 406.4, 410.7, 0.34, 0.28
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    compute = (parameters / G) ** ((alpha + beta) / beta)  # C / 6 = N D
    return compute / parameters


def kaplan_tokens(parameters: int) -> float:
    """D = 2e10 C^0.27 at the compute C, in PF-days, where N = 1.3e9 C^0.73; N leaves out the embeddings.

    Source: Kaplan et al. 2020, appendix A, the fits of compute-efficient training (exponents also in eq. 1.7). Hoffmann
    et al. find far more tokens for the same model, because here learning rates did not follow the length of a run.
    """
    compute = (parameters / 1.3e9) ** (1 / 0.73)
    return 2e10 * compute**0.27


# --- what suits a corpus ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A configuration that suits corpora up to a size."""

    max_bytes: float
    preset: str
    seq_len: int
    batch_tokens: int
    epochs: float


# Models grow with the text, and the text is read up to four times, beyond which repeated tokens teach little
# (Muennighoff et al. 2023).
RECIPES = (
    Recipe(3e6, "micro", 256, 2048, 4),
    Recipe(3e7, "micro", 256, 2048, 1),
    Recipe(3e8, "small", 512, 32_768, 2),
    Recipe(3e9, "large", 1024, 131_072, 1),
    Recipe(float("inf"), "xl", 1024, 524_288, 1),
)
TUNING_TOKENS = 16_384  # of a step of fine-tuning, at most
FORWARD_TOKENS = {"cpu": 4096}  # beyond this a CPU's caches overflow and nothing is gained
FORWARD_TOKENS_DEFAULT = 32_768


def recommend(corpus_bytes: int) -> dict[str, object]:
    """Values for the fields that a user leaves open, by dotted name, for a corpus of that many bytes of text."""
    recipe = next(recipe for recipe in RECIPES if corpus_bytes <= recipe.max_bytes)
    chosen = {
        "model.preset": recipe.preset,
        "data.seq_len": recipe.seq_len,
        "train.batch_tokens": recipe.batch_tokens,
        "train.max_epochs": recipe.epochs,
    }
    if recipe.preset == "micro":  # too narrow for one table to serve as embedding and as head; measured in docs/results
        return chosen | {"model.tie_embeddings": False, "optim.name": "muon", "optim.lr": 1e-2, "optim.muon_lr": 6e-3}
    return chosen | optimizer_for(PRESETS[recipe.preset]().dim)


def optimizer_for(dim: int) -> dict[str, object]:
    """An optimizer and its learning rate for a model of that width: the wider, the smaller the steps.

    The rate falls as 1 / dim (Yang et al. 2022, arXiv:2203.03466), from 6e-3 at 128 to 1e-3 at 768 and on.
    """
    return {"optim.name": "muon", "optim.lr": float(f"{0.77 / max(dim, 128):.1g}")}


def recommend_tuning(dim: int, lora: bool) -> dict[str, object]:
    """The same for fine-tuning a model of that width; how much a step is depends on the tokens (`tuning_rows`).

    Three passes at a rate of 2e-5 for a width of 4096 (Alpaca's, Taori et al. 2023), which grows as 1 / dim; for
    adapters ten times as high (Schulman et al. 2025, "LoRA without regret").
    """
    lr = min(2e-5 * 4096 / dim, 1e-3) * (10 if lora else 1)
    return {
        "data.seq_len": 1024,
        "train.max_epochs": 3.0,
        "optim.name": "adamw",
        "optim.lr": float(f"{lr:.1g}"),
        "optim.weight_decay": 0.0,
    }


def recommend_preference(dim: int, lora: bool) -> dict[str, object]:
    """The same for preferences: one pass, at a rate of 5e-7 for a width of 4096 (Zephyr, Tunstall et al. 2023)."""
    lr = min(5e-7 * 4096 / dim, 1e-4) * (10 if lora else 1)
    return recommend_tuning(dim, lora) | {"train.max_epochs": 1.0, "optim.lr": float(f"{lr:.1g}")}


def tuning_rows(n_tokens: int, seq_len: int) -> int:
    """Rows of a step of fine-tuning: a hundredth of the text, so that little text makes many steps too."""
    return max(1, round(min(TUNING_TOKENS, n_tokens / 100) / seq_len))


def micro_batch_size(seq_len: int, samples_per_step: int, device: torch.device) -> int:
    """Rows a forward where the user gave none: as many as keep the device busy, at most those of a step."""
    tokens = FORWARD_TOKENS.get(device.type, FORWARD_TOKENS_DEFAULT)
    return max(1, min(samples_per_step, tokens // seq_len))
