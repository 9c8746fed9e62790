"""How fast a model is fine-tuned on conversations, beside TRL's SFTTrainer.

    python benchmarks/sft.py alpaca_zh.json alpaca_en.json --tokenizer hf_tokenizer/ [--threads 2] [--rounds 4]

The 26M shape of train_step.py in fp32 on a CPU, the same first weights, tokenizer, conversations, tokens and mask on
all sides. minillm's is what sft.py builds: its conversation store, loader of packed rows, objective and Trainer. TRL
runs as its authors chose (`DEFAULTS`), but for gradient checkpointing and bf16, which are on by default and only cost
time on a CPU; and in its packed modes, of which there are three (`PEERS`).

A round is one pass over conversations that no round had before, by a fresh model of each; all run in one process in
turns. A ratio is the median over the rounds of the other's time divided by minillm's in the same round (above 1:
minillm is faster). Reading and tokenising are not timed. Before the first round all losses on eight conversations are
compared: of first weights, as the mean over the tokens that are learned.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from beside import LLAMA_26M, Seconds, as_transformers, compared, importable, machine, table, timed

from minillm.data.loader import eval_batches
from minillm.data.records import records
from minillm.data.store import TokenStore
from minillm.load import export_hugging_face, save
from minillm.losses import IGNORE_INDEX
from minillm.model.presets import llama2
from minillm.model.transformer import Transformer
from minillm.recipe import begin, build_model, make_trainer, open_text, opened, read_config, settle
from minillm.recipe.sft import FineTuningConfig, answers_objective, open_chats
from minillm.recipe.tuning import adapt, fitting_tuning, with_template
from minillm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from minillm.trainer import Trainer

ROW = 1024  # tokens of a packed row, and the longest conversation: TRL's default
SHAPES = {"llama-26m": LLAMA_26M, "llama-tiny": LLAMA_26M | {"dim": 32, "n_layers": 2, "ffn_dim": 64}}
DEFAULTS = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "num_train_epochs": 1}
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
PEERS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, packed": {"packing": True},
    "TRL, packed, a row a step": {"packing": True, "per_device_train_batch_size": 1},
    "TRL, wrapped, a row a step": {
        "packing": True,
        "packing_strategy": "wrapped",
        "per_device_train_batch_size": 1,
    },
}
SEES_OTHERS = ("TRL, wrapped, a row a step",)  # conversations cut where a row ends, and no mask between them


class Start(NamedTuple):
    """What all begin with: a model with its tokenizer, in memory and as folders of both formats."""

    model: Transformer
    ours: Path
    theirs: Path


class Lesson(NamedTuple):
    """Some conversations, and where what is made of them is kept."""

    path: Path
    folder: Path


def make_start(shape: str, tokenizer: Tokenizer, folder: Path) -> Start:
    torch.manual_seed(0)
    model = Transformer(llama2(vocab_size=tokenizer.vocab_size, max_seq_len=ROW, **SHAPES[shape]))
    ours = save(model, tokenizer, folder / "ours")
    return Start(model, ours, export_hugging_face(ours, folder / "theirs"))


def make_lesson(path: Path, first: int, count: int, folder: Path) -> Lesson:
    """`count` conversations of a file, from number `first` on."""
    chosen = [row for _, row in islice(records(path), first, first + count)]
    if len(chosen) < count:
        raise ValueError(f"{path}: {first + count} conversations are asked for, it has {first + len(chosen)}")
    home = folder / f"{path.stem}-{first}-{count}"
    home.mkdir(exist_ok=True)
    (home / "chats.json").write_text(json.dumps(chosen), encoding="utf-8")
    return Lesson(home / "chats.json", home)


# --- the contenders ---------------------------------------------------------------------------------------------------


@contextmanager
def ours(start: Start, lesson: Lesson) -> Iterator[tuple[Trainer, TokenStore]]:
    """The trainer of a pass over the conversations, as sft.py makes it, and what it reads."""
    with TemporaryDirectory(dir=lesson.folder) as folder:
        given = {
            "model.path": start.ours,
            "data.path": lesson.path,
            "data.cache_dir": lesson.folder / "cache",
            "data.val": 0,
            "data.seq_len": ROW,
            "sft.template": "chatml",
            "optim.lr": 2e-5,  # TRL's default, which is of no consequence here
            "train.batch_tokens": ROW,
            "train.max_epochs": 1,
            "train.precision": "fp32",
            "run.dir": f"{folder}/run",
            "run.device": "cpu",
        }
        argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        config = read_config(FineTuningConfig, argv, partial(fitting_tuning, without_data=None))
        with opened(config) as (dist, run):
            tokenizer, sources = open_text(config, dist, partial(open_chats, config))
            config = with_template(config, tokenizer)
            settled = settle(config, tokenizer, sources, dist)
            model = build_model(settled, partial(adapt, config=config))
            trainer = make_trainer(settled, model, answers_objective(config, settled.shape.vocab_size), run)
            begin(trainer, run, tokenizer, None, config.model.path)
            yield trainer, sources[0].prepared.train
            trainer.loader.close()


def pass_over(trainer: Trainer) -> None:
    """One pass of ours, a step after the other."""
    while not trainer.over():
        trainer.step()


def documents(store: TokenStore) -> dict[str, list[list[int]]]:
    """The conversations as TRL takes them when they are tokenised already: the same tokens, of which the same count."""
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for number in range(store.n_documents):
        begin, end = store.document_offsets[number : number + 2].tolist()
        tokens = store.tokens(begin, end).tolist()
        found["input_ids"].append(tokens)
        learned = store.trained(begin, end)
        found["labels"].append([token if known else IGNORE_INDEX for token, known in zip(tokens, learned)])
    return found


def theirs(start: Start, lesson: Lesson, rows: dict[str, list[list[int]]], options: dict[str, Any]):
    """TRL's trainer of a pass over the same conversations."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    config = trl.SFTConfig(output_dir=str(lesson.folder / "trl"), **DEFAULTS, **QUIET, **options)
    trainer = trl.SFTTrainer(
        model=as_transformers(start.model),
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(start.theirs),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def check_losses(start: Start, lesson: Lesson, peers: list[str]) -> None:
    """Asserts that all begin with the same loss a learned token, which also warms them up."""
    with ours(start, lesson) as (trainer, store), torch.no_grad():
        batches = list(eval_batches(store, ROW, packing=True, micro_batch_size=1))
        found = sum(trainer.objective(trainer.model, batch)[0].item() for batch in batches)
        expected = found / sum(map(trainer.objective.count, batches))
        rows = documents(store)
    for name in peers:
        if name not in SEES_OTHERS:
            options = PEERS[name] | {"per_device_train_batch_size": len(rows["input_ids"])}
            trainer = theirs(start, lesson, rows, options | {"max_steps": 1, "logging_steps": 1})
            trainer.train()
            loss = trainer.state.log_history[0]["loss"]
            assert abs(loss - expected) < 1e-3, f"{name}: the first loss is {loss:.4f}, minillm's {expected:.4f}"


# --- speed ------------------------------------------------------------------------------------------------------------


def measure(start: Start, path: Path, peers: list[str], folder: Path, options: argparse.Namespace) -> None:
    """Print the rows of one file."""
    device = torch.device("cpu")
    check_losses(start, make_lesson(path, 0, min(8, options.examples), folder), peers)
    seconds: dict[str, list[Seconds]] = {name: [] for name in ("minillm", *peers)}
    tokens = 0
    for number in range(options.rounds):
        lesson = make_lesson(path, number * options.examples, options.examples, folder)
        with ours(start, lesson) as (trainer, store):
            seconds["minillm"].append(timed(pass_over, trainer, device))
            rows = documents(store)
        assert trainer.progress.samples == trainer.loader.samples_per_epoch, "a pass is over all rows, once"
        tokens += sum(map(len, rows["input_ids"]))
        for name in peers:
            trainer = theirs(start, lesson, rows, PEERS[name])
            seconds[name].append(timed(type(trainer).train, trainer, device))
    mean = tokens / (options.rounds * options.examples)
    for one in compared(seconds, options.examples):
        speed = f"{one.rate:.2f} | {one.rate * mean:,.0f}"
        print(f"| {path.stem} | {one.name} | {speed} | {one.wall:.2f} | {one.cpu:.2f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="of conversations, in any format that sft.py reads")
    parser.add_argument("--tokenizer", help="a run, a folder of Hugging Face's, or what else sft.py takes; none: bytes")
    parser.add_argument("--shape", choices=SHAPES, default="llama-26m")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--examples", type=int, default=64, help="conversations a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    peers = options.peers if importable(["trl"]) else []
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else ByteTokenizer()
    print(machine(torch.device("cpu"), options.threads, ["transformers", "trl"]))
    print(f"vocabulary {tokenizer.vocab_size:,}")
    table("conversations", "", "a second", "tokens/s", "its time / minillm's", "in CPU time")
    with TemporaryDirectory() as folder:
        start = make_start(options.shape, tokenizer, Path(folder))
        for path in options.files:
            measure(start, path, peers, Path(folder), options)


if __name__ == "__main__":
    main()
