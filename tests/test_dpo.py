"""`python dpo.py` from a model and a file of preferences to answers: complete, repeatable, clear about mistakes."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tuned import WORDS, config_of, question, same, weights, write_base, write_rows
from watched import failure, losses

import dpo
import minillm
from minillm import checkpoint, cli
from minillm.data import stories
from minillm.log import read_metrics, run_command
from minillm.lora import adapted
from minillm.losses import LOSSES
from minillm.recipe import wiring
from minillm.trainer import Trainer

FIGURES = ("logprobs", "reference_logprobs", "rewards", "length")
ONE_STEP = ["--train.max_steps", 1]
ASKED = ["--dpo.predict", 4]
KTO = ["--dpo.loss", "kto", "--data.path", "labels.jsonl", "--data.val", "held_labels.jsonl"]
MIDDLE = "runs/tuned/checkpoints/step-00000003"
SMALL = config_of("pairs.jsonl", "[dpo]\npredict_tokens = 8\npredict_some = 0")


def write_all(directory):
    """A model that knows nothing, questions of four kinds, each with a good and a bad answer, and a config."""
    write_base(directory)
    questions = [{"prompt": question(i)} for i in range(96)]
    answers = [(WORDS[i % 4], WORDS[i % 4][::-1]) for i in range(96)]
    pairs = [{**one, "chosen": good, "rejected": bad} for one, (good, bad) in zip(questions, answers)]
    said = [{"completion": both[i % 2], "label": i % 2 == 0} for i, both in enumerate(answers)]
    labels = [one | what for one, what in zip(questions, said)]
    for name, rows in (("pairs", pairs), ("held", pairs[:4]), ("labels", labels), ("held_labels", labels[:4])):
        write_rows(directory / f"{name}.jsonl", rows)
    (directory / "small.toml").write_text(SMALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, known_peak):
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    return tmp_path


def run(*words):
    return run_command(dpo.main, ["small.toml", *map(str, words)])


def again(directory, *words):
    return run_command(dpo.main, ["--run.dir", f"runs/{directory}", "--run.resume", *map(str, words)])


def summary(name="tuned"):
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def test_a_run_leaves_everything_that_it_promises(workplace, capsys):
    assert run(*ASKED) == 0
    shown = capsys.readouterr().out
    rows = read_metrics(Path("runs/tuned/metrics.jsonl"))
    told = {f"{name}_{side}" for name in FIGURES for side in ("chosen", "rejected")}
    told |= {"loss", "margin", "preference_accuracy", "ranking_accuracy", "kl"}
    held_out = {f"val_{name}" for name in told}
    assert [row["step"] for row in rows if told <= row.keys()] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if held_out <= row.keys()] == [3, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for row in rows:
        for side in ("chosen", "rejected"):
            ratio = row[f"logprobs_{side}"] - row[f"reference_logprobs_{side}"]
            assert row[f"rewards_{side}"] == pytest.approx(0.1 * ratio, abs=1e-5)
        assert row["margin"] == pytest.approx(row["rewards_chosen"] - row["rewards_rejected"], abs=1e-6)
    before = json.loads(Path("runs/tuned/before.json").read_text())
    assert held_out <= before.keys()
    assert (before["val_kl"], before["val_margin"], before["val_preference_accuracy"]) == (0, 0, 0.5)
    found = summary()
    for name in ("preference_accuracy", "ranking_accuracy", "rewards_chosen", "rewards_rejected", "margin", "kl"):
        assert found[name] == {"before": before[f"val_{name}"], "after": rows[-1][f"val_{name}"]}
    assert set(found["exact_match"]) == {"before", "after", "majority", "files"}
    for when, length in found["answer_length"].items():
        answered = map(json.loads, Path(f"runs/tuned/predictions/{when}.jsonl").read_text().splitlines())
        assert length == sum(len(one["answer"].strip()) for one in answered) / 4
    for words in ("chosen over rejected", "from the reference", "characters of an answer", "minillm chat runs/tuned"):
        assert words in shown
    config = json.loads(Path("runs/tuned/config.json").read_text())
    assert (config["dpo"]["template"], config["dpo"]["reference"]) == ("chatml", "frozen")
    assert run_command(dpo.main, ["runs/tuned/config.json", "--run.dir", "runs/again"]) == 0
    assert losses("runs/again") == losses("runs/tuned")


def test_what_is_preferred_is_learned(workplace):
    longer = ["--train.max_steps", 40, "--train.eval_every", 40, "--optim.warmup_steps", 5]
    assert run(*longer, *ASKED, "--dpo.sft_weight", 1) == 0
    found = summary()
    answered = found["exact_match"]
    assert answered["before"] < answered["after"]
    assert found["win_rate"] == 0.5 + (answered["after"] - answered["before"]) / 2
    assert found["preference_accuracy"]["after"] == 1
    assert found["margin"]["after"] > 0 < found["kl"]["after"]


def test_chosen_answers_that_fall_are_said_and_the_usual_weight_of_their_own_loss_keeps_them(workplace, capsys):
    write_rows("similar.jsonl", [{"prompt": f"{i % 4}?", "chosen": "abab", "rejected": "babababab"} for i in range(60)])
    words = ["--data.path", "similar.jsonl", "--data.val", 0, "--train.max_steps", 12, "--optim.warmup_steps", 1]
    for name, weight in (("bare", ["--dpo.sft_weight", 0]), ("usual", [])):
        assert run(*words, "--optim.lr", 3e-2, "--run.dir", f"runs/{name}", *weight) == 0
        said = "the chosen answers become less likely" in capsys.readouterr().err
        first, *_, last = read_metrics(Path(f"runs/{name}/metrics.jsonl"))
        assert last["margin"] > 1
        assert said == (last["logprobs_chosen"] < first["logprobs_chosen"]) == (name == "bare")


def test_with_nothing_held_out_nothing_is_summed_up_of_it(workplace, capsys):
    assert run("--data.val", 0, *ONE_STEP) == 0
    assert "chosen over rejected" not in capsys.readouterr().out
    assert not {"preference_accuracy", "rewards_chosen", "margin", "kl", "win_rate"} & summary().keys()


def test_the_loss_does_not_depend_on_how_a_step_is_divided(workplace):
    for rows in (1, 4):
        words = ["--train.micro_batch_size", rows, "--dpo.sft_weight", 0.5]
        assert run("--run.dir", f"runs/{rows}", *words) == 0
    assert_same_run(1, 4)


def assert_same_run(one, other, rel=1e-4):
    """Up to the order in which numbers are added."""
    ours, theirs = (read_metrics(Path(f"runs/{name}/metrics.jsonl")) for name in (one, other))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    compared = [name for name in theirs[-1] if name.startswith(("val_", "logprobs", "rewards"))]
    for mine, their in zip(ours, theirs):
        for name in ("loss", "grad_norm", "margin", "preference_accuracy", "kl", *compared):
            if name in mine:
                assert mine[name] == pytest.approx(their[name], rel=rel, abs=1e-4), (name, mine["step"])


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_rows_that_pad_the_vocabulary_take_no_part(workplace, reference):
    model, tokenizer = minillm.load("base")
    padded = minillm.Transformer(dataclasses.replace(model.config, vocab_multiple=64))
    with torch.no_grad():
        for name, weight in padded.named_parameters():
            weight[: len(model.get_parameter(name))] = model.get_parameter(name)
    minillm.save(padded, tokenizer, "padded")
    for base in ("base", "padded"):
        words = ["--model.path", base, "--dpo.reference", reference, "--train.max_steps", 2]
        assert run("--run.dir", f"runs/{base}", *words) == 0
    assert_same_run("padded", "base")


def prefer(directory, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(wiring, "peak_flops", lambda *_: 1e10)
        return run(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["--dpo.reference", "cached", "--dpo.sft_weight", "1", "--dpo.predict", "4"],
        ["--parallel.strategy", "fsdp", "--lora.r", "2", "--dpo.reference", "adapters"],
        ["--parallel.strategy", "fsdp", *KTO],
    ],
    ids=str,
)
def test_two_ranks_train_what_one_does(workplace, words):
    assert prefer(workplace, ["--run.dir", "runs/one", *words]) == 0
    assert run_ranks(2, prefer, workplace, ["--run.dir", "runs/two", *words]) == [0, 0]
    assert_same_run("two", "one")
    assert summary("one").get("exact_match") == summary("two").get("exact_match")


def test_the_embedded_pairs_are_learned_without_a_word(workplace, capsys, monkeypatch):
    """As after `python sft.py`, but for a smaller model, and fewer of them."""
    monkeypatch.setattr(stories, "N_PAIRS", 400)
    monkeypatch.setattr(stories, "N_HELD_OUT", 20)
    minillm.save(*minillm.load("base"), "runs/quickstart-sft")
    end = ["--train.max_steps", "2", "--dpo.predict", "6", "--log.curves", "false"]
    assert run_command(dpo.main, [*end, "--model.max_seq_len", "400", "--dpo.template", "plain"]) == 0
    assert "unknown" in summary("quickstart-dpo")["exact_match"]["files"]["after"]
    capsys.readouterr()
    assert run_command(cli.dispatch, ["data", "inspect", "runs/quickstart-dpo", "--step", "2", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "   prompt  <s>" in shown
    assert "   chosen  ⟦ " in shown
    assert " rejected  ⟦ " in shown


def test_every_command_reads_what_was_trained(workplace, capsys):
    assert run(*KTO, "--train.max_steps", 2) == 0
    for verb in (
        ["data", "inspect", "runs/tuned", "--step", "2", "--rows", "1"],
        ["generate", "runs/tuned", "--prompt", "0?", "--max_new_tokens", "4"],
        ["plan", "runs/tuned/config.json", "--gpus", "1"],
    ):
        capsys.readouterr()
        assert run_command(cli.dispatch, verb) == 0
        assert capsys.readouterr().out


def test_help_explains_every_field(capsys):
    assert run_command(dpo.main, ["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("dpo.loss", "dpo.beta", "dpo.reference", "dpo.template", "lora.r", "data.columns", "model.path"):
        assert f"--{name}\n" in text


# --- references and losses --------------------------------------------------------------------------------------------


def test_every_kind_of_reference_gives_the_same_run(workplace):
    for kind in ("cached", "frozen", "adapters"):
        assert run("--run.dir", f"runs/{kind}", "--dpo.reference", kind, "--lora.r", 2) == 0
    for kind in ("cached", "frozen"):
        assert_same_run(kind, "adapters")


def test_a_cached_reference_is_computed_in_the_precision_of_the_run(workplace):
    assert run(*ONE_STEP, "--dpo.reference", "cached", "--train.precision", "bf16") == 0
    assert read_metrics(Path("runs/tuned/metrics.jsonl"))[0]["kl"] < 1e-9


def test_a_run_whose_reference_has_changed_fails(workplace, monkeypatch):
    fit = Trainer.fit

    def careless(self):
        next(iter(self.objective.reference.copies.values())).add_(1)
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", careless)
    with pytest.raises(RuntimeError, match="the reference has changed"):
        run(*ONE_STEP, "--dpo.reference", "frozen")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], "frozen"),
        (["--lora.r", 2], "adapters"),
        (["--data.max_samples", 8, "--train.max_steps", 2], "cached"),
        (["--dpo.loss", "orpo"], "auto"),
    ],
    ids=str,
)
def test_the_cheapest_reference_is_chosen(workplace, words, kind):
    assert run(*ONE_STEP, *words) == 0
    assert json.loads(Path("runs/tuned/config.json").read_text())["dpo"]["reference"] == kind


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "kto"])
def test_every_loss_of_pairs_trains(workplace, loss):
    assert run("--dpo.loss", loss, "--train.max_steps", 6, "--train.eval_every", 6) == 0
    first, *_, last = read_metrics(Path("runs/tuned/metrics.jsonl"))
    assert last["margin"] > first["margin"]
    assert ("reference_logprobs_chosen" in first) == ("kl" in first) == LOSSES[loss].reference
    assert ("sft_loss" in first) == bool(LOSSES[loss].sft_weight)


@pytest.mark.parametrize("words", [KTO, ["--dpo.loss", "kto"]], ids=["labels", "pairs"])
def test_answers_are_learned_one_by_one(workplace, capsys, words):
    assert run(*words, *ASKED, "--train.max_steps", 20, "--train.eval_every", 20, "--optim.warmup_steps", 2) == 0
    first, *_, last = read_metrics(Path("runs/tuned/metrics.jsonl"))
    assert last["val_margin"] == pytest.approx(last["val_rewards_chosen"] - last["val_rewards_rejected"], rel=1e-4)
    assert first["kl"] == first["kto_kl"] == 0 < last["kl"]
    assert not {"preference_accuracy", "ranking_accuracy"} & last.keys(), "nothing says which answers belong together"
    found = summary()
    assert (found["margin"]["before"], found["label_accuracy"]["before"]) == (0, 0.5)
    assert found["margin"]["after"] > 0.1
    assert found["label_accuracy"]["after"] > 0.7
    for name in ("rewards_chosen", "rewards_rejected", "kl"):
        assert found[name] == {"before": 0, "after": last[f"val_{name}"]}
    assert found["exact_match"].keys() >= {"before", "after"}
    shown = capsys.readouterr().out
    for line in ("answers rewarded as labelled", "reward of a chosen answer", "margin between the rewards"):
        assert line in shown


def test_held_out_answers_of_one_kind_are_summed_up_without_a_margin(workplace, capsys):
    good = [json.loads(line) for line in Path("labels.jsonl").read_text().splitlines()][:8:2]
    assert all(row["label"] for row in good)
    write_rows("held_labels.jsonl", good)
    assert run(*KTO, "--train.max_steps", 3) == 0
    found, shown = summary(), capsys.readouterr().out
    assert set(found["rewards_chosen"]) == set(found["label_accuracy"]) == {"before", "after"}
    assert not {"rewards_rejected", "margin"} & found.keys()
    assert "reward of a chosen answer" in shown
    assert "reward of a rejected answer" not in shown
    assert "margin between" not in shown


@pytest.mark.parametrize(("prompts", "said"), [(["0?"], 96), (["0?", "1?"], 0)])
def test_that_the_kl_of_kto_cannot_be_measured_is_said_each_time(workplace, capsys, prompts, said):
    rows = [json.loads(line) for line in Path("labels.jsonl").read_text().splitlines()]
    for name, read in (("labels", rows), ("held_labels", rows[:4])):
        asked = ["0?", "1?"] if name == "held_labels" else prompts
        write_rows(f"{name}.jsonl", [row | {"prompt": asked[i % len(asked)]} for i, row in enumerate(read)])
    for name in ("one", "other"):
        assert run(*KTO, "--run.dir", f"runs/{name}", "--train.max_steps", 2) == 0
        words = f"{said} of 100 answers stand in files that ask one thing alone"
        assert (words in capsys.readouterr().err) == bool(said)
    assert read_metrics(Path("runs/one/metrics.jsonl"))[-1]["kl"] > 0


# --- stopped and continued --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--dpo.reference", "cached", "--dpo.sft_weight", 0.5],
        ["--dpo.reference", "adapters", "--lora.r", 2, "--lora.dropout", 0.1],
        ["--dpo.reference", "frozen", "--lora.r", 2, "--lora.modules_to_save", "norm"],
        KTO,
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_bitwise(workplace, words):
    assert run(*words) == 0
    assert run_command(dpo.main, ["--run.dir", "runs/on", "--run.resume", MIDDLE]) == 0
    assert losses("runs/on") == losses("runs/tuned")[3:]
    assert same(weights("runs/on"), weights("runs/tuned"))


def test_falling_answers_are_reported_of_a_run_that_was_stopped_before(workplace, capsys):
    assert run("--train.max_steps", 6) == 0
    metrics = Path("runs/tuned/metrics.jsonl")
    write_rows(metrics, [row | {"logprobs_chosen": row["logprobs_chosen"] - 50} for row in read_metrics(metrics)])
    assert again("tuned", "auto", "--train.max_steps", 10) == 0
    assert "yet the chosen answers become less likely" in capsys.readouterr().err


def test_a_run_that_is_stopped_while_it_answers_answers_when_it_goes_on(workplace, monkeypatch):
    assert run("--run.dir", "runs/whole", *ASKED) == 0
    answer = dpo.answer_held_out

    def stopped(now, *arguments):
        if now == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        answer(now, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "answer_held_out", stopped)
        with pytest.raises(SystemExit) as stop:
            run(*ASKED)
    assert stop.value.code == 0
    for _ in range(2):  # the second time there is nothing to do
        assert run("--run.resume", "auto") == 0
        for name in ("exact_match", "preference_accuracy", "kl", "win_rate", "answer_length"):
            assert summary()[name] == summary("whole")[name]
        assert losses("runs/tuned") == losses("runs/whole")


def test_a_signal_ends_the_step_and_the_run_goes_on(workplace, monkeypatch):
    assert run("--run.dir", "runs/whole") == 0
    step = Trainer.step

    def stopped(self):
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert run() == 0
    assert summary()["finished"] is False
    assert run("--run.resume", "auto") == 0
    assert losses("runs/tuned") == losses("runs/whole")
    assert summary()["preference_accuracy"] == summary("whole")["preference_accuracy"]


def test_adapters_are_trained_and_saved_alone(workplace):
    assert run("--lora.r", 2, "--lora.targets", "attn") == 0
    newest = checkpoint.latest(Path("runs/tuned/checkpoints"))
    names = checkpoint.describe(checkpoint.read(newest)[1], skip=checkpoint.OPTIM)
    assert names
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)
    tuned, base = weights("runs/tuned"), weights("base")
    assert all(torch.equal(tuned[name], base[name]) for name in base)
    assert len(adapted(minillm.load("runs/tuned")[0])) == 8


@pytest.mark.parametrize("words", [["--dpo.loss", "orpo"], ["--dpo.reference", "cached"]], ids=str)
def test_a_run_that_needs_the_model_no_more_goes_on_without_it(workplace, words):
    assert run(*ONE_STEP, *words) == 0
    Path("base").rename("moved")
    assert again("tuned", "auto", "--train.max_steps", 2) == 0
    assert [row["step"] for row in losses("runs/tuned")] == [1, 2]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["--dpo.reference", "frozen"], []),
        (["--lora.r", 2], []),
        (["--dpo.loss", "orpo"], ["--dpo.loss", "dpo", "--dpo.reference", "cached"]),
    ],
    ids=str,
)
def test_a_run_that_needs_the_model_says_so(workplace, capsys, words, more):
    assert run(*ONE_STEP, *words) == 0
    Path("base").rename("moved")
    line = failure(capsys, again, "tuned", "auto", "--train.max_steps", 8, *more)
    assert line.startswith("error: model.path: the weights that the run begins with are needed: ")


def test_patience_keeps_the_best_step(workplace):
    assert run("--train.patience", 1, "--train.eval_every", 1, "--optim.lr", 0.1, "--train.max_steps", 30) == 0
    found = summary()
    assert found["stopped_by"] == "train.patience"
    assert minillm.load("runs/tuned", step=found["best_step"])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def write_wrong():
    """Preferences with which something is wrong, and a model without its tokenizer."""
    shutil.copytree("base", "bare")
    Path("bare/tokenizer.json").unlink()
    row = {"prompt": "0?", "chosen": "red", "rejected": "blue"}
    write_rows("halves.jsonl", [row, {name: row[name] for name in ("prompt", "chosen")}])
    write_rows("unasked.jsonl", [{"chosen": "red", "rejected": "blue"}])
    write_rows("alike.jsonl", [row | {"rejected": "red"}] * 4)
    write_rows("one.jsonl", [row | {"rejected": "red"}])
    write_rows("silent.jsonl", [row | {"rejected": ""}] * 4)
    write_rows("unsure.jsonl", [{"prompt": "0?", "completion": "red", "label": "perhaps"}])
    write_rows("talk.jsonl", [{"prompt": "0?", "response": "red"}])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.path", "runs/quickstart-sft"], "there is no runs/quickstart-sft yet; run `python sft.py` first"),
        (["--model.path", "nowhere"], "model.path: nowhere"),
        (["--model.path", "bare"], "model.path: no tokenizer is beside bare"),
        (["--data.path", "nothing.json"], "nothing.json"),
        (["--data.path", "halves.jsonl"], 'halves.jsonl:2: field "rejected" is missing (found: prompt, chosen)'),
        (["--data.path", "unasked.jsonl"], "unasked.jsonl:1: "),
        (["--data.path", "held.jsonl"], "data.path: no preferences besides those of data.val; the dataset is empty"),
        (["--data.path", "alike.jsonl"], "none is left for train, 4 have equal answers"),
        (["--data.path", "one.jsonl", "--data.val", 0.5], "1 have equal answers\n"),  # and not: is held out
        (["--data.path", "silent.jsonl"], "none is left for train, 4 have an empty answer"),
        (["--data.path", "labels.jsonl"], "labels.jsonl:1: one answer with a label; the loss compares two"),
        (["--data.path", "talk.jsonl"], "talk.jsonl:1: "),
        (["--dpo.loss", "kto", "--data.path", "talk.jsonl"], "talk.jsonl:1: "),
        (["--dpo.loss", "kto", "--data.path", "unsure.jsonl"], "'perhaps'; true or false is expected"),
        (["--data.seq_len", 8], "data.path: of 100 preferences none is left for train, "),
        (["--data.seq_len", 100, "--train.batch_tokens", 200], "data.seq_len: 100 is longer than model.max_seq_len 64"),
        (["--dpo.template", "llama-3"], "dpo.template: the tokenizer has no <|begin_of_text|>"),
        (["--dpo.reference", "adapters"], "dpo.reference: there are no adapters to leave out; give lora.r"),
        (["--dpo.reference", "cached", "--dpo.loss", "orpo"], "dpo.reference: the loss orpo has none"),
        (["--dpo.gamma", 1], "dpo.gamma: has no effect on the loss dpo"),
        (["--dpo.loss", "kto", "--dpo.label_smoothing", 0.1], "dpo.label_smoothing: has no effect on the loss kto"),
        (["--dpo.loss", "dop"], "dpo.loss is 'dop' (did you mean dpo?)"),
        (["--dpo.beta", 0], "dpo.beta is 0.0; it must be > 0"),
        (["--train.z_loss", 0.1], "train.z_loss: is of the loss of the next token"),
        (["--dpo.frozen", "embed", "--lora.r", 2], "dpo.frozen: with adapters"),
        (["--dpo.metrics", "exactmatch"], "did you mean exact_match?"),
        (["--dpo.betta", 3], "did you mean dpo.beta"),
        (["--sft.template", "chatml"], "did you mean dpo.template?"),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_one_line(workplace, capsys, words, said):
    write_wrong()
    line = failure(capsys, run, *words)
    assert said in line
    assert line.count("\n") == 1
    assert not Path("runs/tuned/config.json").exists()


def test_a_model_keeps_the_template_that_it_was_taught(workplace, capsys):
    assert run(*ONE_STEP, "--dpo.template", "plain") == 0
    on = ["--model.path", "runs/tuned", "--run.dir", "runs/on", *ONE_STEP]
    line = failure(capsys, run, *on, "--dpo.template", "chatml")
    assert "dpo.template: chatml is given, but the model was taught plain; leave it out" in line
    assert run(*on) == 0
    assert json.loads(Path("runs/on/config.json").read_text())["dpo"]["template"] == "plain"


def test_a_run_that_goes_on_prefers_the_same_in_the_same_way(workplace, capsys):
    assert run(*ONE_STEP) == 0
    write_rows("other.jsonl", [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()[1:]])
    for words, said in (
        (["--dpo.beta", 0.2], "dpo.beta was 0.1, is 0.2"),
        (["--dpo.sft_weight", 2], "dpo.sft_weight was 0.2, is 2.0"),
        (["--dpo.label_smoothing", 0.1], "dpo.label_smoothing was 0.0, is 0.1"),
        (["--dpo.loss", "hinge"], "dpo.loss was dpo, is hinge"),
        (["--data.path", "other.jsonl"], "data_hash was"),
    ):
        line = failure(capsys, again, "tuned", "auto", "--train.max_steps", 8, *words)
        assert "another run than the one to be continued" in line
        assert said in line


@pytest.mark.parametrize(
    ("words", "usual"),
    [
        (["--lora.r", 2], ["--dpo.beta", 0.1, "--dpo.sft_weight", 0.2, "--dpo.label_smoothing", 0, "--lora.alpha", 4]),
        (["--dpo.loss", "simpo"], ["--dpo.beta", 2, "--dpo.gamma", 1]),
    ],
    ids=str,
)
def test_a_run_goes_on_when_it_is_told_what_was_usual_anyway(workplace, words, usual):
    assert run(*ONE_STEP, *words) == 0
    assert again("tuned", "auto", "--train.max_steps", 2, *usual) == 0
    assert [row["step"] for row in losses("runs/tuned")] == [1, 2]


def other_weights():
    """Another model in the place of the one that runs start from."""
    model, tokenizer = minillm.load("base")
    with torch.no_grad():
        model.norm.weight.mul_(2)
    shutil.rmtree("base")
    minillm.save(model, tokenizer, "base")


def test_a_run_does_not_go_on_beside_another_reference(workplace, capsys):
    assert run(*ONE_STEP, "--dpo.reference", "cached") == 0
    other_weights()
    assert "sha256 was" in failure(capsys, again, "tuned", "auto", "--train.max_steps", 8)


def test_what_was_cached_of_other_weights_or_data_is_said_and_computed_anew(workplace, capsys):
    def said(name):
        capsys.readouterr()
        assert run("--run.dir", f"runs/{name}", "--dpo.reference", "cached", *ONE_STEP) == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("reference: ")]

    (first,) = said("first")
    assert "none is kept for this model and data; computing" in first
    assert said("second") == []
    other_weights()
    third, kept = said("third")
    assert "bytes made for other runs are beside it" in kept
    assert "is of other weights); computing" in third
    assert losses("runs/third")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    write_rows("pairs.jsonl", [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()[1:]])
    (fourth,) = said("fourth")
    assert "none is kept for this model and data; computing" in fourth
