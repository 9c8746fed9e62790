"""How fast a model learns from preferences, beside TRL's DPOTrainer, and in how much memory.

    python benchmarks/dpo.py dpo_zh.json dpo_en.json --tokenizer hf_tokenizer/ [--threads 2] [--rounds 5] [--memory]

The 26M shape of train_step.py in fp32 on a CPU, the same first weights, tokenizer, pairs and tokens on all sides, and
the same loss, DPO's with beta 0.1. minillm's is what dpo.py builds: its store of trees, loader, objective, reference
and Trainer; a step is two rows of 2,048 tokens, which hold about four pairs. TRL runs as its authors chose, eight pairs
a step, but for gradient checkpointing and bf16, which are on by default and only cost time on a CPU; with the
reference's log-probabilities computed before; and both with one pair a step, which pads least and is its fastest here
(it has no padding-free mode at the moment). To compute the reference is a part of the time wherever it is done.

A pair is at most 2,048 tokens of prompt and both answers: what is longer is cut by minillm's rules, for both.

Rounds and ratios are those of beside_trl.py. Before the first round the log-probabilities of the answers to four
pairs are compared, of first weights. `--memory`: instead of time, the largest resident size of a fresh process during a
pass, less that before: weights, reference, gradients, moments, and what a step needs beside them.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from beside import in_fresh_process, memory_during, table, transformers_from
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
    make_lesson,
    make_parser,
    make_start,
)

from minillm.data.loader import eval_batches
from minillm.data.store import TokenStore
from minillm.data.trees import read_tree
from minillm.plan import recommend_preference
from minillm.preference import target_logprobs
from minillm.recipe import begin, build_model, make_trainer, open_text, opened, read_config, settle
from minillm.recipe.dpo import (
    PreferenceTuningConfig,
    at_first,
    base_and_identity,
    open_pairs,
    preference_objective,
    with_reference,
)
from minillm.recipe.tuning import adapt, fitting_tuning, with_template
from minillm.tokenizer import ByteTokenizer, load_tokenizer

BEFORE = {"precompute_ref_log_probs": True}
PAIR_A_STEP = {"per_device_train_batch_size": 1}
PEERS: dict[str, Options] = {
    "TRL": {},
    "TRL, reference before": BEFORE,
    "TRL, a pair a step": PAIR_A_STEP,
    "TRL, reference before, a pair a step": BEFORE | PAIR_A_STEP,
}


@contextmanager
def ours(start: Start, lesson: Lesson) -> Iterator[Ours]:
    """A pass over the pairs, as dpo.py makes it."""
    more = {"dpo.template": "chatml", "dpo.beta": 0.1, "optim.lr": 1e-6, "train.batch_tokens": 2 * lesson.row}
    with arguments(start, lesson, **more) as argv:
        fitting = partial(fitting_tuning, without_data=None, recommend=recommend_preference)
        config = read_config(PreferenceTuningConfig, argv, fitting)
        with opened(config) as (dist, run):
            tokenizer, sources = open_text(config, dist, partial(open_pairs, config))
            config = with_template(config, tokenizer)
            settled = with_reference(settle(config, tokenizer, sources, dist))
            model = build_model(settled, partial(adapt, config=config))
            _, must_agree = base_and_identity(settled.config, None)
            trainer = make_trainer(settled, model, preference_objective(settled), run, must_agree=must_agree)
            refer = at_first(settled, must_agree.get("start_sha256"), None)
            begin(trainer, run, tokenizer, None, config.model.path)

            def pass_over() -> None:
                refer(trainer)
                all_steps(trainer)

            yield Ours(trainer, pass_over, sources[0].prepared.train)
            trainer.loader.close()


def pairs(store: TokenStore) -> Rows:
    """The pairs as TRL has them once they are tokenised."""
    found: Rows = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for number in range(store.n_documents):
        tree = read_tree(store, number)
        for column, tokens in zip(found.values(), (tree.prompt, *(answer.tokens for answer in tree.answers))):
            column.append(tokens.tolist())
    return found


def their_trainer(start: Start, lesson: Lesson, rows: Rows, options: Options):
    """TRL's trainer of a pass over the same pairs."""
    import datasets
    import transformers
    import trl

    class Tokenised(trl.DPOTrainer):
        """That of pairs that are tokenised already."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    datasets.disable_progress_bars()
    given = {"output_dir": str(lesson.folder / "trl"), "max_length": lesson.row}  # so that it cuts nothing more
    trainer = Tokenised(
        model=transformers_from(start.theirs),
        ref_model=None if options.get("precompute_ref_log_probs") else transformers_from(start.theirs),
        args=trl.DPOConfig(**given | ON_A_CPU | QUIET | dict(options)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(start.theirs),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def theirs(start: Start, lesson: Lesson, rows: Rows, options: Options) -> Callable[[], object]:
    """What makes the pass of a peer; what is computed before training is done by making the trainer."""
    if options.get("precompute_ref_log_probs"):
        return lambda: their_trainer(start, lesson, rows, options).train()
    return their_trainer(start, lesson, rows, options).train


def check_logprobs(start: Start, lesson: Lesson, peers: Sequence[str]) -> None:
    """Asserts that all begin with the same log-probabilities of answers, and warms them up by a pass."""
    with ours(start, lesson) as (trainer, run, store):
        batches = list(eval_batches(store, lesson.row, packing=True, micro_batch_size=1))
        with torch.no_grad():
            whole = sum(target_logprobs(trainer.model, batch).sum().item() for batch in batches)
        expected = whole / store.n_documents
        rows = pairs(store)
        run()
    for name in peers:
        once = {"per_device_train_batch_size": store.n_documents, "max_steps": 1, "logging_steps": 1}
        trainer = their_trainer(start, lesson, rows, PEERS[name] | once)
        trainer.train()
        logged = trainer.state.log_history[0]
        found = logged["logps/chosen"] + logged["logps/rejected"]
        assert abs(found / expected - 1) < 1e-4, f"{name}: log p of a pair is {found:.2f}, minillm's {expected:.2f}"


TASK = Task(ours, pairs, theirs, check_logprobs, PEERS, row=2048, checked=4)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_of_ours(start: Start, lesson: Lesson, threads: int) -> int:
    """Bytes that a pass needs beside what the process has before; in the process that calls it."""
    torch.set_num_threads(threads)

    def run() -> None:
        with ours(start, lesson) as made:
            made.run()

    return memory_during(run)


def memory_of_theirs(start: Start, lesson: Lesson, threads: int, rows: Rows, options: Options) -> int:
    """The same of a peer."""
    import trl  # noqa: F401

    torch.set_num_threads(threads)
    return memory_during(lambda: theirs(start, lesson, rows, options)())


def measure_memory(options: argparse.Namespace) -> None:
    """Print the table of all files."""
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else ByteTokenizer()
    table("pairs", "", "MB", "minillm's share")
    with TemporaryDirectory() as folder:
        start = make_start(options.shape, tokenizer, Path(folder))
        for path in options.files:
            lesson = make_lesson(path, 0, options.examples, Path(folder), options.row)
            with ours(start, lesson) as made:
                rows = pairs(made.store)
            needed = {"minillm": in_fresh_process(memory_of_ours, start, lesson, options.threads)}
            for name in options.peers:
                arguments = (start, lesson, options.threads, rows, PEERS[name])
                needed[name] = in_fresh_process(memory_of_theirs, *arguments)
            for name, size in needed.items():
                share = needed["minillm"] / size
                print(f"| {path.stem} | {name} | {size / 1e6:,.0f} | {share:.2f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(TASK, __doc__)
    parser.add_argument("--memory", action="store_true", help="of the first examples of each file, instead of time")
    options = parser.parse_args(argv)
    if options.memory:
        measure_memory(options)
    else:
        compare(TASK, options)


if __name__ == "__main__":
    main()
