"""Every option of the sections run, optim, train, log and parallel does something: a run with it leaves something else.

The fields of a model are tested so in test_model.py. Here a run is what it leaves: rows, checkpoints, files, samples.
"""

import dataclasses
import random
from pathlib import Path

import pytest

import train
from minillm.distributed.parallelize import parallelize
from minillm.log import read_metrics, run_command
from minillm.recipe import wiring

SMALL = """
[tokenizer]
kind = "byte"
[data]
path = "text.txt"
val = 0.05
seq_len = 16
document = "line"
[model]
dim = 16
n_layers = 1
n_heads = 2
ffn_dim = 16
max_seq_len = 16
dropout = 0.1
[optim]
lr = 1e-2
[train]
max_steps = 4
batch_tokens = 64
micro_batch_size = 4
save_every = 2
eval_every = 2
[log]
every = 1
samples = 0
curves = false
"""
SECTIONS = ("run", "optim", "train", "log", "parallel")
LONG = "--train.max_steps 38 --train.eval_every 38 --train.save_every 38 --optim.lr 1e-5"  # enough to judge spikes by
# field -> what both runs are given, and the value that one of them is given for the field
CHANGES = {
    "run.seed": ("", "1"),
    "optim.name": ("", "lamb"),
    "optim.lr": ("", "1e-3"),
    "optim.min_lr": ("", "1e-3"),
    "optim.warmup_steps": ("", "2"),
    "optim.warmup_ratio": ("", "0.5"),
    "optim.schedule": ("", "linear"),
    "optim.decay_fraction": ("--optim.schedule wsd", "0.9"),
    "optim.weight_decay": ("", "0"),
    "optim.l1": ("", "1"),
    "optim.beta1": ("", "0.5"),
    "optim.beta2": ("", "0.5"),
    "optim.eps": ("", "1"),
    "optim.momentum": ("--optim.name sgd", "0.1"),
    "optim.muon_lr": ("--optim.name muon", "0.1"),
    "optim.lr_scales": ("", "embed*=0.1"),
    "optim.grad_clip": ("--optim.name sgd", "0.01"),
    "train.max_steps": ("", "3"),
    "train.max_tokens": ("", "128"),
    "train.max_epochs": ("", "0.01"),
    "train.max_hours": ("", "1e-9"),
    "train.batch_tokens": ("", "128"),
    "train.micro_batch_size": ("", "1"),  # dropout is another in each micro-batch
    "train.precision": ("", "bf16"),
    "train.activation_checkpointing": ("", "full"),
    "train.eval_every": ("", "1"),
    "train.save_every": ("", "3"),
    "train.keep_last": ("", "1"),
    "train.patience": ("--optim.lr_scales *=0 --train.eval_every 1", "1"),
    "train.spike": (f"{LONG} --train.spike_threshold 1e-3", "skip"),
    "train.spike_threshold": (LONG, "1e-3"),
    "train.label_smoothing": ("", "0.5"),
    "train.z_loss": ("", "0.1"),
    "log.ranks": ("", "true"),
    "train.max_bad_steps": ("--optim.lr 1e30", "1"),
    "log.every": ("", "2"),
    "log.samples": ("", "1"),
    "log.norms_every": ("", "2"),
    "log.curves": ("", "true"),
    "log.tensorboard": ("", "true"),
}
# Those that a run of milliseconds cannot show: the file of tests that does, and its test.
ELSEWHERE = {
    "run.dir": ("test_train", "test_the_saved_config_repeats_the_run"),
    "run.resume": ("test_train", "test_a_longer_end_continues_a_finished_run"),
    "run.device": ("test_train", "test_a_mistake_is_one_clear_line_and_nothing_is_written"),
    "train.compile": ("test_train", "test_a_compiled_model_trains_like_one_that_is_not"),
    "train.async_save": ("test_trainer", "test_saving_in_the_background_saves_the_same"),
    "parallel.strategy": ("test_parallelize", "test_every_layout_computes_the_gradients_of_one_process"),
    "parallel.dp_replicate": ("test_parallelize", "test_what_the_layout_leaves_open_is_filled_in"),
    "parallel.dp_shard": ("test_parallelize", "test_what_the_layout_leaves_open_is_filled_in"),
    "parallel.tp": ("test_parallelize", "test_what_the_layout_leaves_open_is_filled_in"),
    "parallel.reshard_after_forward": ("test_parallelize", "test_every_layout_computes_the_gradients_of_one_process"),
    "parallel.compress": ("test_parallelize", "test_gradients_sent_in_bf16_are_close"),
    "parallel.timeout": ("test_heartbeat", "test_a_rank_that_sleeps_is_named_with_its_place_and_line"),
    "log.wandb": ("test_trackers", "test_wandb_without_a_login_keeps_the_rows_here_under_one_id"),
}
NEEDS = {"log.curves": "matplotlib", "log.tensorboard": "tensorboard"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a small corpus; what is prepared of it serves all runs."""
    directory = tmp_path_factory.mktemp("options")
    words = random.Random(0).choices("the a cat dog sat ran on under mat hill and then it slept".split(), k=2500)
    (directory / "text.txt").write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, 2500, 12)))
    (directory / "small.toml").write_text(SMALL)
    return directory


@pytest.fixture(scope="module")
def runs():
    """What the runs have left that serve several tests, by what they were given."""
    return {}


def what_is_left(directory, words, capsys, monkeypatch):
    """What a run leaves, but for what time decides."""
    recomputed = []

    def watched(model, *how, **more):
        recomputed.append(how)  # nothing else tells whether something was computed again
        return parallelize(model, *how, **more)

    monkeypatch.setattr(wiring, "parallelize", watched)
    capsys.readouterr()
    code = run_command(train.main, ["small.toml", "--run.dir", str(directory), *words])
    samples = capsys.readouterr().out.count("▸")
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "z_loss", "val_loss")
    rows = [[row.get(key) for key in keys] for row in read_metrics(directory / "metrics.jsonl")]
    checkpoints = sorted(path.name for path in (directory / "checkpoints").iterdir())
    return code, rows, checkpoints, sorted(path.name for path in directory.iterdir()), samples, recomputed


@pytest.mark.parametrize("field", CHANGES)
def test_every_option_said_on_the_command_line_makes_another_run(
    workplace, runs, field, capsys, monkeypatch, known_peak
):
    if field in NEEDS:
        pytest.importorskip(NEEDS[field])
    monkeypatch.chdir(workplace)
    both, value = CHANGES[field]
    if both not in runs:
        runs[both] = what_is_left(Path("runs", f"without {field}"), both.split(), capsys, monkeypatch)
        assert runs[both][1], "the run has no rows"
    with_it = [*both.split(), f"--{field}", value]
    assert what_is_left(Path("runs", field), with_it, capsys, monkeypatch) != runs[both]


def test_every_option_has_a_test():
    fields = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(train.Config)
        if section.name in SECTIONS
        for field in dataclasses.fields(section.default_factory)
    }
    assert fields == CHANGES.keys() | ELSEWHERE.keys()
    for file, test in ELSEWHERE.values():
        assert f"def {test}(" in (Path(__file__).parent / f"{file}.py").read_text()
