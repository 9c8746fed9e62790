"""The families of models on the Hugging Face hub that minillm can be: one table each, for both directions.

A family says which key of its config.json is which field of ModelConfig, what all its models have in common, and which
module of theirs is which of ours. To support another family is to add its table; config.py and weights.py read them.
"""

from typing import Any, NamedTuple

REQUIRED = object()  # stands where a key has no default: a config without it is refused
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu"}
PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu2": "relu2"}


class Key(NamedTuple):
    """What a key of config.json means."""

    fields: tuple[str, ...]  # those of ModelConfig that have its value
    default: Any = REQUIRED  # what transformers takes where the key is absent
    words: dict[str, str] | None = None  # our word for each of theirs; the first of several is the one that is written


class Family(NamedTuple):
    """How one kind of model is written."""

    model_type: str
    architecture: str
    keys: dict[str, Key]
    same: dict[str, Any]  # fields of ModelConfig that all of its models share
    only: dict[str, tuple]  # keys that minillm can follow with these values alone
    modules: dict[str, str]  # ours -> theirs; where several of ours are one of theirs, they lie in it one after another
    prefix: str  # of the names of all but lm_head; files of the model without its head lack it
    buffers: tuple[str, ...]  # ends of the names of tensors in old files that follow from the config
    windows: str = "none"  # how its config says how far a block sees: a key of config.WINDOWS
    divides: bool = False  # whether transformers wants heads to divide the width, whatever head_dim is
    transposed: bool = False  # whether the matrices of its blocks are stored as (inputs, outputs)


def without(keys: dict[str, Key], *names: str) -> dict[str, Key]:
    return {name: key for name, key in keys.items() if name not in names}


LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.o_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down_proj": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
GPT2_MODULES = {
    "embed": "transformer.wte",
    "pos_embed": "transformer.wpe",
    "blocks.{}.attn_norm": "transformer.h.{}.ln_1",
    "blocks.{}.attn.q_proj": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.k_proj": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.v_proj": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.o_proj": "transformer.h.{}.attn.c_proj",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={
        "vocab_size": Key(("vocab_size",)),
        "hidden_size": Key(("dim",)),
        "num_hidden_layers": Key(("n_layers",)),
        "num_attention_heads": Key(("n_heads",)),
        "num_key_value_heads": Key(("n_kv_heads",), None),
        "head_dim": Key(("head_dim",), None),
        "intermediate_size": Key(("ffn_dim",)),
        "hidden_act": Key(("mlp",), "silu", GATED),
        "max_position_embeddings": Key(("max_seq_len",)),
        "rms_norm_eps": Key(("norm_eps",), 1e-6),
        "attention_bias": Key(("qkv_bias", "o_bias"), False),
        "mlp_bias": Key(("mlp_bias",), False),
        "tie_word_embeddings": Key(("tie_embeddings",), False),
    },
    same={"norm": "rmsnorm", "position": "rope"},
    only={"rope_interleaved": (False,)},
    modules=LLAMA_MODULES,
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    divides=True,
)
MISTRAL = LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    # transformers has a number of heads of its own for where none is given, which is no rule to follow
    keys=without(LLAMA.keys, "attention_bias", "mlp_bias") | {"num_key_value_heads": Key(("n_kv_heads",))},
    only={},
    windows="every",
    divides=False,
)
MINISTRAL = MISTRAL._replace(model_type="ministral", architecture="MinistralForCausalLM", windows="listed")
QWEN2 = MISTRAL._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    same=LLAMA.same | {"qkv_bias": True},
    only={"use_mrope": (False,)},
    windows="later",
)
QWEN3 = QWEN2._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=QWEN2.keys | {"attention_bias": LLAMA.keys["attention_bias"], "head_dim": Key(("head_dim",), 128)},
    same=LLAMA.same | {"qk_norm": True},
    only={},
)
GEMMA = MISTRAL._replace(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=MISTRAL.keys
    | {
        "attention_bias": LLAMA.keys["attention_bias"],
        "head_dim": Key(("head_dim",), 256),
        # plain "gelu" stands in the first configs, whose weights were trained with the tanh form all the same
        "hidden_act": Key(("mlp",), "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}),
        "tie_word_embeddings": Key(("tie_embeddings",), True),
    },
    same={"norm": "rmsnorm_plus_one", "position": "rope", "embed_scale": True},
    only={"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)},
    windows="none",
)
OLMO = LLAMA._replace(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    keys=without(LLAMA.keys, "rms_norm_eps", "mlp_bias"),
    same={"norm": "layernorm_plain", "norm_eps": 1e-5, "position": "rope"},
    only={"clip_qkv": (None,)},
    divides=False,
)
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": Key(("vocab_size",)),
        "n_embd": Key(("dim",)),
        "n_layer": Key(("n_layers",)),
        "n_head": Key(("n_heads",)),
        "n_inner": Key(("ffn_dim",), None),
        "activation_function": Key(("mlp",), "gelu_new", PLAIN),
        "n_positions": Key(("max_seq_len",)),
        "layer_norm_epsilon": Key(("norm_eps",), 1e-5),
        "embd_pdrop": Key(("dropout",), 0.1),
        "attn_pdrop": Key(("dropout",), 0.1),
        "resid_pdrop": Key(("dropout",), 0.1),
        "tie_word_embeddings": Key(("tie_embeddings",), True),
    },
    same={"norm": "layernorm", "position": "learned", "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    modules=GPT2_MODULES,
    prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
    transposed=True,
)
# An export is written as the first that can express the model.
FAMILIES = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3, MINISTRAL, GEMMA, OLMO, GPT2)}

# --- keys of every family ---------------------------------------------------------------------------------------------

ONLY = {
    "add_cross_attention": (False,),
    "auto_map": (None,),  # code of its own, which nothing here knows
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}
# What changes neither a weight nor a logit: where a model is from, how it was trained, how texts are drawn from it.
WITHOUT_EFFECT = set(
    """
    model_type architectures transformers_version dtype torch_dtype _name_or_path name_or_path _commit_hash
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled unsloth_version unsloth_fixed
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    use_cache return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss is_decoder
    chunk_size_feed_forward pretraining_tp gradient_checkpointing n_ctx is_llama_config
    initializer_range attention_dropout neftune_noise_alpha
    num_labels id2label label2id problem_type finetuning_task task_specific_params summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
