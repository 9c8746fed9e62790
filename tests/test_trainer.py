"""The loop's promises, on a linear model: exact accumulation, nothing lost, nothing half-applied."""

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from minillm import checkpoint
from minillm.distributed.context import Context
from minillm.log import read_metrics
from minillm.run import RunDirectory
from minillm.trainer import NonFiniteError, TrainConfig, Trainer, dropout_seed, total_steps

STEPS = 12


class Rows:
    """A loader of (x, y, weight) rows; row k is a function of k, and some rows have no target."""

    samples_per_step, samples_per_epoch, tokens_per_step = 6, 60, 6

    def __init__(self, micro_batch_size=6, poison=None, ignored_steps=()):
        self.micro_batch_size, self.poison, self.ignored_steps = micro_batch_size, poison, ignored_steps

    def batches(self, cursor):
        step = cursor // self.samples_per_step
        generator = torch.Generator().manual_seed(cursor)
        x = torch.randn(6, 4, generator=generator)
        y = x.sum(1, keepdim=True) + 0.1
        counted = (torch.arange(6) % 3 != 1) & torch.tensor(step not in self.ignored_steps)
        if self.poison and step in self.poison:
            y[0] = math.nan
        return [
            tuple(t[i : i + self.micro_batch_size] for t in (x, y, counted)) for i in range(0, 6, self.micro_batch_size)
        ]


class Interrupted(Rows):
    """Rows during whose fifth step a signal comes."""

    number = signal.SIGTERM

    def batches(self, cursor):
        if cursor == 4 * self.samples_per_step:
            os.kill(os.getpid(), self.number)
        return super().batches(cursor)


class SquaredError:
    def count(self, batch):
        return int(batch[2].sum())

    def __call__(self, model, batch):
        x, y, counted = batch
        losses = (model(x) - y).square().squeeze(1).float() * counted
        return losses.sum(), {"close": ((losses < 1).sum(), len(losses))}


def make_trainer(directory=None, loader=None, steps=STEPS, dropout=0.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fields = {"max_steps": steps, "precision": "fp32", "save_every": 5, "eval_every": 4}
    fields |= {name: options.pop(name) for name in list(options) if name in TrainConfig.__dataclass_fields__}
    return Trainer(
        model,
        optimizer,
        SquaredError(),
        loader or Rows(),
        TrainConfig(**fields),
        steps=steps,
        lr_at=lambda step: 1e-2 / (1 + step) ** 0.5,
        dist=Context(torch.device("cpu")),
        run=RunDirectory(directory) if directory else None,
        **options,
    )


def prepared(path):
    (path / "checkpoints").mkdir(parents=True)
    return path


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def assert_bitwise_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def untimed(rows):
    return [
        {key: value for key, value in row.items() if key not in ("time", "tokens_per_second", "loader_wait")}
        for row in rows
    ]


def test_training_lowers_the_loss():
    trainer = make_trainer(steps=200)
    first = trainer.step()["loss"]
    assert trainer.fit()["loss"] < first / 10


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_does_not_change_the_gradient(micro_batch_size):
    """Also where micro-batches hold unequal numbers of targets, some none at all."""
    whole, parts = make_trainer(), make_trainer(loader=Rows(micro_batch_size))
    a, b = whole.step(), parts.step()
    assert a == pytest.approx(b, rel=1e-5)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-5, atol=1e-7)


class Centred(SquaredError):
    """The error, by the mean of the inputs of the whole batch, which no micro-batch knows."""

    def __init__(self):
        self.asked = []

    def prepare(self, model, micro_batches, sum_over_ranks):
        self.asked.append(len(micro_batches))
        sums = sum_over_ranks(torch.stack([torch.stack([x.sum(), torch.tensor(x.numel())]) for x, *_ in micro_batches]))
        prepared = Centred()
        prepared.mean = sums[:, 0].sum() / sums[:, 1].sum()
        return prepared

    def __call__(self, model, batch):
        loss, metrics = super().__call__(model, (batch[0] - self.mean, *batch[1:]))
        return loss, metrics | {"mean": (self.mean, 1)}


