"""What sft.py and dpo.py share, which time passes over examples beside TRL's trainers: model, examples, rounds, table.

A round is one pass over examples that no round had before, by a fresh model of each; all run in one process in turns.
A ratio is the median over the rounds of the other's time divided by minillm's in the same round (above 1: minillm is
faster). Reading and tokenising are not timed.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from beside import LLAMA_26M, Seconds, compared, importable, machine, table, timed

from minillm.data.records import records
from minillm.data.store import TokenStore
from minillm.load import export_hugging_face, save
from minillm.model.init import init_weights
from minillm.model.presets import llama2
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from minillm.trainer import Trainer

CONTEXT = 2048  # tokens that the model can hold
SHAPES = {"llama-26m": LLAMA_26M, "llama-tiny": LLAMA_26M | {"dim": 32, "n_layers": 2, "ffn_dim": 64}}
ON_A_CPU = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True}
QUIET = {"num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}

Rows = dict[str, list[list[int]]]  # examples as TRL takes them when they are tokenised already
Options = Mapping[str, Any]  # of TRL's config, beside what is its default


class Start(NamedTuple):
    """Where all begin: the same model with its tokenizer, in both formats."""

    ours: Path
    theirs: Path


class Lesson(NamedTuple):
    """Some examples, and where what is made of them is kept."""

    path: Path
    folder: Path
    row: int  # tokens of a packed row, and the longest example


class Ours(NamedTuple):
    """A pass of minillm."""

    trainer: Trainer
    run: Callable[[], object]
    store: TokenStore


class Task(NamedTuple):
    """What is compared."""

    ours: Callable[[Start, Lesson], AbstractContextManager[Ours]]
    rows: Callable[[TokenStore], Rows]
    theirs: Callable[[Start, Lesson, Rows, Options], Callable[[], object]]  # what makes the pass, when it is called
    check: Callable[[Start, Lesson, Sequence[str]], None]  # asserts that all begin with the same numbers
    peers: dict[str, Options]
    row: int  # tokens, where nothing else is asked for
    checked: int  # examples whose first numbers are compared, at least a row


def make_start(shape: str, tokenizer: Tokenizer, folder: Path, seed: int = 0) -> Start:
    model = Transformer(llama2(vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT, **SHAPES[shape]))
    init_weights(model, seed)
    ours = save(model, tokenizer, folder / "ours")
    return Start(ours, export_hugging_face(ours, folder / "theirs"))


def make_lesson(path: Path, first: int, count: int, folder: Path, row: int) -> Lesson:
    """`count` examples of a file, from number `first` on."""
    chosen = [example for _, example in islice(records(path), first, first + count)]
    if len(chosen) < count:
        raise ValueError(f"{path}: {first + count} examples are asked for, it has {first + len(chosen)}")
    home = folder / f"{path.stem}-{first}-{count}"
    home.mkdir(exist_ok=True)
    (home / "examples.json").write_text(json.dumps(chosen), encoding="utf-8")
    return Lesson(home / "examples.json", home, row)


@contextmanager
def arguments(start: Start, lesson: Lesson, **more: Any) -> Iterator[list[str]]:
    """The command line of a recipe, for a pass over the examples in a run's directory of its own."""
    with TemporaryDirectory(dir=lesson.folder) as folder:
        given = {
            "model.path": start.ours,
            "data.path": lesson.path,
            "data.cache_dir": lesson.folder / "cache",
            "data.val": 0,
            "data.seq_len": lesson.row,
            "train.max_epochs": 1,
            "train.precision": "fp32",
            "run.dir": f"{folder}/run",
            "run.device": "cpu",
        }
        yield [word for name, value in (given | more).items() for word in (f"--{name}", str(value))]


def all_steps(trainer: Trainer) -> None:
    """One pass of ours."""
    while not trainer.over():
        trainer.step()


# --- rounds -----------------------------------------------------------------------------------------------------------


def measure(task: Task, start: Start, path: Path, peers: Sequence[str], folder: Path, options: argparse.Namespace):
    """Print the rows of one file."""
    device = torch.device("cpu")
    task.check(start, make_lesson(path, 0, min(task.checked, options.examples), folder, options.row), peers)
    seconds: dict[str, list[Seconds]] = {name: [] for name in ("minillm", *peers)}
    tokens = 0
    for number in range(options.rounds):
        lesson = make_lesson(path, number * options.examples, options.examples, folder, options.row)
        with task.ours(start, lesson) as ours:
            seconds["minillm"].append(timed(lambda run: run(), ours.run, device))
            rows = task.rows(ours.store)
            tokens += ours.store.n_tokens
        for name in peers:
            run = task.theirs(start, lesson, rows, task.peers[name])
            seconds[name].append(timed(lambda run: run(), run, device))
    mean = tokens / (options.rounds * options.examples)
    for one in compared(seconds, options.examples):
        speed = f"{one.rate:.2f} | {one.rate * mean:,.0f}"
        print(f"| {path.stem} | {one.name} | {speed} | {one.wall:.2f} | {one.cpu:.2f} |", flush=True)


def make_parser(task: Task, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="of examples, in any format that minillm reads")
    parser.add_argument("--tokenizer", help="a run, a folder of Hugging Face's, or any that minillm takes; none: bytes")
    parser.add_argument("--shape", choices=SHAPES, default="llama-26m")
    parser.add_argument("--peers", nargs="+", choices=task.peers, default=list(task.peers))
    parser.add_argument("--examples", type=int, default=32, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", type=int, default=task.row, help="its tokens, and those of the longest example")
    return parser


def compare(task: Task, options: argparse.Namespace) -> None:
    """Print the table of all files."""
    torch.set_num_threads(options.threads)
    peers = options.peers if importable(["trl"]) else []
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else ByteTokenizer()
    print(machine(torch.device("cpu"), options.threads, ["transformers", "trl"]))
    print(f"vocabulary {tokenizer.vocab_size:,}")
    table("examples", "", "a second", "tokens/s", "its time / minillm's", "in CPU time")
    with TemporaryDirectory() as folder:
        start = make_start(options.shape, tokenizer, Path(folder))
        for path in options.files:
            measure(task, start, path, peers, Path(folder), options)
