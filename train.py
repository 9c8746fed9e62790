"""Pretrain a language model: text in, a run directory with checkpoints and samples out.

python train.py                                        the embedded corpus: minutes on two CPU cores
python train.py --data.path my.txt                     your text; a configuration that fits its size is chosen
python train.py configs/shakespeare-char.toml --data.path tinyshakespeare.txt
python train.py --run.dir runs/mine --run.resume auto  continue where it stopped
torchrun --nproc_per_node 8 train.py ...               the same on eight GPUs, or as many processes
python train.py configs/continue.toml --model.path runs/mine --data.path new.txt   new text, from those weights
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minillm import checkpoint
from minillm.config import build, flatten, help_text, lookup, to_dict
from minillm.data.batch import Batch
from minillm.data.config import DataConfig
from minillm.data.corpus import identity, open_corpus
from minillm.data.loader import Loader, eval_batches
from minillm.data.mixture import Source, held_out, say_use
from minillm.data.prompts import prompts_of
from minillm.distributed.config import ParallelConfig
from minillm.distributed.context import Context, connect, ranks_started, with_mesh
from minillm.distributed.device import best_precision, free_memory, peak_flops
from minillm.distributed.launch import check_same
from minillm.distributed.parallelize import parallelize
from minillm.distributed.tensor_parallel import tensor_parallel_problems
from minillm.eval.perplexity import evaluate, mixture, token_byte_lengths
from minillm.load import load_weights
from minillm.log import LOGGER, LogConfig, Tracker, kept_in, make_trackers, memory_explained, run_command
from minillm.memory import Setting, memory_advice
from minillm.model.config import ModelSection
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer, lr_at, unmatched_patterns, warmup_steps
from minillm.plan import count_parameters, flops_per_token, micro_batch_size
from minillm.recipe import earlier, earlier_run, fitting, read_layers, run_of_all, source_layer, starting_point
from minillm.report import show_figures, show_samples
from minillm.run import RunConfig, RunDirectory
from minillm.strategy import layouts, ranks_here, resolve
from minillm.tensors import is_sharded, unwrapped
from minillm.tokenizer import Tokenizer, TokenizerConfig
from minillm.trainer import DTYPES, TrainConfig, Trainer, completed, total_steps

USAGE = f"usage: python train.py [CONFIG.toml] [--section.field VALUE ...]\n\n{__doc__}"
QUICKSTART = Path(__file__).parent / "configs" / "quickstart.toml"
ROWS_OF_METRICS = 200


@dataclass(frozen=True)
class Config:
    """A pretraining run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelSection = field(default_factory=ModelSection)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        seq_len, batch_tokens = self.data.seq_len, self.train.batch_tokens
        problems = []
        if seq_len and seq_len > self.model.max_seq_len:
            problems.append(f"data.seq_len: {seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        if seq_len and batch_tokens and batch_tokens % seq_len:
            nearest = max(1, round(batch_tokens / seq_len)) * seq_len
            problems.append(
                f"train.batch_tokens: {batch_tokens} is no multiple of data.seq_len {seq_len}; {nearest} is the nearest"
            )
        if not self.model.causal:
            problems.append("model.causal: false lets a token see the one that it is trained to predict; leave it true")
        if self.parallel.tp > 1:
            rows = self.model.vocab_size or self.model.vocab_multiple  # there is no tokenizer yet
            problems += tensor_parallel_problems(self.model.to_config(vocab_size=rows), self.parallel.tp, seq_len)
        if self.optim.lr_scales:  # looked at here, and not when hours of tokenising are over
            with torch.device("meta"):
                problems += unmatched_patterns(Transformer(self.model.to_config(vocab_size=1)), self.optim)
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: Sequence[str]) -> int:
    """Train; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text(Config, USAGE))
        return 0
    given = read_layers(Config, argv)
    home = earlier_run(given)
    given = [*source_layer(given, resumed=home), *given]
    below = earlier(Config, home, given, ranks_started()) if home else fitting(Config, given, QUICKSTART)
    config = build(Config, [*below, *given])  # every mistake is reported before anything is touched
    trackers = make_trackers(config.log, config.run.dir)
    if not home:
        said = (f"{name} {value}" for name, value in below[-1].values.items() if lookup(given, name) is None)
        LOGGER.info("chosen for the corpus: %s", ", ".join(said) or "nothing, all is given")
    with (
        connect(config.run.device, config.parallel.timeout) as dist,
        run_of_all(config.run, dist, flatten(to_dict(config))) as run,
        kept_in(run.rank_log(dist.rank)) if config.log.ranks else nullcontext(),
    ):
        start = starting_point(config.run, run, dist)
        with dist.main_first("preparing the text"):
            layouts(config.parallel, dist.world_size, ranks_here(dist.world_size))  # refused before hours of work
            tokenizer, sources = open_corpus(config.data, config.tokenizer)
        check_same(dist, {"tokenizer": tokenizer.hash, **identity(sources)})
        dist.at("building the model")
        trainer, config = make_trainer(config, tokenizer, sources, run, dist, trackers)
        if start:
            trainer.resume(start, hashed=True)
            LOGGER.info("resumed from %s", start)
        elif config.model.path:
            start_from(config.model.path, trainer)
        over = trainer.over() and not trainer.progress.unevaluated
        if dist.broadcast(over and run.finished_at(trainer.progress.step)):
            LOGGER.info("%s: the run is finished at step %d; there is nothing to do", run.path, trainer.progress.step)
            return 0
        if dist.is_main:
            tokenizer.save(run.path)
            run.write_json(run.config, to_dict(config))
        summary = trainer.fit()
        if dist.is_main:
            report(config, run, trainer.model, tokenizer, sources, summary)
    return 0


# --- the parts of a run -----------------------------------------------------------------------------------------------


def make_trainer(
    config: Config,
    tokenizer: Tokenizer,
    sources: list[Source],
    run: RunDirectory,
    dist: Context,
    trackers: Sequence[Tracker] = (),
) -> tuple[Trainer, Config]:
    """Wire data, model, optimizer and evaluation; returns the trainer and the config with nothing left open."""
    data, train, device = config.data, config.train, dist.device
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is not the tokenizer's {tokenizer.vocab_size}; leave it out, "
            "and pad with model.vocab_multiple"
        )
    if train.patience is not None and not held_out(sources):
        raise ValueError("train.patience: nothing is held out to evaluate on; give data.val, or leave patience out")
    model_config = config.model.to_config(vocab_size=tokenizer.vocab_size)
    samples_per_step = train.batch_tokens // data.seq_len
    if train.precision == "auto":
        train = dataclasses.replace(train, precision=dist.broadcast(best_precision(device)))  # measured, so not by each
    dp_size = max(1, dist.world_size // config.parallel.tp)
    rows = train.micro_batch_size or micro_batch_size(data.seq_len, -(-samples_per_step // dp_size), device)
    setting = Setting(
        rows=rows,
        seq_len=data.seq_len,
        precision=train.precision,
        activation_checkpointing=train.activation_checkpointing,
        accumulates=samples_per_step > rows * dp_size,
        device_type=device.type,
    )
    parallel, shape = resolve(config.parallel, model_config, config.optim, setting, dist)
    dist = with_mesh(dist, shape.dp_replicate, shape.dp_shard, shape.tp)
    loader = Loader(
        sources,
        seq_len=data.seq_len,
        packing=data.packing,
        micro_batch_size=rows,
        samples_per_step=samples_per_step,
        seed=config.run.seed,
        dp_rank=dist.dp_rank,
        dp_size=dist.dp_size,
        device=device,
    )
    steps = total_steps(train, loader)
    train = completed(dataclasses.replace(train, max_steps=steps, micro_batch_size=rows), steps, device)
    optim = dataclasses.replace(config.optim, warmup_steps=warmup_steps(config.optim, steps), warmup_ratio=None)
    log = dataclasses.replace(config.log, every=config.log.every or max(1, steps // ROWS_OF_METRICS))
    section = ModelSection(**dataclasses.asdict(model_config), preset=config.model.preset, path=config.model.path)
    if data.mixed:
        data = dataclasses.replace(data, sources=data.names())
        say_use(sources, loader.rows, steps * samples_per_step)
    else:
        data = dataclasses.replace(data, val=sources[0].prepared.info["settings"]["val"])
    sections = {"model": section, "data": data, "train": train, "optim": optim, "log": log, "parallel": parallel}
    config = dataclasses.replace(config, **sections)

    setting = dataclasses.replace(
        setting,
        rows=loader.micro_batch_size,
        accumulates=loader.forwards > 1,
        reshard_after_forward=parallel.reshard_after_forward,
    )
    advice = partial(memory_advice, model_config, optim, setting, free_memory(device), shape)
    with memory_explained(advice):
        with torch.device("meta"):
            model = Transformer(model_config)
        model = parallelize(
            model,
            train.activation_checkpointing,
            train.compile,
            dist=dist,
            layout=shape,
            dtype=DTYPES[train.precision],
            reshard_after_forward=parallel.reshard_after_forward,
            compress=parallel.compress,
            init=partial(init_weights, seed=config.run.seed),
        )
        optimizer = build_optimizer(model, optim)
    LOGGER.info(
        "%s parameters (%s in matrix products), vocabulary %s, %s tokens to train on, %d steps of %s tokens, %s on %s",
        *(f"{n:,}" for n in (count_parameters(model_config).total, count_parameters(model_config).matmul)),
        *(f"{n:,}" for n in (tokenizer.vocab_size, sum(source.prepared.train.n_tokens for source in sources))),
        steps,
        f"{train.batch_tokens:,}",
        train.precision,
        device,
    )
    objective = NextToken(model_config.vocab_size, label_smoothing=train.label_smoothing, z_loss=train.z_loss)
    trainer = Trainer(
        model,
        optimizer,
        objective,
        loader,
        train,
        steps=steps,
        lr_at=partial(lr_at, config=optim, max_steps=steps),
        dist=dist,
        grad_clip=optim.grad_clip,
        seed=config.run.seed,
        evaluate=make_evaluation(model, NextToken(model_config.vocab_size), tokenizer, held_out(sources), config, dist),
        run=run,
        log_every=log.every,
        flops_per_token=flops_per_token(model_config, data.seq_len),
        peak_flops=dist.world_size * peak_flops(device, DTYPES[train.precision]),
        identity={
            "tokenizer_hash": tokenizer.hash,
            **identity(sources),
            "data.seq_len": data.seq_len,
            "data.packing": data.packing,
            "run.seed": config.run.seed,
            "optim.name": optim.name,
            **{f"model.{name}": value for name, value in dataclasses.asdict(model_config).items()},
        },
        config_dict=to_dict(config),
        trackers=trackers,
        norms_every=log.norms_every,
        documents=loader.texts,
        memory_advice=advice,
    )
    return trainer, config


def start_from(path: str, trainer: Trainer) -> None:
    """Give the model the weights of an earlier one, and say how well it does on this text before the first step."""
    trainer.dist.at("reading the weights", checkpoint.PATIENCE)
    folder, said = load_weights(path, trainer.model, trainer.saver.dist), ""
    if trainer.evaluate:
        with trainer.autocast():
            said = f": val loss {trainer.evaluate(trainer.raise_if_stopped)['val_loss']:.4f} before the first step"
    LOGGER.info("weights from %s%s", folder, said)


def make_evaluation(
    model: Transformer,
    objective: NextToken,
    tokenizer: Tokenizer,
    sources: list[Source],
    config: Config,
    dist: Context,
) -> Callable[[Callable[[], None]], dict[str, float]] | None:
    """Loss and bits per byte over the whole validation split of each source; None where there is none."""
    if not sources:
        return None
    token_bytes = token_byte_lengths(tokenizer)
    data, place = config.data, {"device": dist.device, "dp_rank": dist.dp_rank, "dp_size": dist.dp_size}
    rows = max(1, 2 * config.train.micro_batch_size)  # no gradients are kept, so more fits

    def run_evaluation(raise_if_stopped: Callable[[], None]) -> dict[str, float]:
        def batches(source: Source) -> Iterator[Batch]:
            for batch in eval_batches(source.prepared.val, data.seq_len, data.packing, rows, **place):
                raise_if_stopped()
                yield batch

        figures = [
            evaluate(model, batches(source), objective, token_bytes, dist.sum, dist.device) for source in sources
        ]
        if not sources[0].name:
            return figures[0]
        return mixture([(source.name, source.share, found) for source, found in zip(sources, figures)])

    return run_evaluation


# --- what the user sees at the end ------------------------------------------------------------------------------------


def report(
    config: Config, run: RunDirectory, model: nn.Module, tokenizer: Tokenizer, sources: list[Source], summary: dict
) -> None:
    """Samples, the loss curve, the figures, and what to do next."""
    if not summary["finished"]:
        print(f"\nstopped by {summary['stopped_by']} at step {summary['step']}; continue with --run.resume auto")
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