def test_an_objective_that_asks_for_it_knows_the_whole_batch_before_the_first_forward():
    found = []
    for size in (6, 2):
        trainer = make_trainer(loader=Rows(micro_batch_size=size))
        trainer.objective = Centred()
        figures = [trainer.step() for _ in range(2)]
        assert trainer.objective.asked == [6 // size] * 2  # once a step, of all micro-batches
        assert not hasattr(trainer.objective, "mean")  # nothing of a step is left for the next
        found.append((figures, weights(trainer)))
    for one, other in zip(*(figures for figures, _ in found)):
        assert one == pytest.approx(other, rel=1e-5)
    assert found[0][0][0]["mean"] != pytest.approx(found[0][0][1]["mean"])
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor)


def test_a_step_without_targets_is_prepared_for_nothing():
    trainer = make_trainer(loader=Rows(ignored_steps=[0]))
    trainer.objective = Centred()
    trainer.step()
    assert trainer.objective.asked == []


def test_the_logged_loss_is_the_mean_over_the_units_of_the_whole_batch():
    trainer = make_trainer(loader=Rows(2))
    with torch.no_grad():
        sums = [SquaredError()(trainer.model, batch)[0].item() for batch in Rows().batches(0)]
    figures = trainer.step()
    assert figures["loss"] == pytest.approx(sum(sums) / 4, rel=1e-6)
    assert 0 <= figures["close"] <= 1


def test_no_metric_is_read_before_all_micro_batches_are_under_way():
    """Reading a number makes the host wait for the device, and the device for what it is to do next."""
    events = []

    class Number:
        def __float__(self):
            events.append("read")
            return 2.0

    class Told(SquaredError):
        def __call__(self, model, batch):
            events.append("forward")
            return super().__call__(model, batch)[0], {"two": (Number(), 1)}

    trainer = make_trainer(loader=Rows(micro_batch_size=2))
    trainer.objective = Told()
    assert trainer.step()["two"] == 2.0
    assert events == ["forward"] * 3 + ["read"] * 3


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    whole = make_trainer(prepared(tmp_path / "a"), dropout=0.5)
    whole.fit()
    first = make_trainer(prepared(tmp_path / "b"), dropout=0.5, steps=7)
    first.fit()
    second = make_trainer(tmp_path / "b", dropout=0.5)
    second.resume(checkpoint.latest(tmp_path / "b" / "checkpoints"))
    assert second.progress.step == 7
    second.fit()
    assert_bitwise_equal(weights(whole), weights(second))
    assert untimed(read_metrics(tmp_path / "a" / "metrics.jsonl")) == untimed(
        read_metrics(tmp_path / "b" / "metrics.jsonl")
    )


def test_resuming_drops_the_metrics_past_the_checkpoint(tmp_path):
    trainer = make_trainer(prepared(tmp_path))
    trainer.fit()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 13, "lo')
    again = make_trainer(tmp_path)
    again.resume(tmp_path / "checkpoints" / "step-00000010")
    again.fit()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_the_last_step_is_always_saved_and_the_summary_written(tmp_path):
    trainer = make_trainer(prepared(tmp_path), keep_last=9)
    trainer.fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000010", "step-00000012"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["step"], summary["skipped_steps"]) == (True, STEPS, 0)


def test_saving_in_the_background_saves_the_same(tmp_path):
    for name in "ab":
        trainer = make_trainer(prepared(tmp_path / name), dropout=0.5, keep_last=9, async_save=name == "b")
        trainer.fit()
        assert bool(trainer.saver.staging) == (name == "b")
    saved = [sorted((tmp_path / name / "checkpoints").glob("*/*.safetensors")) for name in "ab"]
    assert len(saved[0]) == len(saved[1]) == 6
    assert [path.read_bytes() for path in saved[0]] == [path.read_bytes() for path in saved[1]]


