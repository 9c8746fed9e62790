"""What a model is: the shape and the options of a Transformer, as one frozen dataclass."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

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
    ffn_dim: Annotated[int | None, "width inside the MLP (none: 8/3 dim for swiglu, 4 dim for gelu)", ">= 1"] = None
    max_seq_len: Annotated[int, "longest sequence the model takes", ">= 1"] = 1024
    norm: Annotated[Literal["rmsnorm", "layernorm"], "normalisation"] = "rmsnorm"
    norm_eps: Annotated[float, "added to the variance in a norm", "> 0"] = 1e-6
    position: Annotated[Literal["rope", "learned", "none"], "how the model knows where a token stands"] = "rope"
    rope_theta: Annotated[float, "base of the RoPE wavelengths", "> 0"] = 10_000.0
    mlp: Annotated[Literal["swiglu", "gelu"], "kind of MLP (gelu: the tanh form of GPT-2)"] = "swiglu"
    qk_norm: Annotated[bool, "RMSNorm on each query and key head"] = False
    qkv_bias: Annotated[bool, "biases in q_proj, k_proj, v_proj"] = False
    o_bias: Annotated[bool, "bias in o_proj"] = False
    mlp_bias: Annotated[bool, "biases in the MLP"] = False
    tie_embeddings: Annotated[bool, "lm_head shares the weight of embed"] = True
    dropout: Annotated[float, "on the embedding, attention weights and each branch", ">= 0, < 1"] = 0.0
    causal: Annotated[bool, "a token sees only what came before it; false: bidirectional"] = True
    vocab_multiple: Annotated[int, "pad the rows of embed and lm_head to a multiple of this", ">= 1"] = 1

    def __post_init__(self):
        for name, value in derived_fields(self).items():
            object.__setattr__(self, name, value)
        if problems := find_problems(self):
            raise ValueError("\n".join(problems))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class ModelSection(ModelConfig):
    """The shape of the model, or where to take it from."""

    vocab_size: Annotated[int | None, "how many tokens there are (none: as many as the tokenizer has)", ">= 1"] = None
    preset: Annotated[str | None, "name of a known shape, such as gpt2-124m; other fields override it"] = None
    path: Annotated[str | None, "run or folder whose weights to start from"] = None

    def __post_init__(self):
        # None stays None here: a section is a request, and a later override may still change what follows from it
        self.to_config(vocab_size=self.vocab_size or 1)

    def to_config(self, **changes) -> ModelConfig:
        """The finished ModelConfig of this request; `changes` override fields (vocab_size, once it is known)."""
        values = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        return ModelConfig(**{**values, **changes})


def derived_fields(config: ModelConfig) -> dict[str, int]:
    """Values of the fields that were left at None."""
    derived = {}
    if config.n_kv_heads is None:
        derived["n_kv_heads"] = config.n_heads
    if config.head_dim is None and config.n_heads > 0:
        derived["head_dim"] = config.dim // config.n_heads
    if config.ffn_dim is None and config.mlp == "swiglu":
        # three matrices of 8/3 dim hold as many parameters as GELU's two of 4 dim (Shazeer 2020, section 3)
        derived["ffn_dim"] = -(-8 * config.dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
    elif config.ffn_dim is None:
        derived["ffn_dim"] = 4 * config.dim
    return derived


def find_problems(config: ModelConfig) -> list[str]:
    """One line, starting with the field's name, for everything that no model could be built from."""
    problems = []
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            problems.append(f"{name}: must be a whole number of at least 1, not {value!r}")
    if problems:  # what follows divides by them
        return problems
    if config.dim % config.n_heads and config.head_dim * config.n_heads < config.dim:
        problems.append(f"n_heads: {config.n_heads} does not divide dim {config.dim}; change one, or set head_dim")
    if config.n_heads % config.n_kv_heads:
        problems.append(f"n_kv_heads: {config.n_kv_heads} does not divide n_heads {config.n_heads}")
    if config.position == "rope" and config.head_dim % 2:
        problems.append(f"head_dim: RoPE turns pairs of numbers, so {config.head_dim} must be even")
    for name, allowed in (
        ("norm", ("rmsnorm", "layernorm")),
        ("position", ("rope", "learned", "none")),
        ("mlp", ("swiglu", "gelu")),
    ):
        if getattr(config, name) not in allowed:
            problems.append(f"{name}: {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    for name in ("norm_eps", "rope_theta", "vocab_multiple"):
        if not getattr(config, name) > 0:
            problems.append(f"{name}: must be greater than 0, not {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout: must be at least 0 and less than 1, not {config.dropout}")
    return problems
