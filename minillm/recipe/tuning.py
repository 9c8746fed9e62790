"""What a recipe that goes on from a model adds: which weights are trained, what suits that, and the template."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import nn

from minillm.config import Layer, file_layer, lookup, nearest
from minillm.data.jinja import choose_template
from minillm.eval.answers import METRICS, check_installed
from minillm.hf import find_folder
from minillm.load import Adapters, adapters_in, find_checkpoint, taught_template, weights_hash
from minillm.lora import LoRAConfig, add_adapters, apply_lora
from minillm.model.transformer import Transformer
from minillm.plan import recommend_tuning
from minillm.recipe.config import RecipeConfig
from minillm.recipe.fitting import as_count
from minillm.recipe.layers import is_none, without_limits
from minillm.tensors import parameter_names
from minillm.tokenizer import Tokenizer

C = TypeVar("C", bound="TuningConfig")


@dataclass(frozen=True)
class AnswersConfig:
    """Which weights learn to answer, and how the answers are measured."""

    frozen: Annotated[list[str], "weights that stay as they are: names or patterns, as embed.*,blocks.0.*"] = field(
        default_factory=list
    )
    predict: Annotated[
        int, "held-out conversations whose last answer is generated before and after training, and measured", ">= 0"
    ] = 0
    predict_some: Annotated[
        int, "of these, so many at each evaluation on the way too, in which one is shown", ">= 0"
    ] = 8
    predict_tokens: Annotated[int, "tokens of such an answer, at most", ">= 1"] = 128
    metrics: Annotated[
        list[str], f"how near they are to those that were given: {', '.join(METRICS)} (the last two: extra eval)"
    ] = field(default_factory=lambda: ["exact_match"])

    def __post_init__(self):
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = [
            f"metrics: {name!r} is not known{nearest(name, METRICS)} ({', '.join(METRICS)})"
            for name in self.metrics
            if name not in METRICS
        ]
        try:
            check_installed(self.metrics)
        except ValueError as error:
            problems.append(f"metrics: {error}")
        return problems


@dataclass(frozen=True)
class TuningConfig(RecipeConfig):
    """A run that goes on from a model, in full or by adapters; what it learns stands in the section `SECTION`."""

    SECTION: ClassVar[str]

    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def own(self) -> Any:
        """The section of what it learns: an AnswersConfig with a `template`."""
        return getattr(self, self.SECTION)

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = super().problems()
        if self.lora.r and self.own.frozen:
            problems.append(
                f"{self.SECTION}.frozen: with adapters (lora.r) all other weights are frozen; leave one of them out"
            )
        with torch.device("meta"):
            model = Transformer(self.model.to_config(vocab_size=1))
        freezing = partial(freeze, patterns=self.own.frozen, field_name=f"{self.SECTION}.frozen")
        for change in (freezing, partial(with_adapters, config=self.lora)):
            try:
                change(model)
            except ValueError as error:
                problems.append(str(error))
        return problems


# --- what is trained --------------------------------------------------------------------------------------------------


def freeze(model: nn.Module, patterns: Sequence[str], field_name: str) -> None:
    """Leave the parameters that `frozen` fits out of training. Raises ValueError where a pattern fits none, or all."""
    named = parameter_names(model)
    for pattern in patterns:
        fitting = [name for name in named if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not fitting:
            names = list(named)
            raise ValueError(f"{field_name}: {pattern!r} fits no weight; they are called {names[0]}, ..., {names[-1]}")
        for name in fitting:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"{field_name}: all weights are, so that nothing is left to train")


def with_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Adapters, where there are to be some, without a word."""
    if config.r:
        add_adapters(model, config)


def as_trained(model: Transformer, config: TuningConfig) -> None:
    """`adapt` without a word, and without values: what is frozen, and which adapters there are."""
    freeze(model, config.own.frozen, f"{config.SECTION}.frozen")
    with_adapters(model, config.lora)


