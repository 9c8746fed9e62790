"""What a model answers to held-out questions before and after training, kept in the run's directory and summed up.

predictions/before.jsonl  predictions/after.jsonl       a row for each: its file, the question, both answers
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm import checkpoint
from minillm.data.chat import find_template, stop_ids
from minillm.data.mixture import held_out
from minillm.distributed.context import Context
from minillm.distributed.device import free_memory
from minillm.eval.answers import METRICS, Answered, answers_of, by_group, last_answers, majority
from minillm.files import write_atomically
from minillm.log import LOGGER
from minillm.memory import on_meta
from minillm.recipe.wiring import Settled
from minillm.report import answer_line
from minillm.run import RunDirectory
from minillm.strategy import ranks_here
from minillm.tensors import is_sharded, parameter_names, unwrapped
from minillm.trainer import Trainer


def answer_held_out(when: str, trainer: Trainer, settled: Settled, run: RunDirectory) -> None:
    """Let the model answer what was held out, and keep that as predictions/`when`.jsonl."""
    trainer.dist.at(f"answering {when} training", checkpoint.PATIENCE)
    with trainer.autocast():
        answered = answers(trainer.model, settled, settled.config.own.predict)
    if settled.config.own.predict and not answered:
        LOGGER.warning(
            "%s.predict: nothing is answered: nothing with a good answer is held out, or weights are cut over ranks "
            "without room for all",
            settled.config.SECTION,
        )
    if answered and settled.dist.is_main:
        write_answers(predictions(run, when), answered)


def unanswered(settled: Settled, run: RunDirectory) -> bool:
    """Whether a run that is over was stopped before it had answered; the same on all ranks."""
    wanted = settled.config.own.predict and held_out(settled.sources)
    return settled.dist.broadcast(bool(wanted) and not predictions(run, "after").exists())


def answer_some(model: nn.Module, settled: Settled) -> dict[str, float]:
    """What an evaluation adds on the way: the metrics of a few answers, of which the first goes into the log."""
    own = settled.config.own
    answered = answers(model, settled, min(own.predict, own.predict_some))
    for one in answered[:1]:
        LOGGER.info("  %s", answer_line(one))
    return {f"val_{metric}": METRICS[metric](answered) for metric in own.metrics if answered}


def answers(model: nn.Module, settled: Settled, count: int) -> list[Answered]:
    """What a model answers to so many questions, on each rank; a rank asks its share.

    None where nothing is held out, and where the weights are cut over ranks that have no room for all of them.
    """
    own, dist, tokenizer = settled.config.own, settled.dist, settled.tokenizer
    stores = [source.prepared.val for source in held_out(settled.sources)]
    if not count or not stores or not has_room(model, dist):
        return []
    asked = [one for store in stores for one in last_answers(store, -(-count // len(stores)), tokenizer)]
    ends = stop_ids(find_template(own.template, tokenizer), tokenizer)
    with torch.compiler.set_stance("force_eager"):  # what is compiled for training would be again for each length
        model = whole(model, settled)
        mine = answers_of(model, tokenizer, asked[dist.rank :: dist.world_size], ends, own.predict_tokens)
    shares = dist.gather([one._asdict() for one in mine])
    return [Answered(**shares[i % len(shares)][i // len(shares)]) for i in range(len(asked))]


def has_room(model: nn.Module, dist: Context) -> bool:
    """Whether each rank has memory for the whole model, where it holds a part of it; the same on all."""
    if not any(map(is_sharded, model.parameters())):
        return True
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), free_memory(dist.device)
    if free is not None and dist.device.type == "cpu":
        free //= ranks_here(dist.world_size)  # they share it
    return not dist.any(free is not None and 1.1 * needed > free)


@torch.no_grad()
def whole(model: nn.Module, settled: Settled) -> nn.Module:
    """The model itself, or, where its weights are cut over ranks, another that has all of them, gathered one by one."""
    parameters = parameter_names(model)
    if not any(map(is_sharded, parameters.values())):
        return unwrapped(model)
    gathered = on_meta(settled.shape, settled.adapt)
    for name, parameter in gathered.named_parameters():
        parameter.data = parameter.data.to(parameters[name].dtype)
    gathered = gathered.to_empty(device=settled.dist.device)
    for name, parameter in gathered.named_parameters():
        held = parameters[name]
        parameter.copy_(held.full_tensor() if is_sharded(held) else held)
    return gathered.eval()


def predictions(run: RunDirectory, when: str) -> Path:
    """Where answers are kept."""
    return run.path / "predictions" / f"{when}.jsonl"


def write_answers(path: Path, answered: Sequence[Answered]) -> None:
    """Keep answers, a line for each."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in answered))


def read_answers(run: RunDirectory, when: str) -> list[Answered]:
    """The answers of one side of training; none where none were kept."""
    path = predictions(run, when)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [Answered(**json.loads(line)) for line in lines]


def read_sides(run: RunDirectory) -> dict[str, list[Answered]]:
    """The answers of both sides of training, where some were kept; of those before only what can be compared with.

    A run that goes on may ask another number of questions, and so others: nothing is then left of that side.
    """
    sides = {when: answered for when in ("before", "after") if (answered := read_answers(run, when))}
    asked = [[one._replace(answer="") for one in answered] for answered in sides.values()]
    if len(asked) == 2 and asked[0] != asked[1]:
        del sides["before"]
    return sides


def sum_up(run: RunDirectory, metrics: Sequence[str], summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with each metric of what was answered, before and after; written too.

    A metric is {"before", "after", "files": {"before": {FILE: ...}, "after": ...}}. Beside exact_match is `majority`,
    that of always giving the most common answer.
    """
    sides = read_sides(run) if summary["finished"] else {}
    if "after" not in sides:
        return summary
    if "before" not in sides and predictions(run, "before").exists():
        LOGGER.warning("other questions were answered before training than after it, so the answers are not compared")
    for name in metrics:
        figures = {when: (METRICS[name], answered) for when, answered in sides.items()}
        if name == "exact_match":
            figures["majority"] = majority, sides["after"]
        whole = {when: metric(answered) for when, (metric, answered) in figures.items()}
        files = {when: by_group(answered, metric) for when, (metric, answered) in figures.items()}
        summary = summary | {name: whole | {"files": files}}
    run.write_json(run.summary, summary)
    return summary
