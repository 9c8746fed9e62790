"""Tiny models of every family that minillm reads and writes, made by transformers with random weights."""

import json
from pathlib import Path

import torch

SHAPE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GPT2_SHAPE = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def rope(kind: str, theta: float = 10_000.0, **knobs) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **knobs}}


STRETCHED = {
    "linear": rope("linear", factor=4.0),
    "llama3": rope(
        "llama3",
        theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
}
WINDOW = {"sliding_window": 5}
SOME_WINDOWS = WINDOW | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}

# what each is: its class in transformers (without "ForCausalLM"), and the arguments of its config
CASES = {
    "llama": ("Llama", GROUPED),
    "llama, tied": ("Llama", GROUPED | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama, one head of keys": ("Llama", GROUPED | {"num_key_value_heads": 1}),
    "llama, biases": ("Llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim": ("Llama", GROUPED | {"head_dim": 12}),
    "llama, geglu": ("Llama", GROUPED | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, linear": ("Llama", GROUPED | STRETCHED["linear"]),
    "llama, llama3": ("Llama", GROUPED | STRETCHED["llama3"]),
    "llama, yarn": ("Llama", GROUPED | STRETCHED["yarn"]),
    "mistral": ("Mistral", GROUPED | WINDOW),
    "mistral, no window": ("Mistral", GROUPED | {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", GROUPED | rope("default", theta=1e6) | {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2", GROUPED | STRETCHED["yarn"]),
    "qwen2, later windows": ("Qwen2", GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, biases, windows": (
        "Qwen3",
        GROUPED | SOME_WINDOWS | {"head_dim": 8, "attention_bias": True, "use_sliding_window": True},
    ),
    "ministral": ("Ministral", GROUPED | SOME_WINDOWS | {"head_dim": 12}),
    "gemma": ("Gemma", GROUPED | {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma, untied": ("Gemma", GROUPED | {"head_dim": 8, "tie_word_embeddings": False}),
    "olmo": ("Olmo", SHAPE | {"tie_word_embeddings": True}),
    "olmo, untied": ("Olmo", GROUPED | {"attention_bias": True}),
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2, wide, exact gelu": ("GPT2", GPT2_SHAPE | {"n_inner": 48, "activation_function": "gelu"}),
    "gpt2, untied": ("GPT2", GPT2_SHAPE | {"tie_word_embeddings": False}),
}


def make(case: str, **changes):
    """The model of a case, in which no weight is at a value that could hide a mistake (norms of 1, biases of 0)."""
    import transformers

    torch.manual_seed(0)
    name, arguments = CASES[case]
    config = getattr(transformers, f"{name}Config")(**(arguments | changes))
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def edit_config(folder: Path, without: tuple[str, ...] = (), **changes) -> Path:
    """Change what the config.json of a folder says."""
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {name: value for name, value in values.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
