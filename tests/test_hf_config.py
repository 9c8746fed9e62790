"""Every key of a config.json is followed, known to be without effect, or refused by name."""

import pytest

from minillm.hf.config import choose_family, decisive, to_hugging_face, to_model_config
from minillm.hf.families import FAMILIES
from minillm.model.config import ModelConfig
from minillm.model.presets import preset

LLAMA = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 48, "max_position_embeddings": 64}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
MISTRAL = QWEN2 | {"model_type": "mistral"}
MINISTRAL = QWEN2 | {"model_type": "ministral"}
GEMMA = QWEN2 | {"model_type": "gemma"}
OLMO = LLAMA | {"model_type": "olmo"}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(values: dict, **changes) -> ModelConfig:
    values = values | changes
    return to_model_config(values, FAMILIES[values["model_type"]], "config.json")


# What stands on the hub, as its model cards and the configs beside the weights have it.
PUBLISHED = {
    "gpt2-124m": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "llama3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
        "use_cache": True,
        "vocab_size": 256000,
    },
    "olmo-1b": {
        "architectures": ["OlmoForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 2048,
        "model_type": "olmo",
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "vocab_size": 50304,
    },
}
SMOLLM = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
    assert decisive(read(PUBLISHED[name])) == decisive(preset(name))
    family, values = choose_family(preset(name))
    assert family.model_type == PUBLISHED[name]["model_type"]
    both = values.keys() & PUBLISHED[name].keys() - {"hidden_act", "attn_pdrop", "embd_pdrop", "resid_pdrop"}
    if values.get("sliding_window") is None:
        both -= {"sliding_window"}
    assert {key: values[key] for key in both} == {key: PUBLISHED[name][key] for key in both}


def test_smollm_is_a_llama():
    config = read(SMOLLM)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.rope_theta) == (9, 3, 64, 100_000)


def test_dropout_of_gpt2_is_kept():
    assert read(PUBLISHED["gpt2-124m"]).dropout == 0.1
    assert to_hugging_face(read(GPT2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0), FAMILIES["gpt2"])["attn_pdrop"] == 0


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (MISTRAL | {"sliding_window": 8}, (8, 8, 8)),
        (MISTRAL, (4096, 4096, 4096)),
        (MISTRAL | {"sliding_window": None}, (None, None, None)),
        (MISTRAL | {"sliding_window": 8, "layer_types": [SLIDING] * 3}, (8, 8, 8)),
        (MINISTRAL | {"sliding_window": 8, "layer_types": [FULL, SLIDING, SLIDING]}, (None, 8, 8)),
        (MINISTRAL | {"sliding_window": 8}, (8, 8, 8)),
        (MINISTRAL | {"sliding_window": None}, (None, None, None)),
        (QWEN2 | {"sliding_window": 8, "max_window_layers": 1}, (None, None, None)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8, 8)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None, None)),
        (
            QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]},
            (8, None, 8),
        ),
    ],
)
def test_windows_are_where_the_config_says(values, windows):
    config = read(values)
    assert config.windows == windows
    written = to_hugging_face(config, FAMILIES[values["model_type"]])
    assert read(written).windows == windows


def test_a_factor_of_one_stretches_nothing():
    for kind in ("linear", "dynamic", "yarn"):
        assert read(LLAMA, rope_scaling={"rope_type": kind, "factor": 1.0}).rope_scaling == "none"


