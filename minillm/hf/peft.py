"""Adapters in the format of Hugging Face's PEFT, in both directions.

adapter_config.json          what kind of adapters, on which modules
adapter_model.safetensors    their tensors, and the modules that are trained in full, by the family's names

blocks.0.attn.q_proj.lora_a  <->  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.layout import Box
from minillm.checkpoint.shard import read_rows, write_shard
from minillm.config import Layer, build
from minillm.files import atomic_directory, free_directory, read_json
from minillm.hf.config import choose_family
from minillm.hf.families import Family
from minillm.hf.weights import listed, same_content, tensors_of, their_name
from minillm.lora import LoRAConfig, adapted, add_adapters
from minillm.model.transformer import Transformer
from minillm.tensors import is_sharded, parameter_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
FIELDS = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"}
# Keys that do not change what adapters compute: where they are from, how they began, and on what, which the names of
# their tensors say.
WITHOUT_EFFECT = set(
    """
    peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping runtime_config
    target_modules modules_to_save exclude_modules layers_to_transform layers_pattern ensure_weight_tying
    fan_in_fan_out megatron_core megatron_config eva_config loftq_config qalora_group_size
    """.split()
)
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")  # of adapters; with the others the base is changed as well


def save_peft(model: Transformer, directory: str | Path, base: str | None = None) -> Path:
    """Write the adapters of a model as a folder that peft reads; `base`: the name of the model that they belong to.

    Raises ValueError for a model without adapters, for one that no family can express, and where `directory` holds
    something already.
    """
    layers = adapted(model)
    if not layers or any(map(is_sharded, model.parameters())):
        raise ValueError("the model has no adapters, or is cut over ranks: those of a whole model can be written")
    directory, (family, _) = free_directory(directory), choose_family(model.config)
    tensors = peft_tensors(model, family)
    config: LoRAConfig = next(iter(layers.values())).config
    in_full = [name for name in tensors if "lora_" not in name]
    values = {key: getattr(config, field) for key, field in FIELDS.items()} | {
        "lora_alpha": config.actual_alpha,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": family.transposed,
        "inference_mode": True,
        "target_modules": [their_name(f"{name}.", family).removesuffix(".") for name in layers],
        "modules_to_save": sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in in_full}) or None,
        "ensure_weight_tying": f"{PREFIX}lm_head.weight" in in_full and model.config.tie_embeddings,
    }
    with atomic_directory(directory) as folder:
        write_shard(folder / WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return directory.resolve()


@torch.no_grad()
def load_peft(model: Transformer, directory: str | Path) -> Transformer:
    """Give a model the adapters of a folder of peft's, in place, ready to use or to go on training; returns the model.

    Raises ValueError, before the model is changed, for what minillm does not have, and for adapters of another model.
    """
    directory = Path(directory)
    if not (directory / WEIGHTS).exists():
        raise ValueError(f"{directory}: has no {WEIGHTS}, which is what minillm reads of peft's formats")
    fields, found = read_fields(directory / CONFIG), tensors_of(directory / WEIGHTS)
    family, _ = choose_family(model.config)
    with torch.device("meta"):
        twin = Transformer(model.config)
    fields |= what_is_adapted(twin, family, set(found), directory)
    config = build(LoRAConfig, [Layer(str(directory / CONFIG), fields)])
    add_adapters(twin, config)
    expected = {name: tuple(tensor.shape) for name, tensor in peft_tensors(twin, family).items()}
    there = {name: tuple(tensor.entry[1]) for name, tensor in found.items()}
    if wrong := sorted(name for name in there.keys() | expected.keys() if there.get(name) != expected.get(name)):
        raise ValueError(
            f"{directory}: are not adapters of this model: missing, unknown or of other shapes: {listed(wrong)}"
        )
    if model.config.tie_embeddings and f"{PREFIX}lm_head.weight" in found:
        head, embed = (found[PREFIX + their_name(f"{name}.weight", family)] for name in ("lm_head", "embed"))
        if not same_content(head, embed):
            raise ValueError(
                f"{directory}: its lm_head and its embedding differ, which are one and the same in this model"
            )
    add_adapters(model, config)
    for name, tensor in peft_tensors(model, family).items():
        shape = tuple(tensor.shape)
        read_rows(found[name].path, found[name].entry, Box((0,) * len(shape), shape), tensor)
    return model


def is_peft(directory: str | Path) -> bool:
    """Whether a folder holds adapters of peft's."""
    return (Path(directory) / CONFIG).is_file()


def peft_base(directory: str | Path) -> str | None:
    """The model that the adapters of a folder belong to, by the path or name that it gives."""
    base = read_json(Path(directory) / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def peft_tensors(model: Transformer, family: Family) -> dict[str, Tensor]:
    """All that is trained, by its name in peft, in the model's own memory."""
    fused = {theirs for theirs, count in Counter(family.modules.values()).items() if count > 1}
    tensors = {}
    for name, parameter in parameter_names(model).items():
        if not parameter.requires_grad:
            continue
        module, _, part = their_name(name, family).rpartition(".")
        in_full = part not in PARTS
        if re.sub(r"\d+", "{}", module) in fused or (in_full and family.transposed and name.startswith("blocks.")):
            raise ValueError(
                f"{name}: is stored in another form in {module} of a {family.model_type}: peft has no like"
            )
        rows = model.config.vocab_size if name in ("embed.weight", "lm_head.weight") else None
        tensors[f"{PREFIX}{module}.{PARTS.get(part, part)}"] = parameter.detach()[:rows]
        if name == "embed.weight" and model.config.tie_embeddings:
            tensors[f"{PREFIX}{their_name('lm_head.weight', family)}"] = parameter.detach()[:rows]
    return tensors


def what_is_adapted(model: Transformer, family: Family, found: set[str], directory: Path) -> dict[str, list[str]]:
    """`targets` and `modules_to_save` of LoRAConfig, by the names of the tensors that are there."""
    modules = {name.rpartition(".")[0] for name in parameter_names(model)}
    theirs = {module: PREFIX + their_name(f"{module}.", family).removesuffix(".") for module in sorted(modules)}
    targets = [module for module, name in theirs.items() if f"{name}.lora_A.weight" in found]
    in_full = [module for module, name in theirs.items() if f"{name}.weight" in found]
    if not targets:
        raise ValueError(
            f"{directory}: are adapters of another model than a {family.model_type}: {listed(sorted(found))}"
        )
    return {"targets": targets, "modules_to_save": in_full}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of LoRAConfig in an adapter_config.json. Raises ValueError for every key that cannot be followed."""
    values = read_json(path)
    beginning = values.get("init_lora_weights", True)
    problems = [f"peft_type is {values.get('peft_type')!r}, not LORA"] if values.get("peft_type") != "LORA" else []
    if beginning not in BEGINNINGS:
        problems.append(
            f"init_lora_weights is {beginning!r}, which changes the base too; save it converted to plain LoRA"
        )
    if values.get("bias", "none") != "none":
        problems.append(f"bias is {values['bias']!r}; biases are frozen here, or trained by modules_to_save")
    known = WITHOUT_EFFECT | FIELDS.keys() | {"init_lora_weights", "bias"}
    problems += [
        f"{name} is {value!r}, which minillm does not have"
        for name, value in values.items()
        if value and name not in known
    ]
    problems += [f"{name} is missing" for name in ("r", "lora_alpha") if values.get(name) is None]
    if problems:
        raise ValueError("\n  ".join([f"{path}: minillm cannot be these adapters:", *problems]))
    return {field: values[key] for key, field in FIELDS.items() if key in values}
