"""From a configuration and tokens to a trainer: what is decided, built and wired alike in every recipe."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from minillm.config import to_dict
from minillm.data.batch import Batch
from minillm.data.corpus import identity
from minillm.data.loader import Loader, eval_batches
from minillm.data.mixture import Source, held_out, say_use
from minillm.distributed.config import Layout
from minillm.distributed.context import Context, with_mesh
from minillm.distributed.device import best_precision, free_memory, peak_flops
from minillm.distributed.parallelize import parallelize
from minillm.eval.perplexity import evaluate, mixture, token_byte_lengths
from minillm.log import LOGGER, Tracker, memory_explained
from minillm.memory import Setting, memory_advice
from minillm.model.config import ModelConfig, ModelSection
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken, Objective
from minillm.optim import build_optimizer, lr_at, warmup_steps
from minillm.plan import count_parameters, flops_per_token, micro_batch_size, tuning_rows
from minillm.recipe.config import RecipeConfig
from minillm.run import RunDirectory
from minillm.strategy import resolve
from minillm.tokenizer import Tokenizer
from minillm.trainer import DTYPES, Trainer, completed, total_steps

ROWS_OF_METRICS = 200


class Settled(NamedTuple):
    """A run of which nothing is left open."""

    config: RecipeConfig
    shape: ModelConfig
    tokenizer: Tokenizer
    sources: list[Source]
    dist: Context  # with its mesh
    layout: Layout
    loader: Loader
    steps: int
    flops_per_token: int
    advice: Callable[[], str]  # what to say where memory is wanting
    adapt: Callable[[Transformer], object] | None = None  # freezes weights of a model and adds adapters


def settle(
    config: RecipeConfig,
    tokenizer: Tokenizer,
    sources: list[Source],
    dist: Context,
    adapt: Callable[[Transformer], object] | None = None,
) -> Settled:
    """Decide what the configuration leaves open, now that tokenizer, tokens, device and ranks are known.

    `adapt` freezes weights of a model and adds adapters, as it will be trained.
    """
    data, train, device = config.data, config.train, dist.device
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is not the tokenizer's {tokenizer.vocab_size}; leave it out, "
            "and pad with model.vocab_multiple"
        )
    if train.patience is not None and not held_out(sources):
        raise ValueError("train.patience: nothing is held out to evaluate on; give data.val, or leave patience out")
    shape = config.model.to_config(vocab_size=tokenizer.vocab_size)
    if train.batch_tokens is None:
        n_tokens = sum(source.prepared.train.n_tokens for source in sources)
        train = dataclasses.replace(train, batch_tokens=data.seq_len * tuning_rows(n_tokens, data.seq_len))
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
        adapt=adapt,
    )
    parallel, layout = resolve(config.parallel, shape, config.optim, setting, dist)
    dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
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
    section = ModelSection(**dataclasses.asdict(shape), preset=config.model.preset, path=config.model.path)
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
    advice = partial(memory_advice, shape, optim, setting, free_memory(device), layout)
    flops = flops_per_token(shape, data.seq_len, adapt)
    return Settled(config, shape, tokenizer, sources, dist, layout, loader, steps, flops, advice, adapt)


def build_model(settled: Settled, adapt: Callable[[Transformer], object] | None = None) -> nn.Module:
    """The model with its first weights, as it is called in training, on this rank.

    `adapt` changes it while it is on the meta device, before it is parallelized.
    """
    config, dist = settled.config, settled.dist
    with memory_explained(settled.advice):
        with torch.device("meta"):
            model = Transformer(settled.shape)
        if adapt:
            adapt(model)
        return parallelize(
            model,
            config.train.activation_checkpointing,
            config.train.compile,
            dist=dist,
            layout=settled.layout,
            dtype=DTYPES[config.train.precision],
            reshard_after_forward=config.parallel.reshard_after_forward,
            compress=config.parallel.compress,
            init=partial(init_weights, seed=config.run.seed) if config.model.path is None else to_be_loaded,
        )


def to_be_loaded(model: nn.Module) -> None:
    """Leave the weights of a model as they are, which are read when everything else is known to fit."""


def make_trainer(
    settled: Settled,
    model: nn.Module,
    objective: Objective,
    run: RunDirectory,
    trackers: Sequence[Tracker] = (),
    *,
    base_path: str | None = None,
    must_agree: Mapping[str, Any] = MappingProxyType({}),
    more_figures: Callable[[], dict[str, float]] = dict,
    measure: Objective | None = None,
) -> Trainer:
    """The trainer of a model on an objective, and its evaluation by `measure`, or else by the loss of the next token.

    `base_path`: as in Trainer. `must_agree`: what a run that is continued must agree on beside what is usual.
    `more_figures`: what an evaluation tells beside the loss.
    """
    config, dist = settled.config, settled.dist
    shape, tokenizer, sources = settled.shape, settled.tokenizer, settled.sources
    # nothing but text has bytes to divide by
    measured = (NextToken(shape.vocab_size), tokenizer) if measure is None else (measure, None)
    optim, train, log = config.optim, config.train, config.log
    with memory_explained(settled.advice):
        optimizer = build_optimizer(model, optim)
    LOGGER.info(
        "%s parameters (%s in matrix products), vocabulary %s, %s tokens to train on, %d steps of %s tokens, %s on %s",
        *(f"{n:,}" for n in (count_parameters(shape).total, count_parameters(shape).matmul)),
        *(f"{n:,}" for n in (tokenizer.vocab_size, sum(source.prepared.train.n_tokens for source in sources))),
        settled.steps,
        f"{train.batch_tokens:,}",
        train.precision,
        dist.device,
    )
    return Trainer(
        model,
        optimizer,
        objective,
        settled.loader,
        train,
        steps=settled.steps,
        lr_at=partial(lr_at, config=optim, max_steps=settled.steps),
        dist=dist,
        grad_clip=optim.grad_clip,
        seed=config.run.seed,
        evaluate=make_evaluation(model, *measured, held_out(sources), config, dist, more_figures),
        run=run,
        log_every=log.every,
        flops_per_token=settled.flops_per_token,
        peak_flops=dist.world_size * peak_flops(dist.device, DTYPES[train.precision]),
        identity={
            "tokenizer_hash": tokenizer.hash,
            **identity(sources),
            "data.seq_len": config.data.seq_len,
            "data.packing": config.data.packing,
            "run.seed": config.run.seed,
            "optim.name": optim.name,
            **{f"model.{name}": value for name, value in dataclasses.asdict(shape).items()},
            **must_agree,
        },
        config_dict=to_dict(config),
        trackers=trackers,
        norms_every=log.norms_every,
        documents=settled.loader.texts,
        memory_advice=settled.advice,
        base_path=base_path,
    )


def make_evaluation(
    model: Transformer,
    objective: Objective,
    tokenizer: Tokenizer | None,
    sources: list[Source],
    config: RecipeConfig,
    dist: Context,
    more_figures: Callable[[], dict[str, float]] = dict,
) -> Callable[[Callable[[], None]], dict[str, float]] | None:
    """The objective's figures, and with a tokenizer bits per byte, over the whole validation split of each source, and
    more; None where there is none.
    """
    if not sources:
        return None
    token_bytes = token_byte_lengths(tokenizer) if tokenizer else None
    data, place = config.data, {"device": dist.device, "dp_rank": dist.dp_rank, "dp_size": dist.dp_size}
    rows = max(1, 2 * config.train.micro_batch_size)  # no gradients are kept, so more fits

    def run_evaluation(raise_if_stopped: Callable[[], None]) -> dict[str, float]:
        def batches(source: Source) -> Iterator[Batch]:
            for batch in eval_batches(source.prepared.val, data.seq_len, data.packing, rows, **place):
                raise_if_stopped()
                yield batch

        figures = []
        for source in sources:
            known = objective.prepare(model, batches(source), dist.sum) if hasattr(objective, "prepare") else objective
            figures.append(evaluate(model, batches(source), known, token_bytes, dist.sum, dist.device))
        raise_if_stopped()  # what comes is longer than a batch
        if not sources[0].name:
            return figures[0] | more_figures()
        whole = mixture([(source.name, source.share, found) for source, found in zip(sources, figures)])
        return whole | more_figures()

    return run_evaluation
