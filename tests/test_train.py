"""`python train.py` from text to samples: complete, repeatable, and clear about mistakes."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import write_small
from watched import failure, losses

import minillm
import train
from minillm import checkpoint, cli
from minillm.config import Layer, build
from minillm.data.prompts import beginnings
from minillm.log import read_metrics, run_command
from minillm.model.config import ModelSection
from minillm.recipe import fitting, other_shape, read_layers, wiring
from minillm.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def workplace(tmp_path, monkeypatch, known_peak):
    """A directory with a small corpus and a small config, and nothing that survives the test."""
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path)
    return tmp_path


def run(*words):
    return run_command(train.main, ["small.toml", *map(str, words)])


def weights(directory):
    """The hashes of the newest checkpoint's tensor files: weights and moments, to the bit."""
    manifest = checkpoint.read(checkpoint.latest(Path(directory) / "checkpoints"))[1]
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def test_penalties_are_trained_with_and_reported_beside_the_loss(workplace):
    first, smooth = "runs/small", "runs/smooth"
    assert run("--train.max_steps", 2) == 0
    assert run("--run.dir", smooth, "--train.max_steps", 2, "--train.z_loss", 0.1, "--train.label_smoothing", 0.2) == 0
    rows = [read_metrics(Path(directory) / "metrics.jsonl") for directory in (first, smooth)]
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-6)
    assert rows[1][1]["loss"] != pytest.approx(rows[0][1]["loss"], rel=1e-6)
    assert "z_loss" in rows[1][0]
    assert "z_loss" not in rows[0][0]
    for name in ("val_loss", "val_bpb"):  # without what smoothing adds
        assert rows[1][1][name] == pytest.approx(rows[0][1][name], rel=0.1)


def test_a_run_leaves_everything_that_it_promises(workplace, capsys):
    assert run("--log.samples", 1) == 0
    shown = capsys.readouterr().out
    directory = workplace / "runs" / "small"
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "time"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val_bpb" in row] == [6, 12]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["mfu"] > 0 for row in rows)
    assert rows[-1]["tokens"] == 12 * 256
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["finished"]
    assert summary["val_loss"] == rows[-1]["val_loss"]
    assert [path.name for path in sorted((directory / "checkpoints").glob("step-*"))] == [
        "step-00000010",
        "step-00000012",
    ]
    config = json.loads((directory / "config.json").read_text())
    assert None not in (config["data"]["seq_len"], config["train"]["max_steps"], config["optim"]["lr"])
    assert (config["train"]["precision"], config["model"]["vocab_size"]) != ("auto", None)
    assert "· train" in shown
    assert "minillm generate runs/small" in shown
    model, tokenizer = minillm.load(directory)
    assert minillm.generate(model, tokenizer, "the ", minillm.SamplingParams(max_new_tokens=5, seed=0)).tokens


