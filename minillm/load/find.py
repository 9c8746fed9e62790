"""What a path stands for, and what is known of a model before its weights are read: shape, tokenizer, hashes."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

from minillm import checkpoint, hf
from minillm.data.jinja import jinja_of, recognise
from minillm.distributed.context import Context
from minillm.files import read_json, sha256
from minillm.generate.params import SamplingParams
from minillm.lora import LoRAConfig
from minillm.model.config import ModelConfig
from minillm.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("minillm")


def find_checkpoint(
    path: Path, step: int | None = None, skip: str = checkpoint.OPTIM, dist: Context = checkpoint.ALONE
) -> Path:
    """The folder of weights that a path stands for: itself, or the newest valid checkpoint (or `step`'s) inside it.

    A name on the Hugging Face hub is looked for in the cache. `skip`, `dist`: as for `checkpoint.verify`, which says
    what is valid.
    """
    path = hf.find_folder(path)
    if not path.is_dir():
        problem = "is a file; give the directory it is in" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {problem} (expected a run, a checkpoint, a saved folder or one of Hugging Face's)")
    if (path / "manifest.json").exists():
        if step is not None:
            raise ValueError(f"{path}: is a single checkpoint; give the run's directory to choose step {step} in it")
        return path
    for directory in (path / "checkpoints", path):
        found = checkpoint.candidates(directory, dist)
        if found and step is not None:
            chosen = directory / f"step-{step:08d}"
            if chosen not in found:
                raise ValueError(f"{directory}: no step {step}; there are {', '.join(p.name for p in found[::-1])}")
            return chosen
        if found:
            newest = checkpoint.latest(directory, skip, dist)
            if newest is None:
                checkpoint.verify(found[0], skip, dist)  # raises: says what is wrong with the newest
            return newest
    if step is None and hf.is_hugging_face(path):
        return path
    if hf.is_peft(path):
        ways = f"`minillm import {path} OUT` makes one model of them and their base"
        raise ValueError(f"{path}: holds adapters of peft's alone; {ways}")
    raise ValueError(
        f"{path}: no run, checkpoint or saved folder; looked for manifest.json, checkpoints/step-*/ and step-*/ "
        "in it, and for the model_type of a Hugging Face folder in config.json"
    )


def homes_of(folder: Path) -> list[Path]:
    """Where config and tokenizer may be: beside the weights, or in the run that they are from."""
    if not folder.name.startswith("step-"):
        return [folder]
    return [folder, folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent]


def tokenizer_home(folder: Path) -> Path | None:
    """The directory of a checkpoint's tokenizer."""
    return next((home for home in homes_of(folder) if (home / "tokenizer.json").exists()), None)


def describe(folder: Path) -> tuple[ModelConfig, Tokenizer | None]:
    """The shape of a folder's model, and its tokenizer; the weights are not read."""
    if hf.is_hugging_face(folder):
        config, tokenizer = hf.read_config(folder), find_tokenizer(folder, {})
    else:
        state, _ = checkpoint.read(folder)
        tokenizer = find_tokenizer(folder, state)
        config = find_config(folder, state, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: its model has {config.vocab_size} tokens, the tokenizer beside it {tokenizer.vocab_size}"
        )
    return config, tokenizer


def find_tokenizer(folder: Path, state: dict) -> Tokenizer | None:
    """The tokenizer of a checkpoint, where it is there; ValueError when it is not that of `state`."""
    home = tokenizer_home(folder)
    expected = state.get("tokenizer_hash")
    if home is None:
        if expected is not None:
            logger.warning("%s: the tokenizer this model was trained with is not there", homes_of(folder)[-1])
        return None
    tokenizer = load_tokenizer(home)
    if expected not in (None, tokenizer.hash):
        raise ValueError(
            f"{home}: its tokenizer (hash {tokenizer.hash[:12]}) is not the one that {folder} was trained with "
            f"(hash {expected[:12]}); put that one back"
        )
    return tokenizer


def find_config(folder: Path, state: dict, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model's shape, from the checkpoint's own state or else from the config.json of one of the directories."""
    source, config = folder / "state.json", state.get("config") or {}
    if "model" not in config:
        source = next((home / "config.json" for home in homes_of(folder) if (home / "config.json").exists()), None)
        config = read_json(source) if source else {}
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{folder}: the shape of the model is unknown: no section `model` in {source or 'a config'}")
    section = {name: value for name, value in config["model"].items() if name not in ("preset", "path")}
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(section.keys() - known):
        raise ValueError(f"{source}: model.{unknown[0]} is not a field of a model; written by a newer minillm?")
    if section.get("vocab_size") is None and tokenizer is not None:
        section["vocab_size"] = tokenizer.vocab_size
    try:
        return ModelConfig(**section)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its section `model` is not a model: {error}") from None


def weight_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file that holds weights; those of a checkpoint are in its manifest, and proved by `load`."""
    if hf.is_hugging_face(folder):
        return {file: sha256(folder / file) for file in hf.weight_files(folder)}
    _, manifest = checkpoint.read(folder)
    files = sorted(checkpoint.files_of(manifest, skip=checkpoint.OPTIM))
    return {file: manifest["files"][file]["sha256"] for file in files}


def weights_hash(folder: Path) -> str:
    """One sha256 for all weights of a folder, by which adapters know the base that they were trained on."""
    return hashlib.sha256(json.dumps(weight_hashes(folder)).encode()).hexdigest()


class Adapters(NamedTuple):
    """The adapters of a checkpoint, and what they were trained on."""

    config: LoRAConfig
    base_path: str
    base_sha256: str


def adapters_in(folder: Path) -> Adapters | None:
    """What a checkpoint's adapters are; None for a folder that is one set of weights."""
    if hf.is_hugging_face(folder):
        return None
    state, _ = checkpoint.read(folder)
    if not state.get("base_path"):
        return None
    return Adapters(LoRAConfig(**state["config"]["lora"]), state["base_path"], state["base_sha256"])


def trained_seq_len(folder: Path) -> int | None:
    """The length of the rows that a folder's model was trained on here; None where that is not known."""
    if hf.is_hugging_face(folder):
        return None
    state, _ = checkpoint.read(folder)
    return ((state.get("config") or {}).get("data") or {}).get("seq_len")


def taught_template(folder: Path) -> str | None:
    """The name of the chat template that a folder's model was taught; None where it was taught none that is known."""
    if hf.is_hugging_face(folder):
        tokenizer = find_tokenizer(folder, {})
        text = jinja_of(tokenizer) if tokenizer else None
        if text is None:
            return None
        name = recognise(text, tokenizer)
        if name is None:
            logger.warning("%s: its chat template is none that is known; --template names the nearest", folder)
        return name
    state, _ = checkpoint.read(folder)
    config = state.get("config") or {}
    return (config.get("dpo") or config.get("sft") or {}).get("template")


def default_params(path: str | Path) -> SamplingParams:
    """How a folder asks to be sampled from: by its generation_config.json; SamplingParams() where it has none.

    Tokens that end a text but are none of its model's are left out, with a warning.
    """
    folder = hf.find_folder(path)
    try:
        params = SamplingParams(**hf.read_generation_config(folder))
    except ValueError as error:
        raise ValueError(f"{folder / hf.GENERATION}: {error}") from None
    if not params.stop_token_ids or not (folder / "config.json").exists():
        return params
    config, tokenizer = describe(folder)
    known = tokenizer.vocab_size if tokenizer else config.vocab_size
    if beyond := [token for token in params.stop_token_ids if token >= known]:
        said = ", ".join(map(str, beyond))
        logger.warning("%s: eos_token_id %s is beyond the vocabulary of %d: ignored", folder, said, known)
    return dataclasses.replace(params, stop_token_ids=tuple(token for token in params.stop_token_ids if token < known))