def test_other_words_for_the_same_yarn():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    length = 1.1386294361119891  # 1 + ln(4) / 10
    others = ({"attention_factor": length}, {"beta_fast": 32, "beta_slow": 1, "truncate": True}, {"mscale": 1.0})
    for other in (*others, {"mscale": 1.0, "mscale_all_dim": 0.0}):
        assert read(LLAMA, rope_scaling=yarn | other) == read(LLAMA, rope_parameters=yarn | {"rope_theta": 1e4})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; minillm has it as 'silu', 'swish',"),
        (LLAMA | {"hidden_act": 3}, "hidden_act is 3; minillm has it as 'silu', 'swish',"),
        (LLAMA | {"new_knob": 7}, "new_knob (7) is no key of a llama that minillm knows"),
        (
            LLAMA | {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}; minillm has it as None",
        ),
        (LLAMA | {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is {'AutoModel': 'x.Y'}; minillm has it as None"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved is True; minillm has it as False only"),
        (LLAMA | {"n_embd": 7}, "n_embd (7) is no key of a llama"),
        (LLAMA | {"num_attention_heads": 5}, "n_heads: 5 does not divide dim 32"),
        (LLAMA | {"hidden_size": "wide"}, "dim: "),
        (LLAMA | {"num_hidden_layers": None}, "n_layers: "),
        ({"model_type": "llama"}, "hidden_size is missing"),
        (QWEN2 | {"max_window_layers": None}, "max_window_layers is None; a whole number is expected"),
        (MINISTRAL | {"layer_types": 3}, "layer_types is 3; full_attention or sliding_attention is expected for each"),
        (MISTRAL | {"num_key_value_heads": None, "layer_types": [FULL] * 3}, "layer_types has others than sliding_att"),
        (QWEN2 | {"use_mrope": True}, "use_mrope is True; minillm has it as False only"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["linear_attention"] * 3}, "layer_types is ['linear_att"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": [FULL]}, "layer_types is ['full_attention']; full_attent"),
        (
            QWEN2 | {"layer_types": [FULL, FULL, SLIDING]},
            "layer_types has sliding_attention, but there is no",
        ),
        (GEMMA | {"hidden_act": "silu"}, "hidden_act is 'silu'; minillm has it as 'gelu_pytorch_tanh' or 'gelu' only"),
        (GEMMA | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; minillm has it as None or 'gelu_pytor"),
        (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; minillm has it as None"),
        (OLMO | {"clip_qkv": 8.0}, "clip_qkv is 8.0; minillm has it as None"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; minillm has it"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights is False; minillm has it as True only"),
        (GPT2 | {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2 | {"activation_function": "silu"}, "activation_function is 'silu'; minillm has it as 'gelu_new',"),
        (GPT2 | {"attn_pdrop": 0.2}, "attn_pdrop is 0.2 and another dropout 0.1; minillm has one for all"),
    ],
)
def test_what_minillm_cannot_be_is_refused_by_name_and_value(values, said):
    with pytest.raises(ValueError, match=r"config\.json: minillm cannot be this model:\n") as error:
        read(values)
    assert f"\n  {said}" in str(error.value)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic'; minillm has it as",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "the factor of yarn RoPE is missing"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor (2.0) is no key of default RoPE"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'; minillm has it as 'default', 'linear',"),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}},
            "rope_type is given twice",
        ),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta is given twice, as 6.0 and as 5.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; minillm computes default RoPE with 1 only"),
        ({"rope_scaling": YARN | {"beta_fast": 64}}, "beta_fast is 64; minillm computes yarn RoPE with 32 only"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate is False; minillm computes yarn RoPE with True"),
        (
            {"rope_scaling": YARN | {"attention_factor": 1.0}},
            "attention_factor is 1.0; minillm computes yarn",
        ),
        ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "attention_factor is 1.0; minillm computes"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "finetuned (True) is no key of yarn RoPE that minillm knows"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}},
            "low_freq_factor is 2.0; minillm computes llama3 RoPE with 1 only",
        ),
        (
            {"rope_parameters": {FULL: {"rope_theta": 1.0}}},
            "full_attention is {'rope_theta': 1.0}; a number",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_factor: "),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object is expected"),
        (
            {"rope_scaling": YARN | {"beta_fast": "many"}},
            "beta_fast is 'many'; a number is expected",
        ),
        ({"rope_scaling": YARN | {"factor": "far"}}, "factor is 'far'; a number is expected"),
    ],
)
def test_rope_that_minillm_does_not_compute_is_refused(rope, said):
    with pytest.raises(ValueError, match=r"config\.json: minillm cannot be this model:\n") as error:
        read(LLAMA, **rope)
    assert f"\n  {said}" in str(error.value)


def test_all_problems_are_in_one_report():
    with pytest.raises(ValueError, match="minillm cannot be this model") as error:
        read(LLAMA, hidden_act="relu", rope_interleaved=True, clip_qkv=3.0, rope_scaling={"type": "longrope"})
    assert len(str(error.value).splitlines()) == 5
