"""Pretrain a language model: text in, a run directory with checkpoints and samples out.

python train.py                                        the embedded corpus: minutes on two CPU cores
python train.py --data.path my.txt                     your text; a configuration that fits its size is chosen
python train.py configs/shakespeare-char.toml --data.path tinyshakespeare.txt
python train.py --run.dir runs/mine --run.resume auto  continue where it stopped
torchrun --nproc_per_node 8 train.py ...               the same on eight GPUs, or as many processes
python train.py configs/continue.toml --model.path runs/mine --data.path new.txt   new text, from those weights
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from minillm.config import help_text
from minillm.data.corpus import open_corpus
from minillm.data.mixture import Source, held_out
from minillm.data.prompts import prompts_of
from minillm.log import make_trackers, run_command
from minillm.objectives import NextToken
from minillm.recipe import (
    RecipeConfig,
    begin,
    build_model,
    fitting,
    make_trainer,
    open_text,
    opened,
    read_config,
    settle,
    starting_point,
)
from minillm.report import show_figures, show_samples, show_stop
from minillm.run import RunDirectory
from minillm.tensors import is_sharded, unwrapped
from minillm.tokenizer import Tokenizer

USAGE = f"usage: python train.py [CONFIG.toml] [--section.field VALUE ...]\n\n{__doc__}"
QUICKSTART = Path(__file__).parent / "configs" / "quickstart.toml"
Config = RecipeConfig


def main(argv: Sequence[str]) -> int:
    """Train; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text(Config, USAGE))
        return 0
    config = read_config(Config, argv, partial(fitting, Config, without_text=QUICKSTART))
    trackers = make_trackers(config.log, config.run.dir)
    with opened(config) as (dist, run):
        start = starting_point(config.run, run, dist)
        tokenizer, sources = open_text(config, dist, open_corpus)
        dist.at("building the model")
        settled = settle(config, tokenizer, sources, dist)
        model = build_model(settled)
        penalties = {"label_smoothing": config.train.label_smoothing, "z_loss": config.train.z_loss}
        objective = NextToken(settled.shape.vocab_size, **penalties)
        trainer = make_trainer(settled, model, objective, run, trackers)
        if not begin(trainer, run, tokenizer, start, config.model.path):
            return 0
        summary = trainer.fit()
        if dist.is_main:
            report(settled.config, run, model, tokenizer, sources, summary)
    return 0


def report(
    config: Config, run: RunDirectory, model: nn.Module, tokenizer: Tokenizer, sources: list[Source], summary: dict
) -> None:
    """Samples, the loss curve, the figures, and what to do next."""
    if not summary["finished"]:
        show_stop(summary)
        return
    model, unseen = unwrapped(model), held_out(sources)
    beginning = min(16, model.config.max_seq_len // 2)
    prompts = prompts_of(unseen or sources, max(1, config.log.samples), beginning, tokenizer.eos_id)
    if not any(map(is_sharded, model.parameters())):  # of a model in parts all ranks would have to generate
        print(f"\nsamples: a beginning {'that was held out' if unseen else 'of the text'} ▸ what the model adds")
        show_samples(model, tokenizer, prompts[: config.log.samples], config.run.seed)
    names = [source.name for source in unseen]
    show_figures(run, summary, names, best=config.train.patience is not None)
    words = " ".join(tokenizer.decode(prompts[0][1]).split())
    print(
        f"\nnext:  minillm generate {run.path} --prompt {shlex.quote(words)} --temperature 0.8\n"
        f"       minillm data inspect {run.path} --step 1\n"
        "       python train.py --data.path my.txt --run.dir runs/mine\n"
        "       python train.py --help"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
