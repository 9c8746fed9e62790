"""A spike is noticed, reported with what led to it, and can be left out; ordinary noise is none."""

import random
import statistics

import pytest
import torch
from torch import nn

from minillm import checkpoint
from minillm.distributed.context import Context
from minillm.log import read_metrics
from minillm.run import RunDirectory
from minillm.trainer import TrainConfig, Trainer
from minillm.trainer.spikes import FEWEST, MOST, WINDOW, SpikeWatch

DEFAULT = TrainConfig().spike_threshold
NORMS = torch.ones(3)


def watch(mode="report", threshold=DEFAULT):
    return SpikeWatch(mode, threshold, ["a", "b", "c"])


def judged(seen, loss, grad_norm=1.0, norms=NORMS):
    """{figure: sigmas} of what is a spike."""
    return {one.name: one.sigmas for one in seen.judge({"loss": loss, "grad_norm": grad_norm}, norms)}


def noise(seed):
    """(loss, gradient norm) of a run: a falling loss with noise, norms with the long tail of a log-normal."""
    generator = random.Random(seed)
    for step in range(3000):
        yield 2 + 5 / (1 + step / 50) + generator.gauss(0, 0.1), generator.lognormvariate(0, 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_of_a_whole_run_holds_no_spike(seed):
    seen = watch()
    assert not [found for found in (judged(seen, *figures) for figures in noise(seed)) if found]


def test_the_measure_is_the_median_and_two_robust_distances():
    """Sigmas worked out by hand from their definition."""
    seen = watch()
    generator = random.Random(1)
    losses = [generator.gauss(3, 0.2) for _ in range(WINDOW)]
    for loss in losses:
        judged(seen, loss)
    usual = statistics.median(losses)
    near = statistics.median(abs(loss - usual) for loss in losses) / statistics.NormalDist().inv_cdf(0.75)
    high = (sorted(losses)[121] - usual) / statistics.NormalDist().inv_cdf(0.95)
    assert judged(seen, 9.0) == {"loss": pytest.approx((9.0 - usual) / max(near, high), rel=1e-3)}


def test_a_spike_does_not_hide_the_next():
    """Where a mean and a standard deviation would: after one jump to 50, another to 8 is within 6 deviations."""
    seen, plain = watch(), []
    generator = random.Random(2)
    for _ in range(WINDOW - 1):
        plain.append(generator.gauss(3, 0.1))
        judged(seen, plain[-1])
    assert judged(seen, 50.0)
    assert judged(seen, 8.0)
    assert statistics.mean([*plain, 50.0]) + 6 * statistics.stdev([*plain, 50.0]) > 8.0
    assert not judged(seen, 3.1)


def test_a_gradient_norm_alone_is_a_spike():
    seen = watch()
    for _, norm in zip(range(100), (figures[1] for figures in noise(0))):
        judged(seen, 3.0, norm)
    assert set(judged(seen, 3.0, 40.0)) == {"grad_norm"}


def test_nothing_is_judged_before_there_is_a_usual():
    seen = watch()
    assert not any(judged(seen, loss) for loss in [3.0] * (FEWEST - 1) + [99.0])
    assert judged(seen, 99.0)


def test_a_new_level_is_not_skipped_for_ever(caplog):
    seen, generator = watch("skip"), random.Random(3)
    for _ in range(WINDOW):
        assert not judged(seen, generator.gauss(3, 0.1))
    found = [bool(judged(seen, generator.gauss(6, 0.1))) for _ in range(2 * WINDOW)]
    assert found == [True] * MOST + [False] * (2 * WINDOW - MOST)
    assert f"{MOST} spikes within" in caplog.text
    assert judged(seen, 20.0)


def test_batches_of_a_harder_kind_are_no_spikes():
    """One in ten is of another language: once they are known, hardly any is taken for a spike."""
    seen, generator = watch("skip"), random.Random(4)
    losses = [generator.gauss(4 if generator.random() < 0.1 else 2, 0.05) for _ in range(3000)]
    assert sum(bool(judged(seen, loss)) for loss in losses) < sum(loss > 3 for loss in losses) / 8


# --- in training ------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of (x, y), some of whose steps hold garbage."""

    samples_per_step, samples_per_epoch, tokens_per_step = 16, 1600, 16

    def __init__(self, garbage=()):
        self.garbage = garbage

    def batches(self, cursor):
        generator = torch.Generator().manual_seed(cursor)
        x = torch.randn(16, 4, generator=generator)
        y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=generator)
        return [(x, y * 100 if cursor // 16 + 1 in self.garbage else y)]


class SquaredError:
    def count(self, batch):
        return len(batch[0])

    def __call__(self, model, batch):
        return (model(batch[0]) - batch[1]).square().sum(), {}


def make_trainer(directory=None, garbage=(), steps=80, spike="skip", lr_at=lambda step: 1e-2, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    if directory:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    return Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        SquaredError(),
        Rows(garbage),
        TrainConfig(precision="fp32", spike=spike, max_steps=steps),
        steps=steps,
        lr_at=lr_at,
        dist=Context(torch.device("cpu")),
        run=RunDirectory(directory) if directory else None,
        **options,
    )


def tensors(trainer):
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def assert_bitwise_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def steps_of(trainer, n):
    for _ in range(n):
        trainer.step()


def test_a_skipped_spike_touches_neither_weights_nor_moments():
    trainer = make_trainer(garbage=[60])
    steps_of(trainer, 59)
    before = tensors(trainer)
    trainer.step()
    assert_bitwise_equal(before, tensors(trainer))
    assert (trainer.progress.spikes, trainer.progress.skipped_steps, trainer.progress.step) == (1, 1, 60)
    trainer.step()
    assert not torch.equal(before["weight"], tensors(trainer)["weight"])


@pytest.mark.parametrize(("spike", "spikes"), [("report", 1), ("off", 0)])
def test_a_spike_that_is_only_reported_changes_no_number(spike, spikes):
    trainer, plain = make_trainer(garbage=[60], spike=spike), make_trainer(garbage=[60], spike="off")
    steps_of(trainer, 70), steps_of(plain, 70)
    assert_bitwise_equal(tensors(plain), tensors(trainer))
    assert (trainer.progress.spikes, trainer.progress.skipped_steps) == (spikes, 0)


def test_a_report_names_figures_layers_and_text(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, garbage=[60], documents=lambda cursor: [f"text.txt:{cursor + i}" for i in range(9)]
    )
    trainer.fit()
    (row,) = read_metrics(tmp_path / "spikes.jsonl")
    assert (row["step"], row["applied"], row["lr"]) == (60, False, 1e-2)
    assert row["loss"] > 100 * row["spikes"]["loss"]["usual"]
    assert row["spikes"]["loss"]["sigmas"] > DEFAULT
    assert set(row["layers"]) == {"weight", "bias"}
    factors = [layer["times_usual"] for layer in row["layers"].values()]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] > 10
    norms = [layer["grad_norm"] for layer in row["layers"].values()]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
    assert row["documents"] == [f"text.txt:{59 * 16 + i}" for i in range(9)]
    (warning,) = (record.getMessage() for record in caplog.records if "is usual" in record.getMessage())
    assert warning.startswith("step 60: loss ")
    assert "learning rate 0.01; the update is skipped" in warning
    assert "text.txt:944, text.txt:945, text.txt:946, text.txt:947 and 5 more in spikes.jsonl" in warning


def test_a_learning_rate_that_blows_up_is_noticed():
    trainer = make_trainer(spike="report", lr_at=lambda step: 100.0 if step == 50 else 1e-2)
    steps_of(trainer, 50)
    assert trainer.progress.spikes == 0
    steps_of(trainer, 5)
    assert trainer.progress.spikes > 0


@pytest.mark.parametrize("stop", [50, 61, 63])
def test_a_run_resumed_before_or_amid_spikes_is_bitwise_the_uninterrupted_one(tmp_path, stop):
    """With a new level at step 60, so that what is skipped depends on what was seen before the stop."""
    garbage = range(60, 999)
    whole = make_trainer(tmp_path / "a", garbage)
    whole.fit()
    make_trainer(tmp_path / "b", garbage, steps=stop).fit()
    again = make_trainer(tmp_path / "b", garbage)
    again.resume(checkpoint.latest(tmp_path / "b" / "checkpoints"))
    again.fit()
    assert_bitwise_equal(tensors(whole), tensors(again))
    assert whole.progress.spikes == again.progress.spikes == MOST
    rows = [read_metrics(tmp_path / name / "spikes.jsonl") for name in "ab"]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(60, 60 + MOST))


