"""`minillm data sample-pairs`: preferences from what a model answers."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from minillm.cli.conversation import conversing, template_for
from minillm.cli.model import PARAMETERS, params_of_folder
from minillm.cli.verb import Verb
from minillm.config import Layer
from minillm.data.prompt_rows import PromptFiles
from minillm.data.text import named_files
from minillm.distributed.device import find_device
from minillm.eval.sample_pairs import REASONS, Sampled, check_free, sample_pairs
from minillm.eval.scores import Respondent, find_score
from minillm.files import sha256
from minillm.generate.params import SamplingParams
from minillm.load import find_checkpoint, load, weights_hash
from minillm.log import LOGGER
from minillm.trainer.config import DTYPES

# Parameters that answers to be compared have no use for; what the model's folder says of them is not asked.
NOT_SAMPLED = (
    "best_of",
    "logprobs",
    "prompt_logprobs",
    "use_beam_search",
    "num_beams",
    "length_penalty",
    "early_stopping",
)
SHOWN = 3  # bad rows that are named where they are skipped


@dataclass(frozen=True, kw_only=True)
class DataSamplePairs(SamplingParams):
    """Options of `data sample-pairs`."""

    path: Annotated[str, "the model that answers: run directory, checkpoint, or folder"]
    prompts: Annotated[str, "conversations or prompts: a file, folder or glob of .jsonl, .json, .csv, .parquet"]
    out: Annotated[str, "the .jsonl to write"]
    n: Annotated[int, "answers to each prompt", ">= 1"] = 4
    seed: Annotated[int, "the same seed gives the same pairs", ">= 0"] = 0
    score: Annotated[
        str,
        "given: the file's answer is chosen, the least similar rejected; logprob: the likeliest and the least likely; "
        "FILE.py:NAME: by a function (prompt, answer, row) -> number, whose file is run as the code that it is",
    ] = "given"
    reward: Annotated[str | None, "logprob: the model that it is under (none: the one that answers)"] = None
    margin: Annotated[float, "the least by which the scores of a pair differ", ">= 0"] = 0.0
    columns: Annotated[list[str], "PART=FIELD each, where the format is not a usual one: prompt=ask,response=reply"] = (
        field(default_factory=list)
    )
    max_samples: Annotated[int | None, "the first so many prompts (none: all)", ">= 1"] = None
    on_bad: Annotated[Literal["error", "skip"], "a row that is no prompt: end with its place, or leave it out"] = (
        "error"
    )
    template: Annotated[str, "how it is given the prompt; auto: as it was taught, none: as text to continue"] = "auto"
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    device: Annotated[str, "auto | cpu | cuda | mps | ..."] = "auto"
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, "of the weights (none: as they are)"] = None
    max_rows: Annotated[int | None, "answers made at once (none: as many as fit well)", ">= 1"] = None

    def __post_init__(self):
        super().__post_init__()
        if given := [name for name in NOT_SAMPLED if getattr(self, name) != getattr(SamplingParams, name)]:
            raise ValueError(f"{given[0]}: pairs are made of answers that are sampled, n of them; leave it out")
        if self.reward is not None and self.score != "logprob":
            raise ValueError("reward: is the model of the score logprob; give --score logprob with it, or leave it out")


def data_sample_pairs(options: DataSamplePairs) -> None:
    """Let a model answer prompts, and write the best and the worst answer to each as a pair."""
    check_free(Path(options.out))  # mistakes are said before a model is read
    files, score = named_files("prompts", options.prompts), find_score(options.score)
    params = SamplingParams(**{name: getattr(options, name) for name in PARAMETERS})
    told = ("score", "margin", "columns", "max_samples", "on_bad", "dtype")
    made_of = {name: getattr(options, name) for name in told} | dataclasses.asdict(params)
    made_of |= {"prompts": {str(file): sha256(file) for file in files}}
    if score.file is not None:
        made_of |= {score.file: sha256(score.file)}
    respondent, made_of["model"] = respondent_of(options, options.path, options.step, options.template)
    if options.reward is not None:
        reward, made_of["reward"] = respondent_of(options, options.reward)
        score = find_score(options.score, reward)
    sampled = sample_pairs(
        respondent,
        PromptFiles(files, options.columns, options.max_samples, options.on_bad == "skip"),
        params,
        score,
        options.out,
        margin=options.margin,
        made_of=made_of,
        max_rows=options.max_rows,
    )
    for problem in sampled.bad[:SHOWN]:
        LOGGER.warning("skipped: %s", problem)
    print("\n".join(pairs_report(options.out, sampled)))


def respondent_of(
    options: DataSamplePairs, path: str, step: int | None = None, template: str = "auto"
) -> tuple[Respondent, list[str | None]]:
    """A model that is given conversations, and what tells it from another: its weights and template."""
    folder = find_checkpoint(Path(path), step)
    model, tokenizer = load(folder, find_device(options.device), dtype=DTYPES.get(options.dtype))
    if tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer beside the model, so it cannot read or write text")
    chosen = template_for(folder, template, tokenizer)
    respondent = Respondent(model, tokenizer, partial(conversing(chosen), tokenizer), chosen)
    return respondent, [weights_hash(folder), tokenizer.hash, chosen and chosen.name]


def pairs_report(out: str, sampled: Sampled) -> Iterator[str]:
    """What became of the prompts, a line a fact."""
    yield f"{out}: {sampled.n_pairs:,} pairs of {sampled.n_prompts:,} prompts"
    yield f"chosen {sampled.chosen_length:,.0f} characters long, rejected {sampled.rejected_length:,.0f}, on average"
    yield from (f"{sampled.dropped[reason]:,} {why}" for reason, why in REASONS.items() if reason in sampled.dropped)
    if sampled.bad:
        yield f"{len(sampled.bad):,} rows are no prompts"


def sampling_defaults(options: DataSamplePairs) -> Layer:
    """What the model's folder says of sampling from it, but for what is decided here."""
    layer = params_of_folder(options)
    own = (*NOT_SAMPLED, "n", "seed")
    return Layer(layer.origin, {name: value for name, value in layer.values.items() if name not in own})


VERBS = {
    "data sample-pairs": Verb(
        data_sample_pairs,
        DataSamplePairs,
        ["path", "prompts", "out"],
        "MODEL PROMPTS OUT: pairs to prefer by, of the best and the worst of a model's answers",
        defaults=sampling_defaults,
    )
}
