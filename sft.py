"""Fine-tune a language model on conversations: a model and a file of them in, a model that answers out.

python sft.py                                          after `python train.py`: questions about the embedded corpus
python sft.py --model.path runs/mine --data.path my.json --run.dir runs/mine-sft
python sft.py --model.path Qwen2.5-0.5B/ --data.path my.json --lora.r 16 --run.dir runs/qwen
python sft.py --run.dir runs/mine-sft --run.resume auto                  continue where it stopped
torchrun --nproc_per_node 8 sft.py ...                 the same on eight GPUs, or as many processes
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.config import Layer, help_text
from minillm.files import read_json
from minillm.log import make_trackers, run_command
from minillm.recipe import begin, build_model, make_trainer, open_text, opened, read_config, settle, starting_point
from minillm.recipe.answering import answer_held_out, answer_some, read_answers, sum_up, unanswered
from minillm.recipe.sft import FineTuningConfig, answers_objective, open_chats
from minillm.recipe.tuning import adapt, as_trained, base_of, fitting_tuning, with_template
from minillm.report import show_answers, show_figures, show_stop
from minillm.run import RunDirectory

USAGE = f"usage: python sft.py [CONFIG.toml] [--section.field VALUE ...]\n\n{__doc__}"
QUICKSTART = Path(__file__).parent / "configs" / "sft-quickstart.toml"
PLACES = Layer("defaults of sft.py", {"model.path": "runs/quickstart", "run.dir": "runs/quickstart-sft"})
Config = FineTuningConfig


def main(argv: Sequence[str]) -> int:
    """Fine-tune; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text(Config, USAGE))
        return 0
    config = read_config(Config, argv, partial(fitting_tuning, without_data=QUICKSTART), PLACES)
    trackers = make_trackers(config.log, config.run.dir)
    with opened(config) as (dist, run):
        start = starting_point(config.run, run, dist)
        tokenizer, sources = open_text(config, dist, partial(open_chats, config))
        config = with_template(config, tokenizer)
        dist.at("building the model")
        settled = settle(config, tokenizer, sources, dist, partial(as_trained, config=config))
        model = build_model(settled, partial(adapt, config=config))
        objective = answers_objective(config, settled.shape.vocab_size)
        base_path, must_agree = base_of(config)
        trainer = make_trainer(
            settled,
            model,
            objective,
            run,
            trackers,
            base_path=base_path,
            must_agree=must_agree,
            more_figures=partial(answer_some, model, settled),
        )
        goes_on = begin(trainer, run, tokenizer, start, config.model.path)
        if not goes_on and not unanswered(settled, run):
            return 0
        if not start:
            answer_held_out("before", trainer, settled, run)
        summary = trainer.fit() if goes_on else read_json(run.summary)
        if summary["finished"]:
            answer_held_out("after", trainer, settled, run)
        if dist.is_main:
            report(settled.config, run, sum_up(run, config.sft.metrics, summary))
    return 0


def report(config: Config, run: RunDirectory, summary: dict) -> None:
    """Answers, the loss curve, the figures, and what to do next."""
    if not summary["finished"]:
        show_stop(summary)
        return
    show_figures(run, summary, [], best=config.train.patience is not None)
    show_answers(summary, config.sft.metrics, read_answers(run, "after"), config.log.samples)
    print(
        f"\nnext:  minillm chat {run.path}\n"
        f"       minillm data inspect {run.path} --step 1\n"
        "       python sft.py --data.path my.json --run.dir runs/mine-sft\n"
        "       python sft.py --help"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