def test_what_fails_in_the_background_ends_the_run_before_the_next_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, async_save=True)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(ValueError, match="step-00000005: cannot be written: a file is where a directory is needed"):
        trainer.fit()
    assert 5 <= trainer.progress.step <= 10
    assert not (tmp_path / "summary.json").exists()


def test_a_non_finite_step_touches_neither_weights_nor_moments():
    trainer = make_trainer(loader=Rows(poison=[2]))
    trainer.step(), trainer.step()
    before = weights(trainer)
    figures = trainer.step()
    assert math.isnan(figures["loss"])
    assert_bitwise_equal(before, weights(trainer))
    assert (trainer.progress.step, trainer.progress.skipped_steps) == (3, 1)
    trainer.step()
    assert trainer.progress.bad_steps_in_a_row == 0
    assert all(tensor.isfinite().all() for tensor in trainer.tensors().values())


def test_too_many_non_finite_steps_stop_the_run_with_a_report_and_a_checkpoint(tmp_path, caplog):
    trainer = make_trainer(prepared(tmp_path), loader=Rows(poison=range(3, 99)), max_bad_steps=4)
    with pytest.raises(NonFiniteError, match=r"step 7: loss nan.*4 steps in a row.*train\.max_bad_steps"):
        trainer.fit()
    assert "step 4: the loss is nan; skipped" in caplog.text
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved.name == "step-00000005"  # as good as any later one: its weights are those after step 3
    good = make_trainer(tmp_path)
    good.resume(saved)
    assert all(tensor.isfinite().all() for tensor in good.tensors().values())


def restart(path, trainer):
    """Continue from the newest checkpoint, as an automatic restart does; returns the names of those there are then."""
    if newest := checkpoint.latest(path / "checkpoints"):
        trainer.resume(newest)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    return sorted(folder.name for folder in (path / "checkpoints").iterdir())


@pytest.mark.parametrize("save_every", [3, 5, 6])
def test_a_run_that_diverges_again_and_again_keeps_its_checkpoints(tmp_path, save_every):
    """Also where steps of a checkpoint are among the bad ones."""
    make_trainer(prepared(tmp_path), steps=11, save_every=save_every).fit()
    good = {path.name for path in checkpoint.candidates(tmp_path / "checkpoints")}
    options = {"loader": Rows(poison=range(13, 999)), "steps": 999, "save_every": save_every, "max_bad_steps": 4}
    first = restart(tmp_path, make_trainer(tmp_path, **options))
    assert len(first) >= len(good)
    made = []
    for _ in range(3):
        trainer = make_trainer(tmp_path, **options)
        assert restart(tmp_path, trainer) == first
        made.append(trainer.progress.step)
    assert made == [made[0]] * 3
    assert trainer.progress.bad_steps_in_a_row == 4  # as many as are allowed, each time


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_names_its_parameters(caplog, value):
    trainer = make_trainer()
    trainer.model[2].weight.register_hook(lambda gradient: gradient * value)
    before = weights(trainer)
    trainer.step()
    assert "step 1: the gradient is not finite in 2.weight; skipped" in caplog.text
    assert {name: t for name, t in weights(trainer).items() if name in before}.keys() == before.keys()
    assert all(torch.equal(weights(trainer)[name], tensor) for name, tensor in before.items())


