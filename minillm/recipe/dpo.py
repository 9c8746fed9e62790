"""What learning from preferences adds to a recipe: its section, its objective with a reference, and what it reads."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from minillm import checkpoint
from minillm.data.chat import find_template
from minillm.data.config import PreferencesConfig
from minillm.data.corpus import with_pairs
from minillm.data.mixture import Source
from minillm.data.preference_store import open_preferences
from minillm.data.trees import PairsConfig
from minillm.eval.answers import mean_length, win_rate
from minillm.files import read_json
from minillm.log import LOGGER
from minillm.losses import LOSSES
from minillm.preference import Kept, Preference, WithoutAdapters, cache_reference, cached, open_reference
from minillm.recipe.answering import read_sides
from minillm.recipe.tuning import AnswersConfig, TuningConfig, adapters_at, base_of, hash_at, with_template
from minillm.recipe.wiring import Settled
from minillm.run import RunDirectory
from minillm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from minillm.trainer import Trainer

OPTIONS = tuple(dict.fromkeys(name for loss in LOSSES.values() for name in loss.options))  # that only some losses take


@dataclass(frozen=True)
class DPOConfig(AnswersConfig, PairsConfig):
    """What is preferred, compared with what, by which weights, and how what was learned is measured."""

    loss: Annotated[Literal[tuple(LOSSES)], "what is minimised; kto takes labels, the others pairs"] = "dpo"
    beta: Annotated[float | None, "how much a nat of difference counts; none: as is usual for the loss", "> 0"] = None
    label_smoothing: Annotated[
        float | None, "of dpo: how often a pair is believed to be the wrong way round", ">= 0, < 0.5"
    ] = None
    gamma: Annotated[float | None, "of simpo: the margin that is asked for", ">= 0"] = None
    desirable_weight: Annotated[float | None, "of kto: of desirable answers", "> 0"] = None
    undesirable_weight: Annotated[float | None, "of kto: of undesirable ones", "> 0"] = None
    sft_weight: Annotated[
        float | None, "of the loss on chosen answers beside it, a token; none: 0.2, but 1 of orpo and 0 of kto", ">= 0"
    ] = None
    reference: Annotated[
        Literal["auto", "cached", "frozen", "adapters"],
        "what the policy is compared with: its log-probabilities computed before training; a copy of the starting "
        "weights; the policy without its adapters, or with them as they were where it goes on with some; auto: the "
        "first where all pairs are seen, else what needs least",
    ] = "auto"

    def numbers(self) -> dict[str, float]:
        """The numbers that the loss takes: those that were given, and the usual ones in the place of the others."""
        loss = LOSSES[self.loss]
        usual = {"beta": loss.beta, "sft_weight": loss.sft_weight, **loss.options}
        given = {name: getattr(self, name) for name in usual}
        return {name: usual[name] if value is None else value for name, value in given.items()}

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = super().problems()
        problems += [
            f"{name}: has no effect on the loss {self.loss}; leave it out"
            for name in OPTIONS
            if getattr(self, name) is not None and name not in LOSSES[self.loss].options
        ]
        if self.reference != "auto" and not LOSSES[self.loss].reference:
            problems.append(f"reference: the loss {self.loss} has none; leave it out")
        return problems


@dataclass(frozen=True)
class PreferenceTuningConfig(TuningConfig):
    """A run that learns from preferences."""

    SECTION: ClassVar[str] = "dpo"

    data: PreferencesConfig = field(default_factory=PreferencesConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = super().problems()
        if self.dpo.reference == "adapters" and not self.lora.r:
            problems.append("dpo.reference: there are no adapters to leave out; give lora.r, or take cached or frozen")
        for name in ("label_smoothing", "z_loss"):
            if getattr(self.train, name):
                problems.append(f"train.{name}: is of the loss of the next token; leave it out")
        return problems


# --- what it learns from ----------------------------------------------------------------------------------------------


def open_pairs(
    config: PreferenceTuningConfig, data: PreferencesConfig, tokenizer_config: TokenizerConfig
) -> tuple[Tokenizer, list[Source]]:
    """The tokenizer, and the preferences of each source as the model is given them."""
    tokenizer = train_tokenizer((), tokenizer_config)
    template = find_template(with_template(config, tokenizer).dpo.template, tokenizer)
    answers = "pairs" if LOSSES[config.dpo.loss].paired else "labels"
    sources = open_preferences(with_pairs(data), config.dpo, template, tokenizer, answers)
    for source in sources if answers == "labels" else ():
        say_unmatched(source)
    return tokenizer, sources


def say_unmatched(source: Source) -> None:
    """Warn where there is no answer to another prompt beside some of the answers."""
    counts = source.prepared.info["preferences"]
    unmatched = counts["answers"] - counts.get("mismatched", counts["answers"])  # folders from before do not say
    if unmatched:
        LOGGER.warning(
            "%s%d of %d answers stand in files that ask one thing alone: kto measures its KL on answers to other "
            "prompts, and has none there; where there is none at all, the KL is taken to be 0",
            *(f"source {source.name}: " if source.name else "data.path: ", unmatched, counts["answers"]),
        )


# --- what it is compared with -----------------------------------------------------------------------------------------


def with_reference(settled: Settled) -> Settled:
    """The run with its kind of reference chosen.

    To compute it before costs a forward of each pair, once; to compute it while training one of each pair that is seen.
    """
    config, loader = settled.config, settled.loader
    if config.dpo.reference != "auto" or not LOSSES[config.dpo.loss].reference:
        return settled
    all_seen = settled.steps * loader.samples_per_step >= loader.samples_per_epoch
    kind = "cached" if all_seen else "adapters" if config.lora.r else "frozen"
    return settled._replace(config=dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, reference=kind)))


def preference_objective(settled: Settled) -> Preference:
    """The loss over preferences, which is given its reference when the policy has its first weights (`refer`)."""
    dpo = settled.config.dpo
    return Preference(
        dpo.loss,
        cached if LOSSES[dpo.loss].reference else None,
        vocab_size=settled.shape.vocab_size,
        **dpo.numbers(),
    )


def base_and_identity(config: PreferenceTuningConfig, start: Path | None) -> tuple[str | None, dict[str, Any]]:
    """As `base_of`; a run that goes on must agree on its loss and its reference, too."""
    base_path, must_agree = base_of(config)
    must_agree |= {"dpo.loss": config.dpo.loss}
    must_agree |= {f"dpo.{name}": value for name, value in config.dpo.numbers().items()}
    if LOSSES[config.dpo.loss].reference:
        must_agree["start_sha256"] = start_hash(config, start)
    return base_path, must_agree


def start_hash(config: PreferenceTuningConfig, start: Path | None) -> str:
    """The hash of the weights that the policy begins with; of adapters that go on, of what they were trained on too.

    Of a run that goes on, and may need no more than log-probabilities, it is what its checkpoint says, where the
    weights are gone.
    """
    try:
        own = hash_at(config.model.path)
    except ValueError:
        said = checkpoint.read(start)[0].get("start_sha256") if start and config.dpo.reference == "cached" else None
        if said is None:
            raise
        return said
    there = adapters_at(config.model.path)
    return f"{there.base_sha256}+{own}" if there else own


def at_first(settled: Settled, weights: str | None, start: Path | None) -> Callable[[Trainer], None] | None:
    """What is done when the policy has the weights that the run began with, of that hash; None where that is nothing.

    A run that goes on needs no weights where the log-probabilities are kept.
    """
    dpo = settled.config.dpo
    if not LOSSES[dpo.loss].reference:
        return None
    made_from = {"weights": weights, "precision": settled.config.train.precision, "dist": settled.dist}
    is_kept = partial(open_reference, **made_from)
    if start and dpo.reference == "cached" and all(is_kept(source.prepared) for source in settled.sources):
        return None
    return partial(refer, settled=settled, made_from=made_from)


def refer(trainer: Trainer, settled: Settled, made_from: Mapping[str, Any]) -> None:
    """Let the policy, as it is now, be what it is compared with from now on."""
    config, vocab_size = settled.config, settled.shape.vocab_size
    match config.dpo.reference:
        case "adapters":
            began_as_base = adapters_at(config.model.path) is None and not config.lora.modules_to_save
            trainer.objective.reference = (WithoutAdapters if began_as_base else Kept)(trainer.model, vocab_size)
        case "frozen":
            trainer.objective.reference = Kept(trainer.model, vocab_size)
        case "cached":
            rows = 2 * config.train.micro_batch_size  # no gradients are kept, so more fits
            options = {"seq_len": config.data.seq_len, "rows": rows, "vocab_size": vocab_size, **made_from}
            with trainer.autocast():
                for source in settled.sources:
                    cache_reference(trainer.model, source.prepared, **options)


def check_reference(trainer: Trainer) -> None:
    """Raises RuntimeError where what the policy was compared with has changed; what is cached was proved when read."""
    reference = trainer.objective.reference
    if isinstance(reference, (Kept, WithoutAdapters)):
        reference.check()


# --- what came of it --------------------------------------------------------------------------------------------------

FIGURES = (  # of an evaluation, that are summed up: those that the loss has
    "preference_accuracy",
    "label_accuracy",
    "ranking_accuracy",
    "rewards_chosen",
    "rewards_rejected",
    "margin",
    "kl",
)


def sum_up_preferences(run: RunDirectory, metrics: Sequence[str], summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with figures of the held-out pairs and of the answers to them, before and after; written too.

    Beside `FIGURES` it is `answer_length` in characters, and `win_rate`: how often the later answer is the better one
    by the first of the metrics.
    """
    if not summary["finished"]:
        return summary
    evaluated = {"before": read_json(run.before) if run.before.exists() else {}, "after": summary}
    summary = {name: figure for name, figure in summary.items() if name not in FIGURES}  # of the last step alone
    for name in FIGURES:
        sides = {when: row[f"val_{name}"] for when, row in evaluated.items() if row.get(f"val_{name}") is not None}
        if "after" in sides:
            summary = summary | {name: sides}
    answers = read_sides(run)
    if len(answers) == 2:
        summary = summary | {"answer_length": {when: mean_length(answered) for when, answered in answers.items()}}
        if metrics:
            summary = summary | {"win_rate": win_rate(answers["before"], answers["after"], metrics[0])}
    run.write_json(run.summary, summary)
    return summary