def adapt(model: Transformer, config: TuningConfig) -> None:
    """Freeze what is not trained, and add what is trained in its stead."""
    freeze(model, config.own.frozen, f"{config.SECTION}.frozen")
    apply_lora(model, config.lora, config.run.seed)


def base_of(config: TuningConfig) -> tuple[str | None, dict[str, Any]]:
    """(where the base of adapters is, what a run with them must agree on); nothing of the kind without adapters."""
    if not config.lora.r:
        return None, {f"{config.SECTION}.frozen": config.own.frozen}
    there = adapters_at(config.model.path)
    if there:
        path, base_sha256 = there.base_path, there.base_sha256
    else:
        base_sha256 = hash_at(config.model.path)
        path = str(find_folder(config.model.path).resolve())
    lora = dataclasses.replace(config.lora, alpha=config.lora.actual_alpha)
    return path, {"base_sha256": base_sha256, "lora": dataclasses.asdict(lora)}


def adapters_at(model_path: str | None) -> Adapters | None:
    """The adapters that a run goes on with; None where it starts from one set of weights, or from nothing that is."""
    try:
        return adapters_in(find_checkpoint(Path(str(model_path))))
    except ValueError:
        return None


def hash_at(model_path: str) -> str:
    """The hash of the weights that a run begins with. Raises ValueError where they are not there."""
    try:
        return weights_hash(find_checkpoint(Path(model_path)))
    except ValueError as error:
        raise ValueError(f"model.path: the weights that the run begins with are needed: {error}") from None


# --- what it learns from ----------------------------------------------------------------------------------------------


def fitting_tuning(
    given: list[Layer], without_data: Path, recommend: Callable[[int, bool], dict[str, Any]] = recommend_tuning
) -> list[Layer]:
    """The layer of what suits the model that is tuned; that of the file where no path is given.

    One that has adapters goes on with them, where nothing is said of any. How much a step is, where nobody says, is
    left to the tokens, which are not counted yet.
    """
    there = adapters_at(lookup(given, "model.path"))
    if is_none(lookup(given, "data.path")):
        chosen = dict(file_layer(without_data).values)
    else:
        dim = as_count(lookup(given, "model.dim")) or 1024
        chosen = recommend(dim, there is not None or str(lookup(given, "lora.r", 0)) != "0")
    if there and not any(name.startswith("lora.") for layer in given for name in layer.values):
        chosen |= {f"lora.{name}": value for name, value in dataclasses.asdict(there.config).items()}
    limits = (as_count(lookup(given, name)) or math.inf for name in ("model.max_seq_len", "train.batch_tokens"))
    seq_len = as_count(lookup(given, "data.seq_len")) or min(chosen["data.seq_len"], *limits)
    chosen["data.seq_len"] = seq_len
    if "train.batch_tokens" in chosen:
        chosen["train.batch_tokens"] = max(1, round(chosen["train.batch_tokens"] / seq_len)) * seq_len
    if lookup(given, "optim.lr") is not None or lookup(given, "optim.name") is not None:
        chosen.pop("optim.muon_lr", None)
    return [Layer("chosen for the data", without_limits(chosen, given))]


def with_template(config: C, tokenizer: Tokenizer) -> C:
    """The config with the template's name, so that whoever loads the model knows what it was taught."""
    try:
        template = choose_template(config.own.template, tokenizer, taught_by(config.model.path))
    except ValueError as error:
        raise ValueError(f"{config.SECTION}.{error}") from None
    own = dataclasses.replace(config.own, template=template.name)
    return dataclasses.replace(config, **{config.SECTION: own})


def taught_by(model_path: str | None) -> str | None:
    """The template that the model which is to be tuned knows already; None where it, or that, is not there."""
    try:
        return taught_template(find_checkpoint(Path(str(model_path))))
    except ValueError:  # a run that goes on may need it no more
        return None
