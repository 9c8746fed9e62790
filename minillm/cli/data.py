"""`minillm data ...`: prepare text, clean it, and look at what a run reads."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from minillm import checkpoint
from minillm.cli.verb import Verb
from minillm.config import Layer, build, fields_of, file_layer
from minillm.data.chat import find_template
from minillm.data.clean.config import CleanConfig
from minillm.data.clean.pipeline import clean, clean_shard, merge
from minillm.data.clean.report import table
from minillm.data.config import ConversationsConfig, DataConfig, PreferencesConfig, SharedTextConfig
from minillm.data.conversation_store import open_conversations
from minillm.data.corpus import identity, open_corpus, open_sources, with_pairs, with_path, with_questions
from minillm.data.formats import CONVERSATIONS, Formats, read_columns
from minillm.data.inspect import document_lines, inspect_lines
from minillm.data.jinja import choose_template
from minillm.data.loader import Loader
from minillm.data.masked import TurnsConfig
from minillm.data.mixture import Source
from minillm.data.preference_store import answers_in, open_preferences
from minillm.data.preferences import PREFERENCES
from minillm.data.shards import describe
from minillm.data.store import is_prepared, open_prepared
from minillm.data.text import named_files
from minillm.data.trees import PairsConfig
from minillm.log import read_metrics
from minillm.losses.preference import LOSSES
from minillm.recipe.sft import SFTConfig
from minillm.recipe.tuning import taught_by
from minillm.run import RunConfig, RunDirectory
from minillm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class DataPrepare:
    """Options of `data prepare`."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class DataClean:
    """Options of `data clean`."""

    out: Annotated[str, "folder to write"]
    shard: Annotated[str | None, "i/n: only the i-th of n shares of the text, into OUT/shard-i-of-n, for --merge"] = (
        None
    )
    merge: Annotated[str | None, "folder of all shards: write them to OUT without duplicates among them"] = None
    data: SharedTextConfig = field(default_factory=SharedTextConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)


@dataclass(frozen=True)
class DataInfo:
    """Options of `data info`."""

    path: Annotated[str, "folder that `data prepare` named"]
    verify: Annotated[bool, "read every token and check the hashes"] = False


@dataclass(frozen=True)
class InspectedConfig(ConversationsConfig):
    """Conversations or preferences to look at."""

    formats: ClassVar[Formats] = Formats(
        "a conversation or a preference",
        {**CONVERSATIONS.usual, **PREFERENCES.usual},
        (*PREFERENCES.sufficient, *CONVERSATIONS.sufficient),
        f"{CONVERSATIONS.needed}; or {PREFERENCES.needed}",
    )


@dataclass(frozen=True)
class DataInspect:
    """Options of `data inspect`."""

    path: Annotated[
        str, "run directory; or conversations or preferences: a file, folder or glob, or a folder that is prepared"
    ]
    step: Annotated[int, "step whose batch is shown, from 1", ">= 1"] = 1
    kind: Annotated[
        Literal["auto", "conversations", "pairs", "labels"], "what the rows of files hold; auto: as the first one says"
    ] = "auto"
    rows: Annotated[int, "samples or conversations shown", ">= 1"] = 4
    width: Annotated[int | None, "characters of each; none: 100 of a document, 1,000 of a conversation", ">= 10"] = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: InspectedConfig = field(default_factory=InspectedConfig)
    sft: TurnsConfig = field(default_factory=TurnsConfig)
    dpo: PairsConfig = field(default_factory=PairsConfig)


def data_prepare(options: DataPrepare) -> None:
    """Tokenise text into shards."""
    _, sources = open_corpus(options.data, options.tokenizer)
    for source in sources:
        if source.name:
            print(f"source {source.name}, {100 * source.share:.3g}% of the samples:")
        print(f"{source.prepared.directory}\n{describe(source.prepared)}")


def data_clean(options: DataClean) -> None:
    """Write what of a text is fit to be trained on, and a report of the rest."""
    out: str | Path = options.out
    if options.merge is not None:
        if options.shard is not None or (options.data, options.clean) != (SharedTextConfig(), CleanConfig()):
            raise ValueError("merge: what is merged and how is said by the shards; give no more than --merge and OUT")
        report = merge(options.merge, out)
    elif options.shard is not None:
        out, report = clean_shard(options.data, options.clean, out, options.shard)
    else:
        report = clean(options.data, options.clean, out)
    print(f"{out}\n\n{table(report)}")


def data_info(options: DataInfo) -> None:
    """Say what prepared data holds."""
    prepared = open_prepared(options.path)
    print(describe(prepared, verify=options.verify))