def test_a_step_without_targets_is_skipped():
    trainer = make_trainer(loader=Rows(ignored_steps=[1]))
    trainer.step()
    before = weights(trainer)
    assert trainer.step()["loss"] is None
    assert_bitwise_equal(before, weights(trainer))
    assert trainer.progress.samples == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_returns(tmp_path, number):
    loader = Interrupted()
    loader.number = number
    trainer = make_trainer(prepared(tmp_path), loader=loader)
    summary = trainer.fit()
    assert (summary["finished"], summary["stopped_by"], summary["step"]) == (False, signal.Signals(number).name, 5)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000005"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_ends_a_long_evaluation_which_the_resumed_run_makes_up_for(tmp_path):
    def endless(raise_if_stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            raise_if_stopped()

    def evaluate(raise_if_stopped):
        return {"val_loss": 1.5, "val_bpb": 1.0}

    make_trainer(prepared(tmp_path / "a"), evaluate=evaluate).fit()
    summary = make_trainer(prepared(tmp_path / "b"), evaluate=endless).fit()
    assert (summary["step"], summary["stopped_by"], summary["finished"]) == (4, "SIGTERM", False)
    for _ in range(3):  # also a kill right after the row was written would not write it twice
        again = make_trainer(tmp_path / "b", evaluate=evaluate, steps=4)
        again.resume(checkpoint.latest(tmp_path / "b" / "checkpoints"))
        again.fit()
        assert [row["step"] for row in read_metrics(tmp_path / "b" / "metrics.jsonl")] == [1, 2, 3, 4]
    again = make_trainer(tmp_path / "b", evaluate=evaluate)
    again.resume(checkpoint.latest(tmp_path / "b" / "checkpoints"))
    assert not again.progress.unevaluated
    again.fit()
    rows = [untimed(read_metrics(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    assert rows[0] == rows[1]


def test_a_kill_after_a_made_up_evaluation_does_not_log_it_twice(tmp_path, monkeypatch):
    def endless(raise_if_stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            raise_if_stopped()

    make_trainer(prepared(tmp_path), evaluate=endless).fit()
    for _ in range(2):
        again = make_trainer(tmp_path, evaluate=lambda _: {"val_loss": 1.5})
        again.resume(checkpoint.latest(tmp_path / "checkpoints"))
        with monkeypatch.context() as patched:
            patched.setattr(again, "save_if_kept", killed)
            with pytest.raises(SystemExit):
                again.fit()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def killed():
    raise SystemExit


def test_fp16_scales_the_loss_and_survives_an_overflow():
    trainer = make_trainer(precision="fp16", steps=60)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    first = trainer.step()["loss"]
    summary = trainer.fit()
    assert summary["loss"] < first
    assert 0 < summary["skipped_steps"] < 50
    assert all(tensor.dtype == torch.float32 for tensor in trainer.tensors().values())


def test_a_run_in_fp32_goes_on_in_fp16(tmp_path):
    make_trainer(prepared(tmp_path), steps=5).fit()
    again = make_trainer(tmp_path, precision="fp16")
    again.resume(checkpoint.latest(tmp_path / "checkpoints"))
    assert again.fit()["step"] == STEPS


def test_fit_works_outside_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(make_trainer().fit).result()["step"] == STEPS


def test_the_end_of_a_run_is_named_for_what_is_known_of_it():
    assert make_trainer(max_steps=None, max_tokens=6 * STEPS).fit()["stopped_by"] == "the end"


def test_a_best_of_nothing_is_beaten_by_no_loss(tmp_path):
    losses = iter([0.0, 1.0, 2.0])
    summary = make_trainer(evaluate=lambda _: {"val_loss": next(losses), "val_bpb": 1.0}).fit()
    assert (summary["best_val_loss"], summary["best_step"]) == (0.0, 4)


def test_a_stop_between_two_rows_writes_one_and_the_summary_is_of_it(tmp_path):
    whole, stopped = (
        make_trainer(prepared(tmp_path / name), loader=loader, log_every=log_every)
        for name, loader, log_every in (("a", Rows(), 1), ("b", Interrupted(), 3))
    )
    whole.fit()
    summary = stopped.fit()
    rows = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 5]
    assert summary["step"] == 5
    assert summary["loss"] == rows[-1]["loss"] == read_metrics(tmp_path / "a" / "metrics.jsonl")[4]["loss"]


def test_each_checkpoint_has_a_row(tmp_path):
    make_trainer(prepared(tmp_path), log_every=4, keep_last=9).fit()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4, 5, 8, 10, 12]


def test_a_stop_during_an_evaluation_is_summed_up_by_its_own_step(tmp_path):
    def interrupted(raise_if_stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        raise_if_stopped()

    summary = make_trainer(prepared(tmp_path), evaluate=interrupted, log_every=3).fit()
    whole = make_trainer(steps=4)
    assert (summary["step"], summary["loss"]) == (4, whole.fit()["loss"])


def test_hours_end_a_run(tmp_path):
    summary = make_trainer(prepared(tmp_path), max_hours=1e-9).fit()
    assert (summary["step"], summary["stopped_by"], summary["finished"]) == (1, "train.max_hours", True)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"max_steps": 7}, 7), ({"max_tokens": 13}, 3), ({"max_epochs": 0.5}, 5), ({"max_steps": 4, "max_epochs": 2}, 4)],
)
def test_the_first_limit_ends_the_run(limits, steps):
    assert total_steps(TrainConfig(**limits), Rows()) == steps


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"train\.max_steps: no end is set"):
        total_steps(TrainConfig(), Rows())