def test_the_saved_config_repeats_the_run(workplace):
    assert run() == 0
    assert run_command(train.main, ["runs/small/config.json", "--run.dir", "runs/again"]) == 0
    assert losses("runs/again") == losses("runs/small")
    ours, theirs = (minillm.load(f"runs/{name}")[0].state_dict() for name in ("small", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_seed_gives_another_run(workplace):
    assert run() == run("--run.seed", 1, "--run.dir", "runs/other") == 0
    assert losses("runs/small") != losses("runs/other")


def test_a_finished_run_is_not_overwritten_and_resuming_it_is_no_error(workplace, capsys):
    assert run("--run.resume", "auto") == 0
    before = losses("runs/small")
    assert "continue it with --run.resume auto" in failure(capsys, run)
    assert run("--run.resume", "auto") == 0
    assert "the run is finished at step 12" in capsys.readouterr().err
    assert losses("runs/small") == before


def test_a_longer_end_continues_a_finished_run(workplace):
    """The directory alone is enough: what else was set is taken from the run."""
    assert run() == 0
    words = ["--run.dir", "runs/small", "--run.resume", "auto", "--train.max_steps", "15"]
    assert run_command(train.main, words) == 0
    assert [row["step"] for row in losses("runs/small")] == list(range(1, 16))


def test_a_run_can_continue_another_from_a_path(workplace):
    assert run() == 0
    words = ["--run.dir", "runs/more", "--run.resume", "runs/small", "--train.max_steps", "14"]
    assert run_command(train.main, words) == 0
    assert [row["step"] for row in losses("runs/more")] == [13, 14]


def test_resuming_with_changed_text_is_refused(workplace, capsys):
    assert run() == 0
    with open("text.txt", "a") as file:
        file.write("\none more line about a cat")
    message = failure(capsys, run, "--run.resume", "auto", "--train.max_steps", 20)
    assert "another run than the one to be continued" in message
    assert "data_hash was" in message


def test_resuming_with_another_shape_is_refused_and_nothing_is_lost(workplace, capsys):
    assert run() == 0
    before = weights("runs/small")
    message = failure(capsys, run, "--run.resume", "auto", "--train.max_steps", 20, "--model.dim", 64)
    assert "model.dim was 32, is 64" in message
    assert weights("runs/small") == before


def test_the_run_directory_alone_continues_a_run_with_all_that_it_was_given(workplace):
    """Also where the run was killed before its first checkpoint, and has only its config."""
    words = [
        "--run.seed",
        7,
        "--data.packing",
        "false",
        "--optim.schedule",
        "constant",
        "--optim.warmup_steps",
        0,
        "--run.dir",
    ]
    assert run(*words, "runs/one") == run(*words, "runs/two", "--train.max_steps", 6) == 0
    resume = ["--run.dir", "runs/two", "--run.resume", "auto"]
    assert run_command(train.main, [*resume, "--train.max_steps", "12"]) == 0
    assert losses("runs/two") == losses("runs/one")
    shutil.rmtree("runs/two/checkpoints")
    assert run_command(train.main, resume) == 0
    assert losses("runs/two") == losses("runs/one")


def test_the_text_may_move_and_the_cache_may_go_between_two_parts_of_a_run(workplace):
    constant = ["--optim.schedule", "constant", "--optim.warmup_steps", 0]
    assert run(*constant) == run(*constant, "--run.dir", "runs/whole", "--train.max_steps", 15) == 0
    shutil.rmtree(".cache")
    (workplace / "elsewhere").mkdir()
    (workplace / "text.txt").rename("elsewhere/renamed.txt")
    words = ["--data.path", "elsewhere/renamed.txt", "--run.resume", "auto", "--train.max_steps", 15]
    assert run(*constant, *words) == 0
    assert losses("runs/small") == losses("runs/whole")


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--run.seed", 1], "run.seed was 0, is 1"),
        (["--data.seq_len", 16], "data.seq_len was 32, is 16"),
        (["--data.packing", "false"], "data.packing was True, is False"),
        (["--model.rope_theta", 9], "model.rope_theta was 10000.0, is 9.0"),
        (["--optim.name", "lamb"], "optim.name was muon, is lamb"),
    ],
)
def test_resuming_as_another_run_is_refused(workplace, capsys, words, difference):
    assert run() == 0
    assert difference in failure(capsys, run, "--run.resume", "auto", "--train.max_steps", 20, *words)


def test_resuming_another_run_never_overwrites_this_one(workplace, capsys):
    assert run() == run("--run.dir", "runs/other") == 0
    before = weights("runs/small"), losses("runs/small")
    assert "holds a run already" in failure(capsys, run, "--run.resume", "runs/other", "--train.max_steps", 20)
    assert (weights("runs/small"), losses("runs/small")) == before


def test_a_damaged_checkpoint_is_not_gone_on_with_where_it_is_named(workplace, capsys):
    assert run() == 0
    saved = workplace / "runs/small/checkpoints/step-00000010"
    damage(saved / "optim-00000.safetensors")
    words = ["--run.dir", "runs/more", "--run.resume", saved]
    assert "optim-00000.safetensors: not what was saved" in failure(capsys, run, *words)


