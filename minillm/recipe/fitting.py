"""What a user leaves open and the corpus decides: the size of the model, the rows, the optimizer."""

import math
from pathlib import Path
from typing import Any

from minillm.config import Layer, build, convert, file_layer, lookup
from minillm.data.corpus import corpus_bytes
from minillm.model.config import ModelSection
from minillm.plan import optimizer_for, recommend
from minillm.recipe.layers import is_none, preset_layer, without_limits


def fitting(config_class: type, given: list[Layer], without_text: Path) -> list[Layer]:
    """Layers that suit the text: what fits its size, and those of the file `without_text` where no path is given."""
    if is_none(lookup(given, "data.path")):
        chosen = dict(file_layer(without_text).values)
    else:
        chosen = recommend(bytes_of_text(config_class, given))
    chosen = Layer("chosen for the corpus", without_limits(suited(chosen, given), given))
    return [*preset_layer([chosen]), chosen]


def suited(chosen: dict[str, Any], given: list[Layer]) -> dict[str, Any]:
    """The chosen values, but for those that something given makes wrong, and with those that follow from it."""
    said = {name for layer in given for name in layer.values}
    if "model.dim" in said:  # a shape of the user's own, or a preset they named: it needs another learning rate
        dim = as_count(lookup(given, "model.dim")) or ModelSection.dim
        chosen = {name: chosen[name] for name in chosen if not name.startswith(("model.", "optim."))}
        chosen |= optimizer_for(dim)
    if lookup(given, "optim.name", "muon") != "muon" and "optim.muon_lr" in chosen:
        chosen["optim.lr"] = chosen.pop("optim.muon_lr")
    if "optim.lr" in said:
        chosen.pop("optim.muon_lr", None)
    if {"tokenizer.kind", "tokenizer.path"} & said:
        chosen.pop("tokenizer.vocab_size", None)
    limit = as_count(lookup(given, "model.max_seq_len")) or math.inf
    seq_len = as_count(lookup(given, "data.seq_len")) or min(chosen["data.seq_len"], max(2, limit))
    rows = max(1, round(chosen["train.batch_tokens"] / seq_len))
    return chosen | {"data.seq_len": seq_len, "model.max_seq_len": seq_len, "train.batch_tokens": rows * seq_len}


def as_count(value: Any) -> int | None:
    """The whole number that a value not checked yet stands for; None where it is none, which is reported later."""
    try:
        return max(1, convert(value, int))
    except (ValueError, TypeError, OverflowError):
        return None


def bytes_of_text(config_class: type, given: list[Layer]) -> int:
    """Bytes of text under data.path; 0 where that is not to be had, which is reported when it is read."""
    names = ("data.path", "data.cache_dir", "data.sources", "data.weights", "data.temperature")
    try:
        only = Layer("", {name: lookup(given, name) for name in names if lookup(given, name) is not None})
        return corpus_bytes(build(config_class, [only]).data)
    except ValueError:
        return 0
