"""The trainer under ranks: the same run, however its work is divided; and one decision for all."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_ranks

from minillm.data.batch import Batch
from minillm.distributed.config import Layout
from minillm.distributed.context import connect, with_mesh
from minillm.distributed.parallelize import parallelize
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.run import RunDirectory
from minillm.tensors import local_part, parameter_names
from minillm.trainer import TrainConfig, Trainer
from minillm.trainer.spikes import FEWEST

ROWS, T, V = 8, 16, 56
STEPS = 20
ONE = Layout("ddp", 1, 1, 1)
MODEL = {"vocab_size": V, "dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": T}
NO_TARGETS_ON_RANK_1 = 5  # the step of which every second row has no target
NO_TARGETS = 7


class Dealt:
    """Eight rows a step, a function of the cursor, of which most targets are ignored; dealt to ranks like cards."""

    samples_per_step, samples_per_epoch, tokens_per_step = ROWS, 100 * ROWS, ROWS * T

    def __init__(self, dist, accumulation):
        self.dist, self.accumulation = dist, accumulation

    def batches(self, cursor):
        step = cursor // ROWS
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(V, (ROWS, T + 1), generator=generator)
        kept = torch.rand(ROWS, T, generator=generator) < torch.rand(ROWS, 1, generator=generator)
        kept[1::2] &= step != NO_TARGETS_ON_RANK_1
        kept &= step != NO_TARGETS
        targets = tokens[:, 1:].masked_fill(~kept, IGNORE_INDEX)
        mine = slice(self.dist.dp_rank, None, self.dist.dp_size)
        fields = zip(tokens[mine, :-1].chunk(self.accumulation), targets[mine].chunk(self.accumulation))
        return [Batch(*one) for one in fields]


def make(dist, chosen: Layout, accumulation: int, optim: dict[str, Any], **options) -> Trainer:
    dist = with_mesh(dist, chosen.dp_replicate, chosen.dp_shard, chosen.tp)
    with torch.device("meta"):
        model = Transformer(ModelConfig(**MODEL))
    model = parallelize(model, dist=dist, layout=chosen, init=partial(init_weights, seed=1))
    config = OptimConfig(**{"name": "adamw", "lr": 3e-3, "grad_clip": 0.5} | optim)
    return Trainer(
        model,
        build_optimizer(model, config),
        options.pop("objective", NextToken(V)),
        Dealt(dist, accumulation),
        TrainConfig(precision="fp32", spike=options.pop("spike", "report")),
        steps=STEPS,
        lr_at=lambda step: config.lr,
        dist=dist,
        grad_clip=config.grad_clip,
        **options,
    )


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def twenty_steps(chosen, accumulations, optim):
    """Losses, gradient norms and final weights for each number of micro-batches."""
    found = []
    with connect("cpu", timeout=60) as dist:
        for accumulation in accumulations:
            trainer = make(dist, chosen, accumulation, optim)
            steps = [trainer.step() for _ in range(STEPS)]
            weights = {name: whole(parameter) for name, parameter in trainer.parameters.items()}
            found.append(([one["loss"] for one in steps], [one["grad_norm"] for one in steps], weights))
    return found


@pytest.fixture(scope="module")
def alone():
    return {name: run_ranks(1, twenty_steps, ONE, [1], {"name": name})[0][0] for name in ("adamw", "muon")}


LAYOUTS = [
    (ONE, [2, 4]),
    (Layout("ddp", 2, 1, 1), [1, 2, 4]),
    (Layout("ddp", 4, 1, 1), [2]),
    (Layout("fsdp", 1, 2, 1), [1, 4]),
    (Layout("fsdp", 1, 4, 1), [1]),
    (Layout("hsdp", 2, 2, 1), [2]),
    (Layout("fsdp", 1, 1, 2), [1]),
    (Layout("fsdp", 1, 2, 2), [2]),
    (Layout("ddp", 2, 1, 2), [2]),
]


CASES = [(*case, "adamw") for case in LAYOUTS] + [
    (Layout("ddp", 2, 1, 1), [2], "muon"),
    (Layout("fsdp", 1, 4, 1), [2], "muon"),
    (Layout("fsdp", 1, 2, 2), [1], "muon"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-{}x{}x{}-{}".format(*vars(case[0]).values(), case[2]))
def test_the_run_is_the_same_however_it_is_divided(alone, case):
    """Also where ranks have unequal numbers of targets, one of them none in a step, and all of them none in another."""
    chosen, accumulations, name = case
    losses, norms, weights = alone[name]
    assert losses[NO_TARGETS] is None
    ranks = chosen.dp_replicate * chosen.dp_shard * chosen.tp
    for found in run_ranks(ranks, twenty_steps, chosen, accumulations, {"name": name}):
        for its_losses, its_norms, its_weights in found:
            assert [x or 0 for x in its_losses] == pytest.approx([x or 0 for x in losses], rel=1e-5)
            assert [x or 0 for x in its_norms] == pytest.approx([x or 0 for x in norms], rel=1e-5)
            for parameter, weight in weights.items():
                distance = (its_weights[parameter] - weight).norm() / weight.norm()
                assert distance < 1e-5, (parameter, distance)


def gradient_times(factor):
    """Makes a loss whose value stays, and whose gradient is so many times as large."""

    def spoil(loss):
        loss.register_hook(lambda gradient: gradient * factor)
        return loss

    return spoil


class Spoiled(NextToken):
    """Its loss is spoiled on rank 1 in some steps, of a micro-batch each; `spoils` says how, by the step."""

    def __init__(self, dist, spoils, first=0):
        super().__init__(V)
        self.spoils, self.step = spoils if dist.rank == 1 else {}, first

    def count(self, batch):
        self.step += 1
        return super().count(batch)

    def __call__(self, model, batch):
        loss, metrics = super().__call__(model, batch)
        return self.spoils.get(self.step, lambda loss: loss)(loss), metrics


def untouched(trainer, last):
    """The steps up to the last that change neither weights nor moments."""
    found = []
    while trainer.progress.step < last:
        before = local_tensors(trainer)
        trainer.step()
        after = local_tensors(trainer)
        if all(torch.equal(before[name], after[name]) for name in before):
            found.append(trainer.progress.step)
        assert all(tensor.isfinite().all() for tensor in after.values())
    return found


def local_tensors(trainer):
    return {name: local_part(tensor)[0].clone() for name, tensor in trainer.tensors().items()}


def skip_one(chosen):
    with connect("cpu", timeout=60) as dist:
        trainer = make(dist, chosen, 1, {}, objective=Spoiled(dist, {4: gradient_times(math.nan)}))
        return untouched(trainer, 5), trainer.progress.skipped_steps


TWO_RANKS = pytest.mark.parametrize(
    "chosen", [Layout("ddp", 2, 1, 1), Layout("fsdp", 1, 2, 1)], ids=lambda chosen: chosen.strategy
)


@TWO_RANKS
def test_a_gradient_that_is_not_finite_on_one_rank_is_a_step_skipped_by_all(chosen):
    assert run_ranks(2, skip_one, chosen) == [([4], 1)] * 2


def skip_spikes(chosen, path):
    """Steps skipped and spikes counted, by a run that goes through and by one resumed before the spikes."""
    stop, last = FEWEST + 5, FEWEST + 12
    spoils = {stop + 2: lambda loss: 100 * loss, stop + 5: gradient_times(100)}
    with connect("cpu", timeout=60) as dist:
        whole, resumed = (
            make(dist, chosen, 1, {}, objective=Spoiled(dist, spoils, first), spike="skip", run=RunDirectory(path))
            for first in (0, stop)
        )
        while whole.progress.step < stop:
            whole.step()
        resumed.resume(whole.save())
        found = [[step - stop for step in untouched(trainer, last)] for trainer in (whole, resumed)]
        ours, theirs = local_tensors(whole), local_tensors(resumed)
        return found, whole.progress.spikes, [name for name in ours if not torch.equal(ours[name], theirs[name])]


@TWO_RANKS
def test_a_spike_on_one_rank_is_a_step_skipped_by_all_also_after_a_resume(tmp_path, chosen):
    """The resumed run has seen too few steps to know a spike, but for those that the checkpoint tells it of."""
    assert run_ranks(2, skip_spikes, chosen, tmp_path) == [([[2, 5], [2, 5]], 2, [])] * 2


def parameters_by_name():
    with connect("cpu", timeout=60) as dist:
        return [
            sorted(parameter_names(make(dist, chosen, 1, {}).model))
            for chosen in (Layout("ddp", 2, 1, 1), Layout("fsdp", 1, 2, 1))
        ]


def test_names_are_those_of_the_model_whatever_is_around_it():
    with torch.device("meta"):
        names = sorted(dict(Transformer(ModelConfig(**MODEL)).named_parameters()))
    assert run_ranks(2, parameters_by_name) == [[names, names]] * 2
