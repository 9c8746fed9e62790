"""Known shapes of models, as plain functions: published ones, and a ladder of our own.

Each takes fields to override (`gpt2("124m", vocab_size=6400)`); what follows from them follows.
"""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from minillm.model.config import ModelConfig


def gpt2(size: str = "124m", **overrides) -> ModelConfig:
    """GPT-2: Radford et al. 2019, table 2, with the sizes of the released weights."""
    n_layers, dim, n_heads = {
        "124m": (12, 768, 12),
        "350m": (24, 1024, 16),
        "774m": (36, 1280, 20),
        "1.5b": (48, 1600, 25),
    }[size]
    return override(
        overrides,
        vocab_size=50_257,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        max_seq_len=1024,
        norm="layernorm",
        norm_eps=1e-5,
        position="learned",
        mlp="gelu",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    )


def llama2(size: str = "7b", **overrides) -> ModelConfig:
    """Llama 2: Touvron et al. 2023, table 1, with the MLP widths of the released weights."""
    n_layers, dim, n_heads, n_kv_heads, ffn_dim = {
        "7b": (32, 4096, 32, 32, 11_008),
        "13b": (40, 5120, 40, 40, 13_824),
        "70b": (80, 8192, 64, 8, 28_672),
    }[size]
    return override(
        overrides,
        vocab_size=32_000,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=ffn_dim,
        max_seq_len=4096,
        norm_eps=1e-5,
        tie_embeddings=False,
    )


def llama3(size: str = "8b", **overrides) -> ModelConfig:
    """Llama 3: Llama Team 2024, table 3, at the context of its main pretraining stage."""
    n_layers, dim, n_heads, n_kv_heads, ffn_dim = {
        "8b": (32, 4096, 32, 8, 14_336),
        "70b": (80, 8192, 64, 8, 28_672),
    }[size]
    return override(
        overrides,
        vocab_size=128_256,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=ffn_dim,
        max_seq_len=8192,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        tie_embeddings=False,
    )


def llama32(size: str = "1b", **overrides) -> ModelConfig:
    """Llama 3.2: from the configs beside the released weights; a context of 8,192 stretched to 131,072."""
    n_layers, dim, n_heads = {"1b": (16, 2048, 32), "3b": (28, 3072, 24)}[size]
    return override(
        overrides,
        vocab_size=128_256,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        ffn_dim=8192,
        max_seq_len=131_072,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling="llama3",
        rope_factor=32.0,
        rope_original_len=8192,
    )


def mistral(**overrides) -> ModelConfig:
    """Mistral 7B, first version: Jiang et al. 2023 (arXiv:2310.06825), table 1, in every block a window."""
    return override(
        overrides,
        vocab_size=32_000,
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim=14_336,
        max_seq_len=32_768,
        window=4096,
        norm_eps=1e-5,
        tie_embeddings=False,
    )


def ministral(**overrides) -> ModelConfig:
    """Ministral 8B (2410): the model card beside the released weights; one block sees all, three a window."""
    return override(
        overrides,
        vocab_size=131_072,
        dim=4096,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim=12_288,
        max_seq_len=131_072,
        window=32_768,
        window_pattern="FWWW",
        norm_eps=1e-5,
        rope_theta=100_000_000.0,
        tie_embeddings=False,
    )


def qwen2(size: str = "0.5b", **overrides) -> ModelConfig:
    """Qwen2.5: Qwen Team 2024, from the configs beside the released weights."""
    n_layers, dim, n_heads, n_kv_heads, ffn_dim, vocab_size, tied = {
        "0.5b": (24, 896, 14, 2, 4864, 151_936, True),
        "1.5b": (28, 1536, 12, 2, 8960, 151_936, True),
        "3b": (36, 2048, 16, 2, 11_008, 151_936, True),
        "7b": (28, 3584, 28, 4, 18_944, 152_064, False),
    }[size]
    return override(
        overrides,
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=ffn_dim,
        max_seq_len=32_768,
        rope_theta=1_000_000.0,
        qkv_bias=True,
        tie_embeddings=tied,
    )


def qwen3(size: str = "0.6b", **overrides) -> ModelConfig:
    """Qwen3: Qwen Team 2025, from the configs beside the released weights."""
    n_layers, dim, n_heads, ffn_dim, tied = {
        "0.6b": (28, 1024, 16, 3072, True),
        "1.7b": (28, 2048, 16, 6144, True),
        "4b": (36, 2560, 32, 9728, True),
        "8b": (36, 4096, 32, 12_288, False),
    }[size]
    return override(
        overrides,
        vocab_size=151_936,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=ffn_dim,
        max_seq_len=40_960,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tie_embeddings=tied,
    )


