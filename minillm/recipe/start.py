"""How a run starts: its directory, its tokens, and the weights that it goes on from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from minillm import checkpoint
from minillm.config import flatten, to_dict
from minillm.data.config import DataConfig
from minillm.data.corpus import identity
from minillm.data.mixture import Source
from minillm.distributed.context import Context, beside_training, connect
from minillm.distributed.launch import check_same, check_shared, note_begun
from minillm.load import find_checkpoint, load_base
from minillm.log import LOGGER, kept_in
from minillm.recipe.config import RecipeConfig
from minillm.run import RunConfig, RunDirectory, open_run
from minillm.strategy import layouts, ranks_here
from minillm.tensors import unwrapped
from minillm.tokenizer import Tokenizer, TokenizerConfig
from minillm.trainer import Trainer

OpenCorpus = Callable[[DataConfig, TokenizerConfig], tuple[Tokenizer, list[Source]]]


@contextmanager
def opened(config: RecipeConfig) -> Iterator[tuple[Context, RunDirectory]]:
    """This rank among the others, and the run's directory, which rank 0 holds for all of them while the block runs.

    Raises ValueError as `open_run` does, where a rank has read another configuration, and where another machine does
    not see the directory.
    """
    with ExitStack() as stack:
        dist = stack.enter_context(connect(config.run.device, config.parallel.timeout))
        check_same(dist, flatten(to_dict(config)))
        with dist.main_first("opening the run"):
            run = stack.enter_context(open_run(config.run)) if dist.is_main else RunDirectory(config.run.dir)
        check_shared(dist, run.path, "run.dir")
        if dist.is_main:
            note_begun(run.path)
        stack.enter_context(kept_in(run.rank_log(dist.rank)) if config.log.ranks else nullcontext())
        yield dist, run


def open_text(config: RecipeConfig, dist: Context, open_corpus: OpenCorpus) -> tuple[Tokenizer, list[Source]]:
    """The tokenizer and the tokens of each source, which rank 0 prepares and the others find; the same on all."""
    with dist.main_first("preparing the text"):
        layouts(config.parallel, dist.world_size, ranks_here(dist.world_size))  # refused before hours of work
        tokenizer, sources = open_corpus(config.data, config.tokenizer)
    check_same(dist, {"tokenizer": tokenizer.hash, **identity(sources)})
    return tokenizer, sources


def starting_point(config: RunConfig, run: RunDirectory, dist: Context = checkpoint.ALONE) -> Path | None:
    """The checkpoint to continue from, the same on all ranks and proved by them; None to start afresh.

    Raises ValueError where there are some, but none whole.
    """
    if config.resume == "never":
        return None
    path = run.path if config.resume == "auto" else Path(config.resume)
    series = path / "checkpoints"
    found = checkpoint.candidates(series, dist)
    if not found and config.resume == "auto":
        return None
    dist.at("proving the checkpoint", checkpoint.PATIENCE)
    patient = beside_training(dist, checkpoint.PATIENCE)
    if not found:
        path = find_checkpoint(path)
        checkpoint.verify(path, dist=patient)
        return path
    newest = checkpoint.latest(series, dist=patient)
    if newest is None:
        raise ValueError(
            f"{series}: none of its checkpoints is whole ({', '.join(one.name for one in found)}); "
            "bring back a copy, or move the directory away to start afresh"
        )
    return newest


def begin(
    trainer: Trainer,
    run: RunDirectory,
    tokenizer: Tokenizer,
    checkpoint_path: Path | None,
    model_path: str | None,
    at_first: Callable[[Trainer], None] | None = None,
) -> bool:
    """Give the trainer what it goes on from, and write down what the run is; False where the run is over already.

    `at_first` is called when the model has the weights that the run began with, also where it goes on.
    """
    dist = trainer.dist
    if model_path and (trainer.base_path or at_first or not checkpoint_path):
        start_from(model_path, trainer, run, at_first, evaluated=not checkpoint_path)
    if checkpoint_path:
        trainer.resume(checkpoint_path, hashed=True)
        LOGGER.info("resumed from %s", checkpoint_path)
    over = trainer.over() and not trainer.progress.unevaluated
    if dist.broadcast(over and run.finished_at(trainer.progress.step)):
        LOGGER.info("%s: the run is finished at step %d; no step is left to make", run.path, trainer.progress.step)
        return False
    if dist.is_main:
        tokenizer.save(run.path)
        run.write_json(run.config, trainer.config_dict)
    return True


def start_from(
    path: str, trainer: Trainer, run: RunDirectory, at_first: Callable[[Trainer], None] | None, evaluated: bool
) -> None:
    """Give the model the weights of an earlier one, and, if asked for, say how well it does on this text with them."""
    trainer.dist.at("reading the weights", checkpoint.PATIENCE)
    folder, said = load_base(path, unwrapped(trainer.model), trainer.seed, trainer.saver.dist), ""
    if at_first:
        at_first(trainer)
    if trainer.evaluate and evaluated:
        with trainer.autocast():
            figures = trainer.evaluate(trainer.raise_if_stopped)
        said = f": val loss {figures['val_loss']:.4f} before the first step"
        if trainer.dist.is_main:
            run.write_json(run.before, figures)
    LOGGER.info("weights from %s%s", folder, said)