def data_inspect(options: DataInspect) -> None:
    """Print the documents and tokens of a step of a run; or conversations or preferences, and what is learned."""
    run, colour = RunDirectory(options.path), sys.stdout.isatty()
    if not run.config.exists():
        inspect_files(options, colour)
        return
    saved = file_layer(run.config).values

    def section(section_class: type, name: str):
        known = {field.name for field in fields_of(section_class)}
        values = {known_name: saved[key] for known_name in known if (key := f"{name}.{known_name}") in saved}
        return build(section_class, [Layer(str(run.config), values)])

    holds = {"sft": ConversationsConfig, "dpo": PreferencesConfig}
    kind = next((kind for kind in holds if any(name.startswith(f"{kind}.") for name in saved)), None)
    data = section(holds.get(kind, DataConfig), "data")
    if not data.seq_len:
        raise ValueError(f"{run.config}: data.seq_len is needed to know what a step read")
    tokenizer = load_tokenizer(run.path)
    if kind == "sft":
        turns, data = section(SFTConfig, "sft"), with_questions(data)
        sources = open_conversations(data, turns, find_template(turns.template, tokenizer), tokenizer)
    elif kind == "dpo":
        pairs, data = section(PairsConfig, "dpo"), with_pairs(data)
        answers = "pairs" if LOSSES[saved.get("dpo.loss", "dpo")].paired else "labels"
        sources = open_preferences(data, pairs, find_template(pairs.template, tokenizer), tokenizer, answers)
    else:
        sources = open_sources(with_path(data), tokenizer)
    newest = checkpoint.latest(run.checkpoints)
    state = checkpoint.read(newest)[0] if newest else identity(sources)
    if any(state.get(name) != value for name, value in identity(sources).items()):
        raise ValueError(f"{run.path}: the text under {data.path} is no longer that of the run")
    first, samples_per_step = samples_of(run, options.step, data.seq_len)
    loader = Loader(
        sources,
        seq_len=data.seq_len,
        packing=data.packing,
        micro_batch_size=1,
        samples_per_step=samples_per_step,
        seed=section(RunConfig, "run").seed,
        prefetch=False,
    )
    width = options.width or (1000 if kind else 100)
    lines = inspect_lines(loader, first, tokenizer, width, colour)
    samples = 0
    for line in lines:
        samples += line.startswith("sample ")
        if samples > options.rows:
            break
        print(line)


def inspect_files(options: DataInspect, colour: bool) -> None:
    """Print conversations or preferences with marks around what is learned of them, and the totals."""
    if is_prepared(options.path):
        tokenizer = load_tokenizer(options.path)
        sources = [Source("", 1, open_prepared(options.path))]
    else:
        if options.tokenizer.path is None and options.tokenizer.kind == "bpe":
            what = "not a run directory (there is no config.json), and no prepared tokens"
            raise ValueError(f"{options.path}: {what}; to see it as conversations, give --tokenizer.path RUN")
        tokenizer = train_tokenizer((), options.tokenizer)
        sources = open_rows(options, tokenizer)
    for source in sources:
        for line in document_lines(source.prepared.train, options.rows, tokenizer, options.width or 1000, colour):
            print(line)
        print(describe(source.prepared))


def open_rows(options: DataInspect, tokenizer: Tokenizer) -> list[Source]:
    """The rows of files, prepared as a run would."""
    given = {one.name: getattr(options.data, one.name) for one in dataclasses.fields(options.data)}
    given |= {"path": options.path, "seq_len": options.data.seq_len or 1024}
    [first, *_] = named_files("path", options.path)
    answers = options.kind
    if answers == "auto":
        answers = answers_in(first, read_columns(options.data.columns, InspectedConfig.formats))
    taught = taught_by(options.tokenizer.path)
    if answers in ("pairs", "labels"):
        template = choose_template(options.dpo.template, tokenizer, taught)
        return open_preferences(PreferencesConfig(**given), options.dpo, template, tokenizer, answers)
    template = choose_template(options.sft.template, tokenizer, taught)
    return open_conversations(ConversationsConfig(**given), options.sft, template, tokenizer)


def samples_of(run: RunDirectory, step: int, seq_len: int) -> tuple[int, int]:
    """(first sample, number of samples) of a step: between two rows of metrics, all steps took equally many."""
    rows = [{"step": 0, "tokens": 0}, *read_metrics(run.metrics)]
    if step > rows[-1]["step"]:
        raise ValueError(f"step: {run.path} has made {rows[-1]['step']} steps, so there is no step {step}")
    after = next(i for i, row in enumerate(rows) if row["step"] >= step)
    (begin, first), (end, last) = ((row["step"], row["tokens"]) for row in rows[after - 1 : after + 1])
    samples, rest = divmod(last - first, (end - begin) * seq_len)
    if rest:
        raise ValueError(f"step: {run.metrics} does not say where between steps {begin} and {end} the batch changed")
    return first // seq_len + (step - 1 - begin) * samples, samples


VERBS = {
    "data prepare": Verb(data_prepare, DataPrepare, [], "--data.path TEXT: tokenise once, for every run after"),
    "data clean": Verb(data_clean, DataClean, ["out"], "OUT --data.path TEXT: filter, remove duplicates and secrets"),
    "data info": Verb(data_info, DataInfo, ["path"], "PATH: what prepared data holds"),
    "data inspect": Verb(
        data_inspect,
        DataInspect,
        ["path"],
        "RUN --step N: the documents and tokens of a step; or FILE: what is learned of it",
    ),
}
