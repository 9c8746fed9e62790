"""How fast a model is fine-tuned on conversations, beside TRL's SFTTrainer.

    python benchmarks/sft.py alpaca_zh.json alpaca_en.json --tokenizer hf_tokenizer/ [--threads 2] [--rounds 5]

The 26M shape of train_step.py in fp32 on a CPU, the same first weights, tokenizer, conversations, tokens and mask on
all sides. minillm's is what sft.py builds: its conversation store, loader of packed rows, objective and Trainer. TRL
runs as its authors chose, but for gradient checkpointing and bf16, which are on by default and only cost time on a CPU;
and in its packed modes, of which there are three (`PEERS`).

Rounds and ratios are those of beside_trl.py. Before the first round all losses on eight conversations are compared: of
first weights, as the mean over the tokens that are learned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from beside import transformers_from
from beside_trl import (
    ON_A_CPU,
    QUIET,
    Lesson,
    Options,
    Ours,
    Rows,
    Start,
    Task,
    all_steps,
    arguments,
    compare,
    make_parser,
)

from minillm.data.loader import eval_batches
from minillm.data.store import TokenStore
from minillm.losses import IGNORE_INDEX
from minillm.recipe import begin, build_model, make_trainer, open_text, opened, read_config, settle
from minillm.recipe.sft import FineTuningConfig, answers_objective, open_chats
from minillm.recipe.tuning import adapt, fitting_tuning, with_template

ROW_A_STEP = {"packing": True, "per_device_train_batch_size": 1}
PEERS: dict[str, Options] = {
    "TRL": {},
    "TRL, packed": {"packing": True},
    "TRL, packed, a row a step": ROW_A_STEP,
    "TRL, wrapped, a row a step": ROW_A_STEP | {"packing_strategy": "wrapped"},
}
SEES_OTHERS = ("TRL, wrapped, a row a step",)  # conversations cut where a row ends, and no mask between them


@contextmanager
def ours(start: Start, lesson: Lesson) -> Iterator[Ours]:
    """A pass over the conversations, as sft.py makes it, a row a step."""
    more = {"sft.template": "chatml", "optim.lr": 2e-5, "train.batch_tokens": lesson.row}  # TRL's rate
    with arguments(start, lesson, **more) as argv:
        config = read_config(FineTuningConfig, argv, partial(fitting_tuning, without_data=None))
        with opened(config) as (dist, run):
            tokenizer, sources = open_text(config, dist, partial(open_chats, config))
            config = with_template(config, tokenizer)
            settled = settle(config, tokenizer, sources, dist)
            model = build_model(settled, partial(adapt, config=config))
            trainer = make_trainer(settled, model, answers_objective(config, settled.shape.vocab_size), run)
            begin(trainer, run, tokenizer, None, config.model.path)
            yield Ours(trainer, partial(all_steps, trainer), sources[0].prepared.train)
            trainer.loader.close()


def documents(store: TokenStore) -> Rows:
    """The conversations as TRL takes them: the same tokens, of which the same count."""
    found: Rows = {"input_ids": [], "labels": []}
    for number in range(store.n_documents):
        begin, end = store.document_offsets[number : number + 2].tolist()
        tokens = store.tokens(begin, end).tolist()
        found["input_ids"].append(tokens)
        learned = store.trained(begin, end)
        found["labels"].append([token if known else IGNORE_INDEX for token, known in zip(tokens, learned)])
    return found


def their_trainer(start: Start, lesson: Lesson, rows: Rows, options: Options):
    """TRL's trainer of a pass over the same conversations."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    config = trl.SFTConfig(output_dir=str(lesson.folder / "trl"), max_length=lesson.row, **ON_A_CPU, **QUIET, **options)
    trainer = trl.SFTTrainer(
        model=transformers_from(start.theirs),
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(start.theirs),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def theirs(start: Start, lesson: Lesson, rows: Rows, options: Options) -> Callable[[], object]:
    """What makes the pass of a peer."""
    return their_trainer(start, lesson, rows, options).train


def check_losses(start: Start, lesson: Lesson, peers: Sequence[str]) -> None:
    """Asserts that all begin with the same loss a learned token, and warms them up by a pass."""
    with ours(start, lesson) as (trainer, run, store):
        batches = list(eval_batches(store, lesson.row, packing=True, micro_batch_size=1))
        with torch.no_grad():
            found = sum(trainer.objective(trainer.model, batch)[0].item() for batch in batches)
        expected = found / sum(map(trainer.objective.count, batches))
        rows = documents(store)
        run()
    for name in peers:
        if name not in SEES_OTHERS:
            once = {"per_device_train_batch_size": len(rows["input_ids"]), "max_steps": 1, "logging_steps": 1}
            trainer = their_trainer(start, lesson, rows, PEERS[name] | once)
            trainer.train()
            loss = trainer.state.log_history[0]["loss"]
            assert abs(loss - expected) < 1e-3, f"{name}: the first loss is {loss:.4f}, minillm's {expected:.4f}"


TASK = Task(ours, documents, theirs, check_losses, PEERS, row=1024, checked=8)


def main(argv: list[str] | None = None) -> None:
    compare(TASK, make_parser(TASK, __doc__).parse_args(argv))


if __name__ == "__main__":
    main()
