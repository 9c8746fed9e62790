"""config.json of a Hugging Face folder to ModelConfig and back, as transformers 4 and 5 write and read it.

Reading takes one key after another out of the file. What is left in the end is known to be without effect, or refused
by name: no key is ever passed over. Writing is proved by reading: what comes back as another model cannot be expressed.

    transformers 4   rope_theta: 1e6   rope_scaling: {rope_type: llama3, factor: 8, ...}   torch_dtype: float32
    transformers 5   rope_parameters: {rope_theta: 1e6, rope_type: llama3, factor: 8, ...}   dtype: float32

Both read what 4 writes, so that is what is written here.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.files import read_json
from minillm.hf.families import FAMILIES, ONLY, REQUIRED, WITHOUT_EFFECT, Family, Key
from minillm.model.config import ModelConfig
from minillm.model.rope import LLAMA3_TURNS, YARN_TURNS

ROPE_KINDS = {  # the kinds of RoPE, with what minillm has no field for: the values that it computes with
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": LLAMA3_TURNS[0], "high_freq_factor": LLAMA3_TURNS[1]},
    "yarn": {"beta_slow": YARN_TURNS[0], "beta_fast": YARN_TURNS[1], "truncate": True},
}
ROPE_OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
FULL, SLIDING = "full_attention", "sliding_attention"
LETTERS = {FULL: "F", SLIDING: "W"}  # of ModelConfig.window_pattern


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is Hugging Face's: config.json says a model_type, and no manifest makes it ours."""
    ours, config = (folder / "manifest.json").exists(), folder / "config.json"
    return not ours and config.is_file() and "model_type" in read_json(config)