def damage(file):
    """Another last byte."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(workplace, capsys):
    assert run() == 0
    for path in workplace.glob("runs/small/checkpoints/*/state.json"):
        path.unlink()
    before = sorted(path.name for path in workplace.glob("runs/small/checkpoints/*"))
    assert "none of its checkpoints is whole" in failure(capsys, run, "--run.resume", "auto", "--train.max_steps", 20)
    assert sorted(path.name for path in workplace.glob("runs/small/checkpoints/*")) == before


def test_another_kind_of_end_extends_a_run(workplace):
    assert run() == 0
    assert (
        run_command(train.main, ["--run.dir", "runs/small", "--run.resume", "auto", "--train.max_tokens", "4096"]) == 0
    )
    assert losses("runs/small")[-1]["step"] == 16


def test_a_summary_that_a_kill_prevented_is_written_when_the_run_is_resumed(workplace):
    assert run() == 0
    summary = workplace / "runs/small/summary.json"
    before = json.loads(summary.read_text())
    summary.unlink()
    assert run("--run.resume", "auto") == 0
    after = json.loads(summary.read_text())
    assert {key: after[key] for key in ("loss", "val_loss", "step")} == {
        key: before[key] for key in ("loss", "val_loss", "step")
    }


def chosen_for(*words):
    given = read_layers(train.Config, list(words))
    return build(train.Config, [*fitting(train.Config, given, train.QUICKSTART), *given])


@pytest.mark.parametrize("seq_len", [100, 2_048])
def test_the_other_choices_follow_a_given_seq_len(seq_len):
    config = chosen_for("--data.path", "x.txt", "--data.seq_len", f"{seq_len:_}")
    assert (config.data.seq_len, config.model.max_seq_len) == (seq_len, seq_len)
    assert config.train.batch_tokens % seq_len == 0


def test_the_chosen_seq_len_fits_a_given_max_seq_len():
    assert chosen_for("--model.max_seq_len", "128").data.seq_len == 128
    assert chosen_for("--model.max_seq_len", "4096").data.seq_len == 256


@pytest.mark.parametrize("words", [["--optim.name", "adamw"], ["--optim.lr", "1e-3"]])
def test_what_is_given_for_the_optimizer_leaves_no_rate_of_another(words):
    assert chosen_for(*words).optim.muon_lr is None


@pytest.mark.parametrize("words", [["--tokenizer.kind", "byte"], ["--tokenizer.path", "runs/other"]])
def test_a_given_tokenizer_has_the_vocabulary_it_has(words):
    assert chosen_for(*words).tokenizer.vocab_size is None


@pytest.mark.parametrize("words", [["--model.preset", "gpt2-124m"], ["--model.dim", "768"]])
def test_a_given_shape_gets_a_learning_rate_for_its_width_and_nothing_of_another_shape(words):
    config = chosen_for(*words)
    assert (config.optim.lr, config.optim.muon_lr) == (1e-3, None)
    assert config.model.preset == (words[1] if "preset" in words[0] else None)
    assert config.model.n_layers == (12 if config.model.preset else ModelSection.n_layers)
    assert config.model.tie_embeddings


def test_a_prepared_folder_is_trained_on(workplace, capsys):
    prepare = ["data", "prepare", "--data.path", "text.txt", "--data.document", "line", "--tokenizer.kind", "byte"]
    assert run_command(cli.dispatch, prepare) == 0
    folder = capsys.readouterr().out.splitlines()[0]
    assert run("--data.path", folder) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.path", "nowhere.txt"], "nowhere.txt"),
        (["--data.path", "empty.txt"], "empty"),
        (["--data.seq_len", 64, "--train.batch_tokens", 65536], "train.batch_tokens"),
        (["--data.seq_len", 96, "--train.batch_tokens", 960], "data.seq_len: 96 is longer than model.max_seq_len 64"),
        (["--model.n_heads", 5], "model.n_heads"),
        (["--train.batch_tokens", 100], "train.batch_tokens: 100 is no multiple of data.seq_len 32; 96 is the nearest"),
        (["--model.preset", "gpt5"], "model.preset: 'gpt5' is not known"),
        (["--run.device", "abacus"], "run.device: 'abacus' cannot be used here"),
        (["--run.resume", "runs/none"], "runs/none"),
        (["--model.vocab_size", 999], "model.vocab_size: 999 is not the tokenizer's 272"),
        (["--model.causal", "false"], "model.causal"),
        (["--data.val", "0", "--train.patience", 3], "train.patience: nothing is held out"),
        (["--optim.lr_scales", "embd=2"], "optim.lr_scales: 'embd' fits no parameter"),
        (["other.toml"], "one config file is expected, not 2"),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(workplace, capsys, words, message):
    (workplace / "empty.txt").write_text("")
    assert message in failure(capsys, run, *words)
    assert not (workplace / "runs" / "small" / "config.json").exists()
    assert not (workplace / "runs" / "small" / "checkpoints").exists()


def test_five_mistakes_come_in_one_report(workplace, capsys):
    words = ["--optim.lrr", 1, "--train.max_steps", "many", "--model.dropout", 1.5, "--model.n_heads", 5]
    message = failure(capsys, run, *words, "--data.val", "hash x")
    assert "5 problems" in message
    for name in ("optim.lrr", "train.max_steps", "model.dropout", "model.n_heads", "data.val"):
        assert name in message


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--model.preset", "gpt5", "--optim.lrr", 1], ("model.preset", "optim.lrr")),
        (["--model.n_heads", 5, "--train.batch_tokens", 100], ("model.n_heads", "train.batch_tokens")),
        (["--optim.lr", "--model.dropout", 2], ("optim.lr", "model.dropout")),
        (["--optim.lr_scales", "embd=2", "--train.batch_tokens", 100], ("'embd' fits no", "train.batch_tokens")),
    ],
)
def test_a_mistake_does_not_hide_the_next(workplace, capsys, words, names):
    message = failure(capsys, run, *words)
    assert "2 problems" in message
    for name in names:
        assert name in message


@pytest.mark.parametrize("seq_len", [2, 20])
def test_samples_are_shown_however_short_the_context_and_the_documents(workplace, capsys, seq_len):
    (workplace / "text.txt").write_text("hen\negg\nfarm\n" * 200)
    length = ["--data.seq_len", seq_len, "--model.max_seq_len", seq_len, "--train.batch_tokens", 20]
    assert run("--data.document", "line", "--data.val", 0, "--log.samples", 1, *length) == 0
    said = capsys.readouterr().out
    assert "a beginning of the text" in said
    assert "<s>" not in said


def test_a_new_run_takes_nothing_from_the_directories_above_it(workplace):
    (workplace / "config.json").write_text('{"architectures": ["Other"]}')
    (workplace / "runs").mkdir()
    (workplace / "runs/config.json").write_text('{"architectures": ["Other"]}')
    assert run("--run.resume", "auto") == 0


def test_a_vocabulary_that_was_lowered_is_no_obstacle_to_resuming(workplace):
    words = ["--tokenizer.kind", "bpe", "--tokenizer.vocab_size", 5000, "--train.max_steps", 2, "--run.resume", "auto"]
    for _ in range(3):
        assert run(*words) == 0
    words[-3] = 4
    assert run(*words) == 0
    assert losses("runs/small")[-1]["step"] == 4


def test_a_preset_that_is_no_text_is_reported_with_the_rest(workplace, capsys):
    (workplace / "odd.toml").write_text('[model]\npreset = ["micro"]\n[optim]\nlrr = 1\n')
    assert run_command(train.main, ["odd.toml"]) == 1
    message = capsys.readouterr().err
    assert "2 problems" in message
    assert "model.preset" in message


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_is_none_in_any_spelling(word):
    given = read_layers(train.Config, ["--data.path", word, "--model.preset", word])
    assert fitting(train.Config, given, train.QUICKSTART)[-1].values["train.max_steps"] == 1000


def test_a_prompt_lies_inside_one_document():
    class Store:
        n_documents, n_tokens = 2, 9

        def tokens(self, start, stop):
            return np.array([1, 5, 2, 1, 6, 7, 8, 9, 2])[start:stop]  # 1: bos, 2: eos

    prompts = beginnings(Store(), 4, length=8, eos_id=2)
    assert prompts == [[1, 5], [1, 6, 7, 8, 9], [6, 7, 8, 9], [8, 9]]


def test_a_prompt_begins_as_its_document_where_one_token_begins_and_ends_it():
    class Store:
        n_documents, n_tokens = 2, 8
        document_offsets = (0, 4)

        def tokens(self, start, stop):
            return np.array([2, 5, 6, 2, 2, 7, 8, 2])[start:stop]

    assert beginnings(Store(), 2, length=8, eos_id=2) == [[2, 5, 6], [2, 7, 8]]


def test_a_run_uses_the_tokens_that_prepare_left(workplace, capsys):
    (workplace / "large.txt").write_text("a line of a text that is larger than some\n" * 80_000)  # 3.4 MB
    text = ["--data.path", "large.txt", "--data.document", "line", "--tokenizer.kind", "byte"]
    assert run_command(cli.dispatch, ["data", "prepare", *text]) == 0
    folder = workplace / capsys.readouterr().out.splitlines()[0]
    shape = ["--model.dim", "16", "--model.n_layers", "1", "--model.n_heads", "2", "--train.max_steps", "1"]
    assert run_command(train.main, [*text, *shape, "--run.dir", "runs/large"]) == 0
    assert [path for path in folder.parent.glob("large*") if path.is_dir()] == [folder]
    assert json.loads((workplace / "runs/large/config.json").read_text())["data"]["val"] == "0.01"


def test_help_explains_every_field_and_builds_no_model(capsys, monkeypatch):
    monkeypatch.setattr(wiring, "Transformer", None)
    assert run_command(train.main, ["--help"]) == 0
    text = capsys.readouterr().out
    for section in dataclasses.fields(train.Config):
        for field in dataclasses.fields(section.default_factory):
            assert re.search(rf"^  --{section.name}\.{field.name}\n      \w.* \(.*default .*\)$", text, re.M), (
                field.name
            )


def start(forks, *words):
    """train.py in a process of its own, which may be killed."""
    return forks.start(1, "train:main", ["small.toml", "--run.resume", "auto", *map(str, words)])


def test_sigterm_saves_and_the_resumed_run_is_bitwise_the_uninterrupted_one(workplace, forks):
    words = ["--train.max_steps", 160, "--train.eval_every", 40, "--train.save_every", 1000]
    process = start(forks, *words)
    while len(losses("runs/small")) < 3:
        time.sleep(0.02)
    process.signal(0, signal.SIGTERM)
    assert process.wait() == [0], process.said(0)
    assert "stopped by SIGTERM" in process.said(0)
    stopped = checkpoint.read(checkpoint.latest(workplace / "runs/small/checkpoints"))[0]["progress"]["step"]
    assert 3 <= stopped < 160
    end = ["--train.max_steps", 160, "--train.eval_every", 40, "--train.save_every", 1000]
    assert run("--run.resume", "auto", *end) == 0
    assert run("--run.dir", "runs/whole", *end) == 0
    assert losses("runs/small") == losses("runs/whole")
    assert weights("runs/small") == weights("runs/whole")


def kill_and_resume(forks, kills, seed):
    """Kill a run at random moments, resume it each time, and compare its end with a run that was left alone.

    About half of the moments are counted from the start of the process (reading, loading the checkpoint), the
    others from its first step. Returns how many of the kills fell inside a save.
    """

    def unfinished(process):
        return any(Path("runs/small/checkpoints").glob(f".step-*.{process.processes[0]}.tmp"))

    inside, start_up = 0, 0.0
    end = ["--train.max_steps", 60, "--train.save_every", 1, "--train.eval_every", 20]
    assert run("--run.dir", "runs/whole", *end) == 0
    moments = random.Random(seed)
    for _ in range(kills):
        before = len(losses("runs/small"))
        process = start(forks, *end)
        if start_up and moments.random() < 0.5:
            time.sleep(moments.uniform(0, start_up))
        else:  # the time to the first step varies with the machine, so the clock starts with the first new row
            begin = time.perf_counter()
            while not process.ended(0) and len(losses("runs/small")) <= before:
                time.sleep(0.005)
            start_up = time.perf_counter() - begin
            time.sleep(moments.uniform(0, 0.1))
            wait = moments.random() < 0.5  # for a save, which is soon over
            while wait and not process.ended(0) and not unfinished(process):
                pass
        process.signal(0, signal.SIGKILL)
        codes = process.wait()
        inside += unfinished(process)
        if codes == [0]:  # it was faster than the kill: both runs go on a little
            end[1] += 30
            assert run("--run.dir", "runs/whole", "--run.resume", "auto", *end) == 0
    assert run("--run.resume", "auto", *end) == 0
    assert losses("runs/small") == losses("runs/whole")
    assert weights("runs/small") == weights("runs/whole")
    return inside


def test_a_run_killed_three_times_ends_bitwise_like_one_left_alone(workplace, forks):
    kill_and_resume(forks, kills=3, seed=1)


@pytest.mark.soak
def test_a_run_killed_fifty_times_ends_bitwise_like_one_left_alone(workplace, forks):
    assert kill_and_resume(forks, kills=50, seed=2) >= 3


def test_a_reader_who_leaves_does_not_end_the_training(workplace):
    command = f"{sys.executable} {ROOT / 'train.py'} small.toml --train.max_steps 60 2>&1 | head -c 200 >/dev/null"
    subprocess.run(command, shell=True, cwd=workplace, check=True)
    assert json.loads((workplace / "runs/small/summary.json").read_text())["step"] == 60


def test_a_second_run_in_the_same_directory_is_refused(workplace, forks, capsys):
    process = start(forks, "--train.max_steps", 5000)
    while not losses("runs/small"):
        time.sleep(0.02)
    message = failure(capsys, run, "--run.resume", "auto")
    process.signal(0, signal.SIGKILL)
    assert process.wait() == [-9]
    assert f"in use by process {process.processes[0]}" in message


def test_importing_minillm_prints_nothing_and_probes_no_device(workplace):
    code = "import minillm, torch; print(torch.cuda.is_initialized(), sorted(minillm.__all__)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert (done.stdout, done.stderr) == ("False Completion\n", "")


def test_importing_minillm_costs_little_more_than_torch(workplace):
    code = "import time, torch; begin = time.process_time(); import minillm; print(time.process_time() - begin)"
    command = [sys.executable, "-c", code]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert min(seconds) < 2


def test_a_disk_that_is_full_while_saving_is_one_line_and_the_earlier_checkpoint_stays(workplace, disk, capsys):
    place, fill = disk
    directory = place / "run"
    assert run("--run.dir", directory, "--train.max_steps", 5) == 0
    before = weights(directory)
    fill()
    message = failure(capsys, run, "--run.dir", directory, "--run.resume", "auto")
    assert f"error: {directory}/checkpoints/step-00000010: cannot be written: the " in message
    assert message.count("\n") == 1
    assert weights(directory) == before
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_run_directory_that_is_read_only_is_one_line_and_its_checkpoints_stay(workplace, capsys):
    """As another user where root would be let through whatever the mode says."""
    assert run() == 0
    before = weights("runs/small"), losses("runs/small")
    workplace.chmod(0o755)
    directory = Path("runs/small")
    directory.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        message = failure(capsys, run, "--run.resume", "auto", "--train.max_steps", 20)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        directory.chmod(0o755)
    assert message.startswith("error: runs/small/")
    assert message.endswith(": cannot be written: no permission to write there; choose another directory\n")
    assert message.count("\n") == 1
    assert (weights("runs/small"), losses("runs/small")) == before


def test_a_summary_of_an_earlier_end_is_replaced_when_the_run_is_resumed(workplace):
    """As after a kill between the last save and the writing of the summary."""
    summary = workplace / "runs/small/summary.json"
    assert run() == 0
    earlier = summary.read_text()
    assert run("--run.resume", "auto", "--train.max_steps", 15) == 0
    later = json.loads(summary.read_text())
    summary.write_text(earlier)
    assert run("--run.resume", "auto", "--train.max_steps", 15) == 0
    again = json.loads(summary.read_text())
    assert (again["step"], again["loss"], again["val_loss"]) == (15, later["loss"], later["val_loss"])


def test_a_compiled_model_trains_like_one_that_is_not(workplace, monkeypatch):
    """Captured and differentiated by the compiler, but not translated to C++, which takes some 40 seconds."""
    blocks, compiled = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: blocks.append(compiled(block, backend="aot_eager")))
    shape = ["--model.dim", 16, "--model.n_layers", 1, "--model.dropout", 0]
    words = [*shape, "--train.max_steps", 3, "--train.eval_every", 1]
    assert run(*words) == run(*words, "--run.dir", "runs/compiled", "--train.compile", "true") == 0
    assert len(blocks) == 1
    for row, other in zip(losses("runs/small"), losses("runs/compiled"), strict=True):
        assert other == pytest.approx(row, rel=1e-4)


def test_a_warm_up_given_as_a_ratio_may_be_given_again_on_resume(workplace):
    assert run("--optim.warmup_ratio", 0.5) == 0
    before = losses("runs/small")
    assert run("--optim.warmup_ratio", 0.5, "--run.resume", "auto") == 0
    assert losses("runs/small") == before


# --- from the weights of an earlier run -------------------------------------------------------------------------------


@pytest.fixture
def source(workplace):
    """A finished run to start from, and another text in the same letters."""
    assert run() == 0
    words = random.Random(1).choices("here is the hen and there it goes again to the pen".split(), k=2500)
    (workplace / "new.txt").write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, 2500, 12)))
    return workplace / "runs" / "small"


def continued(*words):
    """What a user types to go on from the run: nothing about its shape or tokenizer."""
    given = ["--data.path", "text.txt", "--data.document", "line", "--data.val", "0.1", "--train.max_steps", "3"]
    given += ["--model.path", "runs/small", "--run.dir", "runs/new", "--data.seq_len", "32", "--log.every", "1"]
    return run_command(train.main, [*given, "--train.batch_tokens", "256", "--optim.lr", "1e-2", *map(str, words)])


def test_a_new_run_begins_with_the_loss_that_the_earlier_one_ended_with(source, capsys):
    """At step 0, with a learning rate that moves nothing; then it learns, and its rate warms up again."""
    val_loss = json.loads((source / "summary.json").read_text())["val_loss"]
    assert continued("--train.max_steps", 1, "--optim.lr", "1e-30", "--optim.weight_decay", 0) == 0
    assert f"val loss {val_loss:.4f} before the first step" in capsys.readouterr().err
    (row,) = losses("runs/new")
    assert (row["step"], row["tokens"]) == (1, 256)
    assert row["val_loss"] == pytest.approx(val_loss, abs=1e-6)
    old, new = minillm.load("runs/small")[0], minillm.load("runs/new")[0]
    assert new.config == old.config
    assert continued("--data.path", "new.txt", "--run.dir", "runs/other", "--optim.warmup_steps", 2) == 0
    rows = losses("runs/other")
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_run_that_started_from_another_goes_on_without_it(source, workplace):
    assert continued("--train.max_steps", 12, "--train.save_every", 5) == 0
    whole = weights("runs/new")
    shutil.rmtree("runs/new/checkpoints/step-00000012")
    shutil.move(source, workplace / "away")
    (workplace / "runs/new/summary.json").unlink()
    assert run_command(train.main, ["--run.dir", "runs/new", "--run.resume", "auto"]) == 0
    assert weights("runs/new") == whole


def test_what_no_weight_depends_on_may_change(source):
    changes = ["--model.max_seq_len", 128, "--model.rope_scaling", "linear", "--model.rope_factor", 2]
    assert continued(*changes, "--model.dropout", 0.2, "--train.max_steps", 1) == 0
    config = minillm.load("runs/new")[0].config
    assert (config.max_seq_len, config.rope_scaling, config.rope_original_len, config.dropout) == (
        128,
        "linear",
        64,
        0.2,
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--model.dim", 64], "model.dim: 64 is given, but runs/small has 32; leave it out"),
        (["--model.preset", "micro"], "model.n_layers: 5 is given, but runs/small has 2; leave it out"),
        (["--model.norm", "layernorm"], "model.norm: layernorm is given, but runs/small has rmsnorm; leave it out"),
        (["--tokenizer.kind", "char"], "tokenizer.kind: char is given, but runs/small has a tokenizer of kind byte"),
        (["--tokenizer.path", "tok"], "tokenizer.path: tok is another tokenizer than that of runs/small; leave it out"),
        (["--model.path", "nowhere"], "model.path: nowhere: does not exist here"),
        (["--run.dir", "runs/small"], "model.path: runs/small is in the directory of this very run"),
        (["--run.dir", "runs/small", "--run.resume", "auto"], "choose another run.dir to start from it, or continue"),
    ],
)
def test_what_contradicts_the_weights_is_refused(source, capsys, words, problem):
    CharTokenizer("abc ").save(Path("tok"))
    before = weights("runs/small")
    capsys.readouterr()
    assert continued(*words) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert "Traceback" not in error
    assert not Path("runs/new").exists()
    assert weights("runs/small") == before


def test_learned_positions_are_weights_of_which_there_are_as_many_as_there_are():
    given = [Layer("command line", {"model.max_seq_len": "128"})]
    shape = minillm.ModelConfig(vocab_size=8, max_seq_len=64)
    assert not other_shape(given, shape, "runs/old")
    (problem,) = other_shape(given, dataclasses.replace(shape, position="learned"), "runs/old")
    assert problem == "model.max_seq_len: 128 is given, but runs/old has 64; leave it out"


def test_a_saved_folder_in_half_precision_can_be_started_from(source):
    model, tokenizer = minillm.load("runs/small")
    minillm.save(model.to(torch.bfloat16), tokenizer, "saved")
    minillm.save(model, None, "bare")
    assert continued("--model.path", "saved", "--train.max_steps", 1, "--optim.lr", "1e-30") == 0
    new = minillm.load("runs/new")[0].state_dict()
    assert all(p.dtype == torch.float32 and torch.equal(p, model.state_dict()[name].float()) for name, p in new.items())
    assert continued("--model.path", "bare", "--run.dir", "runs/bare") == 1
    assert continued("--model.path", "bare", "--run.dir", "runs/bare", "--tokenizer.path", "saved") == 0


def test_a_spike_is_reported_with_the_lines_of_the_text_and_norms_come_on_request(workplace):
    words = ["--train.spike_threshold", 0.001, "--train.max_steps", 40, "--log.norms_every", 20]
    assert run(*words) == 0
    spikes = read_metrics("runs/small/spikes.jsonl")
    assert spikes
    assert all(re.fullmatch(r"text\.txt:\d+ tokens \d+-\d+", text) for row in spikes for text in row["documents"])
    assert len(spikes[0]["documents"]) >= 8  # a step reads 8 rows
    norms = read_metrics("runs/small/norms.jsonl")
    assert [row["step"] for row in norms] == [20, 40]
    assert 0 < norms[0]["update_ratio/blocks.1.mlp.down_proj.weight"] < 1
    assert json.loads(Path("runs/small/summary.json").read_text())["spikes"] == len(spikes)


def test_a_tracker_whose_extra_is_missing_is_named_before_anything_is_written(workplace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install 'minillm[track]'" in failure(capsys, run, "--log.tensorboard")
    assert sorted(path.name for path in workplace.iterdir()) == ["small.toml", "text.txt"]


def test_the_best_weights_of_a_run_that_lost_patience_are_named(workplace, capsys):
    assert run("--optim.lr", 1, "--train.max_steps", 12, "--train.eval_every", 1, "--train.patience", 2) == 0
    summary = json.loads(Path("runs/small/summary.json").read_text())
    assert summary["stopped_by"] == "train.patience"
    call = re.search(r"best: val loss .*; minillm\.load\('(.*)', step=(\d+)\) reads", capsys.readouterr().out)
    assert (call[1], int(call[2])) == ("runs/small", summary["best_step"])
    minillm.load(call[1], step=int(call[2]))


def test_a_run_draws_its_curves(workplace):
    pytest.importorskip("matplotlib", reason="extra plot")
    assert run("--log.curves", "true") == 0
    assert Path("runs/small/curves.png").stat().st_size > 10_000