def gemma(size: str = "2b", **overrides) -> ModelConfig:
    """Gemma, first generation: Gemma Team 2024 (arXiv:2403.08295), table 1."""
    n_layers, dim, n_heads, n_kv_heads, ffn_dim = {
        "2b": (18, 2048, 8, 1, 16_384),
        "7b": (28, 3072, 16, 16, 24_576),
    }[size]
    return override(
        overrides,
        vocab_size=256_000,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=256,
        ffn_dim=ffn_dim,
        max_seq_len=8192,
        norm="rmsnorm_plus_one",
        mlp="geglu",
        embed_scale=True,
    )


def olmo(size: str = "1b", **overrides) -> ModelConfig:
    """OLMo, first generation: Groeneveld et al. 2024 (arXiv:2402.00838), table 1."""
    n_layers, dim, n_heads, ffn_dim, tied = {
        "1b": (16, 2048, 16, 8192, True),
        "7b": (32, 4096, 32, 11_008, False),
    }[size]
    return override(
        overrides,
        vocab_size=50_304,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        ffn_dim=ffn_dim,
        max_seq_len=2048,
        norm="layernorm_plain",
        norm_eps=1e-5,
        tie_embeddings=tied,
    )


def ladder(size: str = "10m", **overrides) -> ModelConfig:
    """Our own shapes: RMSNorm, RoPE, SwiGLU, QK-norm, tied.

    The size leaves the embedding out, so that it holds for any vocabulary: a token more is `dim` parameters more.
    """
    n_layers, dim, n_heads, ffn_dim = {
        "0.2m": (4, 64, 4, 192),
        "1m": (5, 128, 4, 384),
        "3m": (6, 192, 6, 576),
        "10m": (8, 320, 5, 896),
        "26m": (8, 512, 8, 1408),
        "60m": (12, 640, 10, 1728),
        "125m": (18, 768, 12, 2048),
    }[size]
    return override(
        overrides,
        vocab_size=6400,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        ffn_dim=ffn_dim,
        qk_norm=True,
    )


def override(overrides: dict[str, Any], **fields) -> ModelConfig:
    return ModelConfig(**(fields | overrides))


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "gpt2-124m": partial(gpt2, "124m"),
    "gpt2-350m": partial(gpt2, "350m"),
    "gpt2-774m": partial(gpt2, "774m"),
    "gpt2-1.5b": partial(gpt2, "1.5b"),
    "llama2-7b": partial(llama2, "7b"),
    "llama2-13b": partial(llama2, "13b"),
    "llama2-70b": partial(llama2, "70b"),
    "llama3-8b": partial(llama3, "8b"),
    "llama3-70b": partial(llama3, "70b"),
    "llama3.2-1b": partial(llama32, "1b"),
    "llama3.2-3b": partial(llama32, "3b"),
    "mistral-7b": mistral,
    "ministral-8b": ministral,
    "qwen2.5-0.5b": partial(qwen2, "0.5b"),
    "qwen2.5-1.5b": partial(qwen2, "1.5b"),
    "qwen2.5-3b": partial(qwen2, "3b"),
    "qwen2.5-7b": partial(qwen2, "7b"),
    "qwen3-0.6b": partial(qwen3, "0.6b"),
    "qwen3-1.7b": partial(qwen3, "1.7b"),
    "qwen3-4b": partial(qwen3, "4b"),
    "qwen3-8b": partial(qwen3, "8b"),
    "gemma-2b": partial(gemma, "2b"),
    "gemma-7b": partial(gemma, "7b"),
    "olmo-1b": partial(olmo, "1b"),
    "olmo-7b": partial(olmo, "7b"),
    "nano": partial(ladder, "0.2m"),
    "micro": partial(ladder, "1m"),
    "mini": partial(ladder, "3m"),
    "small": partial(ladder, "10m"),
    "medium": partial(ladder, "26m"),
    "large": partial(ladder, "60m"),
    "xl": partial(ladder, "125m"),
}


def preset(name: str, **overrides) -> ModelConfig:
    """The named shape, with fields overridden. Raises ValueError for a name that is not in PRESETS."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"preset: {name!r} is not known; {hint}there are {', '.join(PRESETS)}")
    return PRESETS[name](**overrides)


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of a preset, with None where the value follows from the others: a layer for others to override."""
    config = preset(name)
    values = dataclasses.asdict(config)
    for field in ("n_kv_heads", "head_dim", "ffn_dim"):
        if ModelConfig(**{**values, field: None}) == config:
            values[field] = None
    return values
