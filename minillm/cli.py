"""`minillm VERB`: each verb is a row of a table: its options as a dataclass, and a function that calls the library."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from minillm import checkpoint
from minillm.config import ConfigError, Layer, arguments, build, file_layer, help_text
from minillm.data.clean.config import CleanConfig
from minillm.data.clean.pipeline import clean, clean_shard, merge
from minillm.data.clean.report import table
from minillm.data.config import DataConfig, SharedTextConfig, StoriesOrTextConfig
from minillm.data.corpus import identity, open_corpus, open_sources, with_path
from minillm.data.inspect import inspect_lines
from minillm.data.loader import Loader
from minillm.data.shards import describe as describe_prepared
from minillm.data.store import open_prepared
from minillm.data.text import documents, named_files
from minillm.distributed.device import find_device
from minillm.doctor import advice, examine
from minillm.doctor import report as doctor_report
from minillm.files import free_directory
from minillm.generate.engine import stream
from minillm.generate.sampling import SamplingParams
from minillm.load import export, load
from minillm.log import read_metrics, run_command
from minillm.recipe import read_layers
from minillm.run import RunConfig, RunDirectory
from minillm.simulate import Plan, simulate
from minillm.simulate import report as simulation_report
from minillm.tokenizer import TokenizerConfig, describe, load_tokenizer, train_tokenizer
from minillm.tokenizer.eval import Text, measure, report


class Verb(NamedTuple):
    """A command: what it does, its options, and the options that may be given as plain words, in order."""

    run: Callable
    options: type
    words: Sequence[str]
    help: str
    reads_config: bool = False  # whether it takes a config file, and a model preset, as the scripts do


@dataclass(frozen=True)
class TokenizerTrain:
    """Options of `tokenizer train`."""

    out: Annotated[str, "folder to write"]
    data: StoriesOrTextConfig = field(default_factory=StoriesOrTextConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class TokenizerInfo:
    """Options of `tokenizer info`."""

    path: Annotated[str, "tokenizer folder or run"]


@dataclass(frozen=True)
class TokenizerEval:
    """Options of `tokenizer eval`."""

    path: Annotated[str, "tokenizer folder or run"]
    against: Annotated[str | None, "another tokenizer to set beside it"] = None
    data: StoriesOrTextConfig = field(default_factory=StoriesOrTextConfig)


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
class DataInspect:
    """Options of `data inspect`."""

    path: Annotated[str, "run directory"]
    step: Annotated[int, "step whose batch is shown, from 1", ">= 1"] = 1
    rows: Annotated[int, "samples shown", ">= 1"] = 4
    width: Annotated[int, "characters of each document", ">= 10"] = 100


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingParams):
    """Options of `generate`."""

    path: Annotated[str, "run directory, checkpoint, or folder"]
    prompt: Annotated[str, "text to continue"] = ""
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    device: Annotated[str, "auto | cpu | cuda | mps | ..."] = "auto"


@dataclass(frozen=True)
class Export:
    """Options of `export`."""

    path: Annotated[str, "run directory or checkpoint"]
    out: Annotated[str, "folder to write"]
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None


@dataclass(frozen=True)
class Doctor:
    """Options of `doctor`."""

    seconds: Annotated[float, "time to measure in, over all devices", ">= 0"] = 10.0
    json: Annotated[bool, "one JSON object instead of a table"] = False


def tokenizer_train(options: TokenizerTrain) -> None:
    """Train a tokenizer on text and save it."""
    out = free_directory(options.out)
    data = with_path(options.data)
    texts = (document.text for document in documents(named_files("data.path", data.path), data))
    tokenizer = train_tokenizer(texts, options.tokenizer)
    tokenizer.save(out)
    print(f"{options.out}\n{describe(tokenizer)}")


def tokenizer_info(options: TokenizerInfo) -> None:
    """Say what a tokenizer is."""
    print(describe(load_tokenizer(options.path)))


def tokenizer_eval(options: TokenizerEval) -> None:
    """Measure how well a tokenizer packs text, and whether the text comes back."""
    tokenizers = [load_tokenizer(path) for path in (options.path, options.against) if path is not None]
    data = with_path(options.data)
    found = documents(named_files("data.path", data.path), data)
    measures = measure(tokenizers, (Text(document.text, document.file, document.line) for document in found))
    if not measures[0].total.texts:
        raise ValueError(f"data.path: no text in {data.path}, so there is nothing to measure")
    print(report(measures))


def data_prepare(options: DataPrepare) -> None:
    """Tokenise text into shards."""
    _, sources = open_corpus(options.data, options.tokenizer)
    for source in sources:
        if source.name:
            print(f"source {source.name}, {100 * source.share:.3g}% of the samples:")
        print(f"{source.prepared.directory}\n{describe_prepared(source.prepared)}")


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
    print(describe_prepared(prepared, verify=options.verify))


def data_inspect(options: DataInspect) -> None:
    """Print the documents and tokens of a step of a run."""
    run = RunDirectory(options.path)
    if not run.config.exists():
        raise ValueError(f"{run.path}: not a run directory (there is no config.json)")
    saved = file_layer(run.config).values

    def section(section_class: type, name: str):
        values = {key.partition(".")[2]: value for key, value in saved.items() if key.startswith(f"{name}.")}
        return build(section_class, [Layer(str(run.config), values)])

    data = section(DataConfig, "data")
    if not data.seq_len:
        raise ValueError(f"{run.config}: data.seq_len is needed to know what a step read")
    tokenizer = load_tokenizer(run.path)
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
    lines = inspect_lines(loader, first, tokenizer, options.width)
    samples = 0
    for line in lines:
        samples += line.startswith("sample ")
        if samples > options.rows:
            break
        print(line)


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


def generate_text(options: Generate) -> None:
    """Continue a prompt, a piece at a time."""
    model, tokenizer = load(options.path, device=find_device(options.device), step=options.step)
    if tokenizer is None:
        raise ValueError(f"{options.path}: there is no tokenizer beside the model, so it cannot read or write text")
    params = SamplingParams(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingParams)})
    print(options.prompt, end="", flush=True)
    for piece in stream(model, tokenizer, options.prompt, params):
        print(piece, end="", flush=True)
    print()


def export_model(options: Export) -> None:
    """Write the model of a run as one file, with config and tokenizer."""
    out = export(options.path, free_directory(options.out), options.step)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:,.1f} MB; minillm.load({str(options.out)!r}) reads it")


def doctor(options: Doctor) -> None:
    """Say what this machine has, how fast it is and what to set."""
    places = {"run.dir": str(Path(RunConfig.dir).parent), "data.cache_dir": DataConfig.cache_dir}
    found = examine(options.seconds, places)
    print(json.dumps(found | {"advice": advice(found)}, indent=1) if options.json else doctor_report(found))


def plan(options: Plan) -> None:
    """Say what a run takes, and how to lay it out over GPUs."""
    found = simulate(options)
    print(json.dumps(found, indent=1) if options.json else simulation_report(found))


VERBS = {
    "tokenizer train": Verb(tokenizer_train, TokenizerTrain, ["out"], "OUT --data.path TEXT: train a tokenizer"),
    "tokenizer info": Verb(tokenizer_info, TokenizerInfo, ["path"], "PATH: what a tokenizer is"),
    "tokenizer eval": Verb(
        tokenizer_eval, TokenizerEval, ["path"], "PATH --data.path TEXT [--against OTHER]: how well it packs text"
    ),
    "data prepare": Verb(data_prepare, DataPrepare, [], "--data.path TEXT: tokenise once, for every run after"),
    "data clean": Verb(data_clean, DataClean, ["out"], "OUT --data.path TEXT: filter, remove duplicates and secrets"),
    "data info": Verb(data_info, DataInfo, ["path"], "PATH: what prepared data holds"),
    "data inspect": Verb(data_inspect, DataInspect, ["path"], "RUN --step N: the documents and tokens of a step"),
    "generate": Verb(generate_text, Generate, ["path"], "RUN --prompt TEXT: continue a text"),
    "export": Verb(export_model, Export, ["path", "out"], "RUN OUT: the model as one file, with config and tokenizer"),
    "plan": Verb(
        plan, Plan, [], "[CONFIG.toml] --gpus N: memory, time and a layout of a run on N GPUs", reads_config=True
    ),
    "doctor": Verb(doctor, Doctor, [], "what this machine has, how fast it is, what to set"),
}


def usage() -> str:
    """The list of verbs."""
    rows = "\n".join(f"  minillm {name} {verb.help}" for name, verb in VERBS.items())
    return f"usage: minillm VERB ...\n\n{rows}\n\n`minillm VERB --help` lists its options; --debug shows tracebacks."


def dispatch(argv: Sequence[str]) -> int:
    """Run the verb that the first one or two words name."""
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in VERBS), None)
    if name is None:
        if argv and not {"-h", "--help"} & set(argv):
            raise ConfigError([f"minillm {' '.join(words[:2])}: there is no such verb\n\n{usage()}"])
        print(usage())
        return 0
    verb = VERBS[name]
    rest = list(argv)[len(name.split()) :]
    if {"-h", "--help"} & set(rest):
        print(help_text(verb.options, f"usage: minillm {name} {verb.help}"))
        return 0
    if verb.reads_config:
        verb.run(build(verb.options, read_layers(verb.options, rest)))
        return 0
    given, line = arguments(verb.options, rest)
    if len(given) > len(verb.words):
        raise ConfigError([f"minillm {name}: {given[len(verb.words)]!r} is not expected; {verb.help}"])
    verb.run(build(verb.options, [Layer("command line", dict(zip(verb.words, given))), line]))
    return 0


def main() -> int:
    """The console script."""
    return run_command(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
