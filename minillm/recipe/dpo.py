"""What learning from preferences adds to a recipe: its section, its objective with a reference, and what it reads."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from minillm.data.chat import find_template
from minillm.data.config import PreferencesConfig
from minillm.data.corpus import with_pairs
from minillm.data.mixture import Source
from minillm.data.preference_store import open_preferences
from minillm.data.trees import PairsConfig
from minillm.eval.answers import mean_length, win_rate
from minillm.files import read_json
from minillm.load import find_checkpoint, weights_hash
from minillm.losses import LOSSES
from minillm.preference import Kept, Preference, WithoutAdapters, cache_reference, cached
from minillm.recipe.answering import read_answers
from minillm.recipe.tuning import AnswersConfig, TuningConfig, adapters_at, base_of, with_template
from minillm.recipe.wiring import Settled
from minillm.run import RunDirectory
from minillm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from minillm.trainer import Trainer


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

    def options(self) -> dict[str, float]:
        """The numbers that were given of those that only some losses take."""
        names = ("label_smoothing", "gamma", "desirable_weight", "undesirable_weight")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = super().problems()
        takes = LOSSES[self.loss].options
        problems += [
            f"{name}: has no effect on the loss {self.loss}; leave it out"
            for name in self.options().keys() - set(takes)
        ]
        if self.reference != "auto" and not LOSSES[self.loss].reference:
            problems.append(f"reference: the loss {self.loss} has none; leave it out")
        return problems


@dataclass(frozen=True)
class PreferenceConfig(TuningConfig):
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
    config: PreferenceConfig, data: PreferencesConfig, tokenizer_config: TokenizerConfig
) -> tuple[Tokenizer, list[Source]]:
    """The tokenizer, and the preferences of each source as the model is given them."""
    tokenizer = train_tokenizer((), tokenizer_config)
    template = find_template(with_template(config, tokenizer).dpo.template, tokenizer)
    answers = "pairs" if LOSSES[config.dpo.loss].paired else "labels"
    return tokenizer, open_preferences(with_pairs(data), config.dpo, template, tokenizer, answers)


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
        beta=dpo.beta,
        sft_weight=dpo.sft_weight,
        vocab_size=settled.shape.vocab_size,
        **dpo.options(),
    )


def refer(trainer: Trainer, settled: Settled) -> None:
    """Let the policy, as it is now, be what it is compared with from now on."""
    config, shape, dist = settled.config, settled.shape, settled.dist
    objective, policy = trainer.objective, trainer.model
    if objective.reference is None:
        return
    match config.dpo.reference:
        case "adapters":
            began_as_base = adapters_at(config.model.path) is None and not config.lora.modules_to_save
            objective.reference = (WithoutAdapters if began_as_base else Kept)(policy, shape.vocab_size)
        case "frozen":
            objective.reference = Kept(policy, shape.vocab_size)
        case "cached":
            options = {
                "weights": start_hash(config),
                "precision": config.train.precision,
                "seq_len": config.data.seq_len,
                "rows": 2 * config.train.micro_batch_size,  # no gradients are kept, so more fits
            }
            for source in settled.sources:
                with trainer.autocast():
                    cache_reference(policy, source.prepared, **options, dist=dist, vocab_size=shape.vocab_size)


def check_reference(trainer: Trainer) -> None:
    """Raises RuntimeError where what the policy was compared with has changed; what is cached was proved when read."""
    reference = trainer.objective.reference
    if isinstance(reference, (Kept, WithoutAdapters)):
        reference.check()


def start_hash(config: PreferenceConfig) -> str:
    """The hash of the weights that the policy begins with; of adapters that go on, of what they were trained on too."""
    there, own = adapters_at(config.model.path), weights_hash(find_checkpoint(Path(config.model.path)))
    return f"{there.base_sha256}+{own}" if there else own


def preferred_over(config: PreferenceConfig) -> tuple[str | None, dict[str, Any]]:
    """(where the base of adapters is, what a run must agree on that goes on): the reference too is the same then."""
    base_path, must_agree = base_of(config)
    own = dataclasses.asdict(config.dpo)
    decides = {f"dpo.{name}": own[name] for name in ("loss", "beta", "sft_weight", *config.dpo.options())}
    return base_path, must_agree | decides | {"start_sha256": start_hash(config)}


# --- what came of it --------------------------------------------------------------------------------------------------

FIGURES = ("preference_accuracy", "ranking_accuracy", "margin", "kl")  # of an evaluation, that are summed up


def sum_up_preferences(run: RunDirectory, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with figures of the held-out pairs and of the answers to them, before and after; written too.

    Beside `FIGURES` it is `answer_length` in characters, and `win_rate`: how often the later answer is the better one.
    """
    if not summary["finished"]:
        return summary
    before = read_json(run.before) if run.before.exists() else {}
    for name in FIGURES:
        sides = {"before": before.get(f"val_{name}"), "after": summary.get(f"val_{name}")}
        if None not in sides.values():
            summary = summary | {name: sides}
    answers = {when: read_answers(run, when) for when in ("before", "after")}
    if all(answers.values()):
        summary = summary | {"answer_length": {when: mean_length(answered) for when, answered in answers.items()}}
        metric = read_json(run.config)["dpo"]["metrics"][0]
        summary = summary | {"win_rate": win_rate(answers["before"], answers["after"], metric)}
    run.write_json(run.summary, summary)
    return summary