def test_a_checkpoint_of_other_data_is_refused_before_a_weight_changes(tmp_path):
    make_trainer(prepared(tmp_path), identity={"tokenizer_hash": "aa"}).fit()
    other = make_trainer(tmp_path, identity={"tokenizer_hash": "bb"})
    before = weights(other)
    with pytest.raises(ValueError, match=r"tokenizer_hash was aa, is bb"):
        other.resume(checkpoint.latest(tmp_path / "checkpoints"))
    assert_bitwise_equal(before, weights(other))


def test_evaluation_happens_on_schedule_and_at_the_end(tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    trainer = make_trainer(prepared(tmp_path), evaluate=lambda _: {"val_loss": next(losses), "val_bpb": 1.0})
    summary = trainer.fit()
    evaluated = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    assert evaluated == [4, 8, 12]
    assert (summary["best_val_loss"], summary["best_step"], summary["val_loss"]) == (1.0, 8, 2.0)


def test_dropout_seeds_differ_by_step_micro_batch_and_rank():
    seeds = [dropout_seed(s, t, m, r) for s in range(3) for t in range(20) for m in range(5) for r in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def evaluations(*losses):
    """An evaluation that finds these losses, one after the other."""
    found = iter(losses)
    return lambda _: {"val_loss": next(found)}


def test_patience_ends_a_run_that_gains_nothing_more(tmp_path):
    found = evaluations(3.0, 2.0, 2.5, math.nan)
    summary = make_trainer(prepared(tmp_path), patience=2, eval_every=1, evaluate=found).fit()
    assert (summary["step"], summary["stopped_by"], summary["finished"]) == (4, "train.patience", True)
    assert (summary["best_val_loss"], summary["best_step"]) == (2.0, 2)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000004"


@pytest.mark.parametrize(
    ("save", "kept"),
    [({"save_every": 1, "keep_last": 1}, [4, 10]), ({"save_every": 100, "keep_last": 2}, [2, 4, 10])],
)
def test_the_weights_that_patience_has_waited_with_can_be_loaded(tmp_path, save, kept):
    """However many checkpoints came later, and although none was due at that step."""
    found = evaluations(3.0, 2.0, 4.0, 5.0, 6.0)
    make_trainer(prepared(tmp_path), steps=12, evaluate=found, patience=3, eval_every=2, **save).fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in kept]


def test_patience_is_remembered_and_may_be_lengthened(tmp_path):
    make_trainer(prepared(tmp_path), patience=2, eval_every=1, evaluate=evaluations(1.0, 2.0, 2.0)).fit()
    again = make_trainer(tmp_path, patience=2, eval_every=1, evaluate=evaluations())
    again.resume(checkpoint.latest(tmp_path / "checkpoints"))
    assert again.over()
    longer = make_trainer(tmp_path, patience=4, eval_every=1, evaluate=evaluations(2.0, 0.5, *[1.0] * 4))
    longer.resume(checkpoint.latest(tmp_path / "checkpoints"))
    assert longer.fit()["step"] == 9
