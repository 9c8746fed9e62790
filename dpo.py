"""Teach a language model which of two answers is better: a model and a file of pairs in, a model that prefers out.

python dpo.py                                          after `python sft.py`: what nobody can know is not invented
python dpo.py --model.path runs/mine-sft --data.path pairs.json --run.dir runs/mine-dpo
python dpo.py --model.path Qwen2.5-0.5B-Instruct/ --data.path pairs.json --lora.r 16 --run.dir runs/qwen-dpo
python dpo.py --dpo.loss kto --data.path labels.jsonl ...                answers one by one, each good or bad
python dpo.py --run.dir runs/mine-dpo --run.resume auto                  continue where it stopped
torchrun --nproc_per_node 8 dpo.py ...                 the same on eight GPUs, or as many processes
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.config import Layer, help_text
from minillm.files import read_json
from minillm.log import make_trackers, run_command
from minillm.plan import recommend_preference
from minillm.preference import FallingChosen
from minillm.recipe import begin, build_model, make_trainer, open_text, opened, read_config, settle, starting_point
from minillm.recipe.answering import answer_held_out, answer_some, read_answers, sum_up, unanswered
from minillm.recipe.dpo import (
    PreferenceTuningConfig,
    at_first,
    base_and_identity,
    check_reference,
    open_pairs,
    preference_objective,
    sum_up_preferences,
    with_reference,
)
from minillm.recipe.tuning import adapt, as_trained, fitting_tuning, with_template
from minillm.report import show_answers, show_figures, show_preferences, show_stop
from minillm.run import RunDirectory

USAGE = f"usage: python dpo.py [CONFIG.toml] [--section.field VALUE ...]\n\n{__doc__}"
QUICKSTART = Path(__file__).parent / "configs" / "dpo-quickstart.toml"
PLACES = Layer("defaults of dpo.py", {"model.path": "runs/quickstart-sft", "run.dir": "runs/quickstart-dpo"})
Config = PreferenceTuningConfig


def main(argv: Sequence[str]) -> int:
    """Learn from preferences; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text(Config, USAGE))
        return 0
    fitting = partial(fitting_tuning, without_data=QUICKSTART, recommend=recommend_preference)
    config = read_config(Config, argv, fitting, PLACES)
    trackers = make_trackers(config.log, config.run.dir)
    with opened(config) as (dist, run):
        start = starting_point(config.run, run, dist)
        tokenizer, sources = open_text(config, dist, partial(open_pairs, config))
        config = with_template(config, tokenizer)
        dist.at("building the model")
        settled = with_reference(settle(config, tokenizer, sources, dist, partial(as_trained, config=config)))
        model = build_model(settled, partial(adapt, config=config))
        objective = preference_objective(settled)
        base_path, must_agree = base_and_identity(settled.config, start)
        trainer = make_trainer(
            settled,
            model,
            objective,
            run,
            [*trackers, FallingChosen(run.metrics)],
            base_path=base_path,
            must_agree=must_agree,
            more_figures=partial(answer_some, model, settled),
            measure=objective,
        )
        refer = at_first(settled, must_agree.get("start_sha256"), start)
        goes_on = begin(trainer, run, tokenizer, start, config.model.path, refer)
        if not goes_on and not unanswered(settled, run):
            return 0
        if not start:
            answer_held_out("before", trainer, settled, run)
        summary = trainer.fit() if goes_on else read_json(run.summary)
        check_reference(trainer)
        if summary["finished"]:
            answer_held_out("after", trainer, settled, run)
        if dist.is_main:
            metrics = config.dpo.metrics
            report(settled.config, run, sum_up_preferences(run, metrics, sum_up(run, metrics, summary)))
    return 0


def report(config: Config, run: RunDirectory, summary: dict) -> None:
    """Answers, the loss curve, the figures, and what to do next."""
    if not summary["finished"]:
        show_stop(summary)
        return
    show_figures(run, summary, [], best=config.train.patience is not None)
    show_answers(summary, config.dpo.metrics, read_answers(run, "after"), config.log.samples)
    show_preferences(summary)
    print(
        f"\nnext:  minillm chat {run.path}\n"
        f"       minillm data inspect {run.path} --step 1\n"
        "       python dpo.py --model.path runs/mine-sft --data.path pairs.json --run.dir runs/mine-dpo\n"
        "       python dpo.py --help"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
