"""What a model is: the shape and the options of a Transformer, as one frozen dataclass."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from minillm.config import checked, fields_of
from minillm.model.rope import RopeScaling

FFN_MULTIPLE = 64  # widths that are multiples of 64 keep matrix kernels at full speed


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a Transformer's parameters and what it computes.

    Fields left at None are derived from the others when the object is made, so a config that exists is complete.
    Raises ValueError with one line a problem, each line starting with the name of the field.
    """

    vocab_size: Annotated[int, "how many tokens there are", ">= 1"]
    dim: Annotated[int, "width of the residual stream", ">= 1"] = 256
    n_layers: Annotated[int, "number of blocks", ">= 1"] = 4
    n_heads: Annotated[int, "query heads", ">= 1"] = 4
    n_kv_heads: Annotated[int | None, "key/value heads (none: n_heads)", ">= 1"] = None
    head_dim: Annotated[int | None, "width of a head (none: dim / n_heads)", ">= 1"] = None
    ffn_dim: Annotated[int | None, "width inside the MLP (none: 8/3 dim with a gate, else 4 dim)", ">= 1"] = None
    max_seq_len: Annotated[int, "longest sequence the model takes", ">= 1"] = 1024
    norm: Annotated[
        Literal["rmsnorm", "rmsnorm_plus_one", "layernorm", "layernorm_plain"],
        "normalisation; plus_one scales by 1 + weight, plain has no parameters",
    ] = "rmsnorm"
    norm_eps: Annotated[float, "added to the variance in a norm", "> 0"] = 1e-6
    position: Annotated[Literal["rope", "learned", "none"], "how the model knows where a token stands"] = "rope"
    rope_theta: Annotated[float, "base of the RoPE wavelengths", "> 1"] = 10_000.0
    rope_scaling: Annotated[
        Literal["none", "linear", "ntk", "llama3", "yarn"], "how RoPE is stretched beyond the context it was trained on"
    ] = "none"
    rope_factor: Annotated[float, "how far it is stretched", ">= 1"] = 1.0
    rope_original_len: Annotated[int | None, "the context before (none: max_seq_len / rope_factor)", ">= 1"] = None
    mlp: Annotated[
        Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu2"],
        "kind of MLP: two with a gate, three without (gelu, also in geglu: the tanh form of GPT-2)",
    ] = "swiglu"
    window: Annotated[int | None, "a token sees itself and the window - 1 before it (none: all)", ">= 1"] = None
    window_pattern: Annotated[
        str | None, "which blocks have it, over and over: WWWF is three windows, one full (none: every block)"
    ] = None
    qk_norm: Annotated[bool, "RMSNorm on each query and key head"] = False
    qkv_bias: Annotated[bool, "biases in q_proj, k_proj, v_proj"] = False
    o_bias: Annotated[bool, "bias in o_proj"] = False
    mlp_bias: Annotated[bool, "biases in the MLP"] = False
    embed_scale: Annotated[bool, "embeddings times sqrt(dim), as in Gemma"] = False
    tie_embeddings: Annotated[bool, "lm_head shares the weight of embed"] = True
    dropout: Annotated[float, "on the embedding, attention weights and each branch", ">= 0, < 1"] = 0.0
    causal: Annotated[bool, "a token sees only what came before it; false: bidirectional"] = True
    vocab_multiple: Annotated[int, "pad the rows of embed and lm_head to a multiple of this", ">= 1"] = 1

    def __post_init__(self):
        problems = []
        for field in fields_of(ModelConfig):
            try:
                object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
            except ValueError as error:
                problems.append(f"{field.name}: {error}")
        problems = problems or impossible_combinations(self)
        if problems:
            raise ValueError("\n".join(problems))
        for name, value in derived_fields(self).items():
            object.__setattr__(self, name, value)

    @property
    def scaling(self) -> RopeScaling | None:
        """How RoPE is stretched; None where it is not."""
        if self.rope_scaling == "none":
            return None
        return RopeScaling(self.rope_scaling, self.rope_factor, self.rope_original_len)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each block; None where it sees everything."""
        pattern = self.window_pattern or "W"
        return tuple(self.window if pattern[i % len(pattern)] == "W" else None for i in range(self.n_layers))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class ModelSection(ModelConfig):
    """The shape of the model, or where to take it from."""

    vocab_size: Annotated[int | None, "how many tokens there are (none: as many as the tokenizer has)", ">= 1"] = None
    preset: Annotated[str | None, "name of a known shape, such as gpt2-124m; other fields override it"] = None
    path: Annotated[str | None, "run, checkpoint or saved folder whose weights, shape and tokenizer to start from"] = (
        None
    )

    def __post_init__(self):
        # None stays None: a section is a request, and a later override may still change what follows from it
        self.to_config(vocab_size=self.vocab_size or 1)

    def to_config(self, **changes) -> ModelConfig:
        """The finished ModelConfig of this request; `changes` override fields (vocab_size, once it is known)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}
        return ModelConfig(**{**values, **changes})


def impossible_combinations(config: ModelConfig) -> list[str]:
    """One line, starting with the field's name, for each group of values that no model could be built from."""
    problems = []
    n_kv_heads = config.n_kv_heads or config.n_heads
    head_dim = config.head_dim or config.dim // config.n_heads
    if config.head_dim is None and config.dim % config.n_heads:
        problems.append(f"n_heads: {config.n_heads} does not divide dim {config.dim}; change one, or set head_dim")
    elif config.position == "rope" and head_dim % 2:
        problems.append(f"head_dim: {head_dim} is odd, and RoPE turns pairs of numbers; make it even")
    if config.rope_scaling == "none" and config.rope_factor != 1:
        problems.append(f"rope_factor: {config.rope_factor:g} has no effect with rope_scaling none; choose a scaling")
    elif config.rope_scaling != "none" and config.position != "rope":
        problems.append(f"rope_scaling: {config.rope_scaling} has no effect with position {config.position}; set none")
    elif config.rope_scaling != "none" and config.rope_factor == 1:
        problems.append(f"rope_factor: 1 leaves rope_scaling {config.rope_scaling} without effect; set it, say to 4")
    if config.window_pattern is not None and not set("W") <= set(config.window_pattern) <= set("WF"):
        problems.append(
            f"window_pattern: {config.window_pattern!r} is to be made of W (with the window) and F (full), such as WWWF"
        )
    elif config.window_pattern is not None and config.window is None:
        problems.append(f"window_pattern: {config.window_pattern} has no effect without window; set it, say to 1024")
    if config.n_heads % n_kv_heads:
        problems.append(f"n_kv_heads: {n_kv_heads} does not divide n_heads {config.n_heads}; change one")
    return problems


def derived_fields(config: ModelConfig) -> dict[str, int]:
    """Values of the fields that were left at None."""
    # a gate's three matrices of 8/3 dim hold as many numbers as two of 4 dim without (Shazeer 2020, section 3)
    gated_dim = -(-8 * config.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
    ffn_dim = gated_dim if config.mlp in ("swiglu", "geglu") else 4 * config.dim
    defaults = {"n_kv_heads": config.n_heads, "head_dim": config.dim // config.n_heads, "ffn_dim": ffn_dim}
    defaults["rope_original_len"] = max(1, round(config.max_seq_len / config.rope_factor))
    return {name: value for name, value in defaults.items() if getattr(config, name) is None}