# --- norms on request -------------------------------------------------------------------------------------------------


def test_norms_are_those_of_weights_gradients_and_changes(tmp_path):
    """Against the definition, with the gradient of an equal model by plain autograd."""
    trainer = make_trainer(tmp_path, steps=2, norms_every=2, grad_clip=0.01)
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    x, y = trainer.loader.batches(16)[0]
    loss = (trainer.model(x) - y).square().mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, list(trainer.parameters.values()))))
    trainer.step()
    ((name, row),) = trainer.notes
    assert name == "norms"
    expected = {"step": 2}
    for name, weight in before.items():
        expected[f"weight_norm/{name}"] = weight.norm().item()
        expected[f"grad_norm/{name}"] = gradients[name].norm().item()
        expected[f"update_ratio/{name}"] = ((trainer.parameters[name] - weight).norm() / weight.norm()).item()
    assert row == pytest.approx(expected, rel=1e-4)


def test_asking_for_norms_changes_no_number_and_writes_a_row_each_so_many_steps(tmp_path):
    asked, plain = make_trainer(tmp_path, steps=10, norms_every=3), make_trainer(steps=10)
    asked.fit(), plain.fit()
    assert_bitwise_equal(tensors(plain), tensors(asked))
    assert [row["step"] for row in read_metrics(tmp_path / "norms.jsonl")] == [3, 6, 9]