def read_family(folder: Path) -> Family:
    """The family that a folder's config.json names. Raises ValueError for one that is not known."""
    name = read_json(folder / "config.json").get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{folder / 'config.json'}: model_type {name!r} is no family that minillm knows: {known}")
    return FAMILIES[name]


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes. Raises ValueError listing every key that cannot be followed."""
    family = read_family(folder)
    return to_model_config(read_json(folder / "config.json"), family, str(folder / "config.json"))


def to_model_config(values: dict[str, Any], family: Family, source: str) -> ModelConfig:
    """`read_config` of the content of a config.json; `source` is its name for errors."""
    left, problems = dict(values), []
    fields: dict[str, Any] = dict(family.same)
    for name, key in family.keys.items():
        take_key(left, name, key, fields, problems)
    for name, accepted in (ONLY | family.only).items():
        if name in left and left[name] not in accepted:
            problems.append(f"{name} is {left[name]!r}; minillm has it as {either(accepted)} only")
        left.pop(name, None)
    sizes = (fields.get("n_layers"), fields.get("max_seq_len"))
    if all(isinstance(size, int) for size in sizes):  # what follows needs them
        WINDOWS[family.windows][0](left, fields, problems)
        if fields["position"] == "rope":
            take_rope(left, fields, problems)
        problems += [
            f"{name} ({left[name]!r}) is no key of a {family.model_type} that minillm knows; "
            "remove it if it does not change what the model computes"
            for name in sorted(left.keys() - WITHOUT_EFFECT)
        ]
    if not problems:
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            problems = str(error).splitlines()
    raise ValueError("\n  ".join([f"{source}: minillm cannot be this model:", *problems]))


def take_key(left: dict, name: str, key: Key, fields: dict[str, Any], problems: list[str]) -> None:
    """Take one key out of what is left of a config into the fields that it is."""
    value = left.pop(name, key.default)
    if value is REQUIRED:
        problems.append(f"{name} is missing")
        return
    if key.words is not None:
        if not isinstance(value, str) or value not in key.words:
            problems.append(f"{name} is {value!r}; minillm has it as {either(tuple(key.words))} only")
            return
        value = key.words[value]
    for field in key.fields:
        if fields.get(field, value) != value and field == "dropout":
            problems.append(f"{name} is {value!r} and another dropout {fields[field]!r}; minillm has one for all")
        fields[field] = value


def either(values: tuple) -> str:
    """'a', 'b' or 'c'."""
    *most, last = map(repr, values)
    return f"{', '.join(most)} or {last}" if most else last


# --- windows ----------------------------------------------------------------------------------------------------------


def take_no_window(left: dict, fields: dict, problems: list[str]) -> None:
    """Every block sees all."""


def take_window(left: dict, fields: dict, problems: list[str]) -> None:
    """Mistral: the window of every block; null for none."""
    fields["window"] = left.pop("sliding_window", 4096)
    kind = FULL if fields["window"] is None else SLIDING
    if left.pop("layer_types", None) not in (None, [kind] * fields["n_layers"]):
        problems.append(f"layer_types has others than {kind}; only those of model_type ministral may")


def take_listed_windows(left: dict, fields: dict, problems: list[str]) -> None:
    """Ministral: which blocks have the window."""
    window, kinds = left.pop("sliding_window", 4096), left.pop("layer_types", None)
    take_pattern(kinds or [FULL if window is None else SLIDING] * fields["n_layers"], window, fields, problems)


def take_later_windows(left: dict, fields: dict, problems: list[str]) -> None:
    """Qwen: the window of the blocks that are listed, or of those from max_window_layers on, if at all."""
    used, window = left.pop("use_sliding_window", False), left.pop("sliding_window", 4096)
    first, kinds = left.pop("max_window_layers", 28), left.pop("layer_types", None)
    if not isinstance(first, int):
        problems.append(f"max_window_layers is {first!r}; a whole number is expected")
        return
    later = [SLIDING if used and window is not None and i >= first else FULL for i in range(fields["n_layers"])]
    take_pattern(kinds or later, window if used else None, fields, problems)


def take_pattern(kinds: list[str], window: int | None, fields: dict, problems: list[str]) -> None:
    """The window of each block as window and window_pattern."""
    known = isinstance(kinds, list) and all(kind in (FULL, SLIDING) for kind in kinds)
    if not known or len(kinds) != fields["n_layers"]:
        problems.append(f"layer_types is {kinds}; {FULL} or {SLIDING} is expected for each of {fields['n_layers']}")
    elif SLIDING in kinds and window is None:
        problems.append(f"layer_types has {SLIDING}, but there is no sliding_window")
    elif SLIDING in kinds:
        letters = "".join(LETTERS[kind] for kind in kinds)
        fields["window"], fields["window_pattern"] = window, None if set(letters) == {"W"} else shortest(letters)


def shortest(letters: str) -> str:
    """The shortest pattern that gives these letters when it is repeated."""
    patterns = (letters[:n] for n in range(1, len(letters) + 1))
    return next(pattern for pattern in patterns if (pattern * len(letters)).startswith(letters))


def written_window(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.window}


def written_list(config: ModelConfig) -> dict[str, Any]:
    kinds = [FULL if window is None else SLIDING for window in config.windows]
    return {"sliding_window": config.window, "layer_types": kinds}


def written_later(config: ModelConfig) -> dict[str, Any]:
    used = config.window is not None
    first = next((i for i, window in enumerate(config.windows) if window is not None), config.n_layers)
    return {"use_sliding_window": used, "max_window_layers": first, **written_list(config)}


WINDOWS: dict[str, tuple[Callable, Callable]] = {
    "none": (take_no_window, lambda config: {}),
    "every": (take_window, written_window),
    "listed": (take_listed_windows, written_list),
    "later": (take_later_windows, written_later),
}


# --- RoPE -------------------------------------------------------------------------------------------------------------


def take_rope(left: dict, fields: dict, problems: list[str]) -> None:
    """The base of RoPE and how it is stretched."""
    rope = take_rope_keys(left, problems)
    kind = rope.pop("rope_type", "default")
    factor = 1.0 if kind == "default" else rope.pop("factor", None)
    fields["rope_theta"] = rope.pop("rope_theta", 10_000.0)
    original_len = rope.pop("original_max_position_embeddings", fields["max_seq_len"])
    if kind == "dynamic" and factor == 1:
        kind = "default"
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        problems.append(f"rope_type is {kind!r}; minillm has it as {either(tuple(ROPE_KINDS))} only")
        return
    if factor is None:
        problems.append(f"the factor of {kind} RoPE is missing")
        return
    computed = {"partial_rotary_factor": 1, **ROPE_KINDS[kind]}
    if kind == "yarn" and factor > 0:
        computed["attention_factor"] = 0.1 * math.log(factor) + 1
        mscale, mscale_all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if mscale and mscale_all_dim:  # another way to say it
            ratio = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
            rope.setdefault("attention_factor", ratio)
    for name, value in computed.items():
        given = rope.pop(name, value)
        if not math.isclose(given, value, rel_tol=1e-6):
            problems.append(f"{name} is {given!r}; minillm computes {kind} RoPE with {value!r} only")
    problems += [f"{name} ({value!r}) is no key of {kind} RoPE that minillm knows" for name, value in rope.items()]
    if kind != "default" and factor != 1:
        fields |= {"rope_scaling": kind, "rope_factor": factor, "rope_original_len": original_len}


def take_rope_keys(left: dict, problems: list[str]) -> dict[str, Any]:
    """All that a config says of RoPE, in whichever spelling."""
    rope: dict[str, Any] = {}
    outside = {name: left.pop(name, None) for name in ROPE_OUTSIDE}
    for said in (left.pop("rope_parameters", None), left.pop("rope_scaling", None), outside):
        if not isinstance(said or {}, dict):
            problems.append(f"rope_scaling is {said!r}; an object is expected")
            continue
        for name, value in (said or {}).items():
            name = "rope_type" if name == "type" else name
            if value is None:
                continue
            if name != "rope_type" and not isinstance(value, int | float):
                problems.append(f"{name} is {value!r}; a number is expected")
            elif rope.setdefault(name, value) != value:
                problems.append(f"{name} is given twice, as {rope[name]!r} and as {value!r}")
    return rope


def written_rope(config: ModelConfig) -> dict[str, Any]:
    """The spelling of transformers 4, which 5 reads too."""
    if config.rope_scaling not in ROPE_KINDS:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = config.rope_original_len
    if config.rope_scaling == "llama3":  # those of yarn are its defaults
        scaling |= ROPE_KINDS["llama3"]
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


# --- writing ----------------------------------------------------------------------------------------------------------


def choose_family(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can express a model, and its config.json. Raises ValueError naming what none can."""
    ours, different = decisive(config), {}
    for family in FAMILIES.values():
        values = to_hugging_face(config, family)
        try:
            theirs = decisive(to_model_config(values, family, family.model_type))
            found = [f"{name} {ours[name]!r}" for name in ours if ours[name] != theirs.get(name, ours[name])]
        except ValueError as error:  # written so, it is no model at all
            found = [line.strip() for line in str(error).splitlines()[1:]]
        if family.divides and config.dim % config.n_heads:
            found.append(f"n_heads {config.n_heads}, which does not divide dim {config.dim}")
        if not found:
            return family, values
        different[family.model_type] = found
    name, nearest = min(different.items(), key=lambda one: len(one[1]))
    raise ValueError(f"no family of Hugging Face's is this model; the nearest is {name}, but for {', '.join(nearest)}")


def to_hugging_face(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The config.json of a model as one of a family, which may not be able to say all that it is."""
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for name, key in family.keys.items():
        value = getattr(config, key.fields[0])
        if key.words is not None:  # the first of their words for it, or any
            value = next((theirs for theirs, ours in key.words.items() if ours == value), next(iter(key.words)))
        values[name] = value
    values |= WINDOWS[family.windows][1](config)
    if family.same["position"] == "rope":
        values |= written_rope(config)
    return values


def decisive(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model that decide its weights and logits."""
    fields = dataclasses.asdict(config) | {"windows": config.windows}
    without_effect = ["vocab_multiple", "dropout", "window", "window_pattern"]  # windows says the latter
    if config.position != "rope":
        without_effect += ["rope_theta", "rope_scaling"]
    if config.rope_scaling == "none":
        without_effect += ["rope_factor", "rope_original_len"]
    if config.rope_scaling == "linear":
        without_effect.append("rope_original_len")
    return {name: value for name, value in fields.items() if name not in without_effect}
