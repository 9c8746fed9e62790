"""`python sft.py` from a model and a file of conversations to answers: complete, repeatable, clear about mistakes."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tuned import WORDS, config_of, question, same, weights, write_base, write_rows
from watched import failure, losses

import minillm
import sft
from minillm import checkpoint, cli
from minillm.data.batch import Batch
from minillm.data.config import ConversationsConfig
from minillm.data.corpus import with_questions
from minillm.log import read_metrics, run_command
from minillm.lora import LoRAConfig, adapted, add_adapters
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken, NoisyNextToken
from minillm.plan import flops_per_token
from minillm.recipe import wiring

SMALL = config_of("chats.jsonl", "[sft]\npredict = 4\npredict_tokens = 8")


def write_all(directory):
    """A model that knows nothing, questions of four kinds with one answer each, and a config."""
    write_base(directory)
    rows = [{"question": question(i), "answer": WORDS[i % 4]} for i in range(160)]
    write_rows(directory / "chats.jsonl", rows)
    write_rows(directory / "held.jsonl", rows[:4])
    (directory / "small.toml").write_text(SMALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, known_peak):
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    return tmp_path


def run(*words):
    return run_command(sft.main, ["small.toml", *map(str, words)])


def test_a_run_leaves_everything_that_it_promises(workplace, capsys):
    assert run() == 0
    shown = capsys.readouterr().out
    directory = workplace / "runs" / "tuned"
    rows = losses(directory)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    summary = json.loads((directory / "summary.json").read_text())
    assert set(summary["exact_match"]) == {"before", "after", "majority", "files"}
    assert summary["exact_match"]["majority"] == 0.25
    assert summary["exact_match"]["files"]["after"] == {"held": summary["exact_match"]["after"]}
    answered = [json.loads(line) for line in (directory / "predictions" / "after.jsonl").read_text().splitlines()]
    assert [one["expected"] for one in answered] == list(WORDS)
    assert "exact match on 4 held-out questions" in shown
    assert "minillm chat runs/tuned" in shown
    config = json.loads((directory / "config.json").read_text())
    assert config["sft"]["template"] == "chatml"
    assert run_command(sft.main, ["runs/tuned/config.json", "--run.dir", "runs/again"]) == 0
    assert losses("runs/again") == losses(directory)


def test_answers_are_learned_and_how_many_is_measured(workplace):
    assert run("--train.max_steps", 60, "--train.eval_every", 60, "--optim.warmup_steps", 5) == 0
    found = json.loads(Path("runs/tuned/summary.json").read_text())["exact_match"]
    assert (found["before"], found["after"]) == (0, 1)


def test_the_loss_does_not_depend_on_how_a_step_is_divided(workplace):
    for rows in (1, 2, 4):
        assert run("--run.dir", f"runs/{rows}", "--train.micro_batch_size", rows, "--sft.predict", 0) == 0
    whole = losses("runs/4")
    for rows in (1, 2):
        for ours, theirs in zip(losses(f"runs/{rows}"), whole):
            assert ours == pytest.approx({key: theirs[key] for key in ours}, rel=1e-4)  # cut, it generates nothing


def tune(directory, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(wiring, "peak_flops", lambda *_: 1e10)
        return run_command(sft.main, ["small.toml", *words])


LORA = ["--lora.r", "2"]


@pytest.mark.parametrize(
    ("words", "cut"),
    [([], []), (LORA, ["--parallel.strategy", "fsdp"]), ([], ["--parallel.tp", "2"])],
    ids=str,
)
def test_two_ranks_train_what_one_does(workplace, words, cut):
    assert tune(workplace, ["--run.dir", "runs/one", *words]) == 0
    assert run_ranks(2, tune, workplace, ["--run.dir", "runs/two", *words, *cut]) == [0, 0]
    for ours, theirs in zip(losses("runs/two"), losses("runs/one")):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = (json.loads(Path(f"runs/{name}/summary.json").read_text()) for name in ("one", "two"))
    assert one["exact_match"] == two["exact_match"]
    for when in ("before", "after"):  # cut weights are gathered
        kept = [Path(f"runs/{name}/predictions/{when}.jsonl").read_text() for name in ("one", "two")]
        assert kept[0] == kept[1]
        assert len(kept[0].splitlines()) == 4


@pytest.mark.parametrize("words", [[], ["--sft.neftune", 5], ["--lora.r", 2, "--lora.dropout", 0.1]], ids=str)
def test_a_stopped_run_goes_on_bitwise(workplace, words):
    assert run(*words) == 0
    middle = "runs/tuned/checkpoints/step-00000003"
    assert run_command(sft.main, ["--run.dir", "runs/on", "--run.resume", middle]) == 0
    assert losses("runs/on") == losses("runs/tuned")[3:]
    assert same(weights("runs/on"), weights("runs/tuned"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_stopped_while_it_answers_answers_when_it_goes_on(workplace, monkeypatch, when):
    assert run("--run.dir", "runs/whole") == 0
    answer = sft.answer_held_out

    def stopped(now, *arguments):
        if now == when:
            os.kill(os.getpid(), signal.SIGTERM)
        answer(now, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "answer_held_out", stopped)
        with pytest.raises(SystemExit) as stop:
            run()
    assert stop.value.code == 0
    assert not Path("runs/tuned/predictions", f"{when}.jsonl").exists()
    for _ in range(2):  # the second time there is nothing to do
        assert run("--run.resume", "auto") == 0
        whole, tuned = (json.loads(Path(f"runs/{name}/summary.json").read_text()) for name in ("whole", "tuned"))
        assert tuned["exact_match"] == whole["exact_match"]
        assert losses("runs/tuned") == losses("runs/whole")


def test_a_stop_while_evaluating_does_not_wait_for_answers(workplace, monkeypatch):
    assert run("--run.dir", "runs/whole") == 0
    evaluate, answer, evaluated, answered = wiring.evaluate, sft.answer_some, [], []

    def stopped(*arguments):
        figures = evaluate(*arguments)
        evaluated.append(figures)
        if len(evaluated) == 2:  # once before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return figures

    def counted(*arguments):
        answered.append(len(evaluated))
        return answer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(wiring, "evaluate", stopped)
        patch.setattr(sft, "answer_some", counted)
        assert run() == 0
    assert answered == [1]
    assert run("--run.resume", "auto") == 0
    assert losses("runs/tuned") == losses("runs/whole")


def test_adapters_are_trained_and_saved_alone(workplace):
    assert run("--lora.r", 2, "--lora.targets", "attn") == 0
    newest = checkpoint.latest(Path("runs/tuned/checkpoints"))
    names = checkpoint.describe(checkpoint.read(newest)[1], skip=checkpoint.OPTIM)
    assert names
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)
    tuned, base = weights("runs/tuned"), weights("base")
    assert all(torch.equal(tuned[name], base[name]) for name in base)
    assert len(adapted(minillm.load("runs/tuned")[0])) == 8
    row = read_metrics(Path("runs/tuned/metrics.jsonl"))[-1]
    shape = minillm.load("base")[0].config
    flops = flops_per_token(shape, 64, partial(add_adapters, config=LoRAConfig(r=2, targets=["attn"])))
    assert row["mfu"] * 1e10 / row["tokens_per_second"] == pytest.approx(flops, rel=0.05)
    assert flops < 0.85 * flops_per_token(shape, 64)


def test_a_run_with_adapters_is_gone_on_from_by_them(workplace, capsys):
    assert run("--lora.r", 2, "--optim.lr", 0.05) == 0
    assert run("--model.path", "runs/tuned", "--run.dir", "runs/on") == 0
    assert json.loads(Path("runs/on/config.json").read_text())["lora"]["r"] == 2
    ended, began = (
        Path(f"runs/{path}.jsonl").read_text() for path in ("tuned/predictions/after", "on/predictions/before")
    )
    assert began == ended
    tuned, base = minillm.load("runs/on")[0].state_dict(), weights("base")
    assert all(torch.equal(tuned[name], base[name]) for name in base)
    for words in (["--lora.r", 4], ["--lora.r", 0]):
        assert "minillm merge" in failure(capsys, run, "--model.path", "runs/tuned", "--run.dir", "runs/other", *words)


@pytest.mark.parametrize(("words", "lr"), [([], 1e-3), (["--lora.r", 4], 1e-2), (["--optim.lr", 0.5], 0.5)], ids=str)
def test_what_is_left_open_is_chosen_for_the_model(workplace, words, lr):
    given = ["--model.path", "base", "--data.path", "chats.jsonl", "--run.dir", "runs/chosen"]
    options = ["--train.max_steps", 1, "--log.curves", "false"]
    assert run_command(sft.main, [*map(str, [*given, *options, *words])]) == 0
    config = json.loads(Path("runs/chosen/config.json").read_text())
    assert (config["optim"]["lr"], config["data"]["seq_len"]) == (lr, 64)


def given(path, *words):
    """`sft.py` told no more than where things are."""
    options = ["--model.path", "base", "--data.path", path, "--run.device", "cpu", "--log.curves", "false"]
    return run_command(sft.main, [*options, *map(str, words)])


@pytest.mark.parametrize(
    ("count", "words", "rows"),
    [
        (3, [], 1),
        (1, ["--data.val", 0], 1),
        (160, ["--data.max_samples", 5], 1),
        (3, ["--train.batch_tokens", 32], 1),
        (1000, [], 4),
    ],
    ids=str,
)
def test_a_file_however_small_trains(workplace, count, words, rows):
    lines = Path("chats.jsonl").read_text().splitlines() * (1 + count // 160)
    Path("few.jsonl").write_text("\n".join(lines[:count]))
    assert given("few.jsonl", "--run.dir", "runs/few", *words, *["--train.max_steps", 2]) == 0
    config = json.loads(Path("runs/few/config.json").read_text())
    assert config["train"]["batch_tokens"] == rows * config["data"]["seq_len"]
    assert len(losses("runs/few")) > 0


def test_a_step_that_is_larger_than_the_data_is_named(workplace, capsys):
    Path("few.jsonl").write_text("".join(Path("chats.jsonl").read_text().splitlines(keepends=True)[:3]))
    assert given("few.jsonl", "--run.dir", "runs/few", "--train.batch_tokens", 640, "--data.seq_len", 64) == 1
    assert "one step takes 10 rows: give more text, or lower train.batch_tokens from 640" in capsys.readouterr().err
    Path("one.jsonl").write_text(Path("few.jsonl").read_text().splitlines()[0])
    assert given("one.jsonl", "--run.dir", "runs/one") == 1
    assert "none is left for train: all is held out; --data.val 0 holds nothing out" in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    assert run_command(sft.main, ["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("sft.template", "sft.neftune", "lora.r", "data.columns", "model.path", "train.max_steps"):
        assert f"--{name}\n" in text


def test_the_embedded_questions_are_learned_without_a_word(workplace, capsys):
    """As after `python train.py`, but for a model that is smaller than its configuration was made for."""
    minillm.save(*minillm.load("base"), "runs/quickstart")
    end = ["--train.max_steps", "2", "--sft.predict", "6", "--log.curves", "false"]
    config = ["--model.max_seq_len", "400"]  # a story in bytes
    assert run_command(sft.main, [*end, *config]) == 0
    found = json.loads(Path("runs/quickstart-sft/summary.json").read_text())["exact_match"]
    assert set(found["files"]["after"]) == {"recall", "reading", "counting"}
    assert set(found["files"]["majority"]) == set(found["files"]["before"])
    capsys.readouterr()
    assert run_command(cli.dispatch, ["data", "inspect", "runs/quickstart-sft", "--step", "2", "--rows", "1"]) == 0
    assert "⟦ " in capsys.readouterr().out, "an answer begins with a space, as in the stories"


def test_a_full_run_goes_on_without_the_model_that_it_began_with(workplace):
    assert run() == 0
    Path("base").rename("moved")
    again = ["--run.dir", "runs/tuned", "--run.resume", "auto", "--train.max_steps", "8"]
    assert run_command(sft.main, again) == 0
    assert [row["step"] for row in losses("runs/tuned")] == list(range(1, 9))


def test_frozen_weights_stay_as_they_are(workplace):
    assert run("--sft.frozen", "embed,blocks.0.*") == 0
    tuned, base = weights("runs/tuned"), weights("base")
    kept = {name for name in base if torch.equal(tuned[name], base[name])}
    assert kept == {name for name in base if name.startswith(("embed.", "blocks.0.", "lm_head"))}  # tied to embed


# --- noise on embeddings ----------------------------------------------------------------------------------------------


class Embeds(torch.nn.Module):
    """A model that ends with its embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 8)

    def forward(self, tokens, positions, doc_ids, head):
        self.seen = self.embed(tokens)
        return self.seen.sum()


def test_noise_is_uniform_and_smaller_in_longer_documents():
    torch.manual_seed(0)
    model, alpha = Embeds(), 5.0
    tokens = torch.zeros(1, 400, dtype=torch.int64)
    doc_ids = torch.cat([torch.zeros(1, 100), torch.ones(1, 300)], dim=1).long()
    with torch.no_grad():
        NoisyNextToken(alpha=alpha)(model, Batch(tokens, tokens, None, doc_ids))
        noise = model.seen - model.embed(tokens)
    for part, length in ((noise[:, :100], 100), (noise[:, 100:], 300)):
        limit = alpha / math.sqrt(length * 8)
        assert 0.99 * limit < part.abs().max() <= limit * (1 + 1e-5)
        assert part.std() == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_noise_is_in_training_alone_and_leaves_nothing_behind():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=16, dim=32, n_layers=1, n_heads=2, ffn_dim=32, max_seq_len=16)
    model = Transformer(config)
    batch = Batch(torch.arange(8)[None], torch.arange(1, 9)[None])
    plain, noisy = NextToken(16), NoisyNextToken(16, alpha=5.0)
    assert not torch.equal(noisy(model, batch)[0], plain(model, batch)[0])
    assert torch.equal(plain(model, batch)[0], plain(model, batch)[0])
    model.eval()
    assert torch.equal(noisy(model, batch)[0], plain(model, batch)[0])


def test_noise_changes_what_is_trained(workplace):
    assert run() == run("--sft.neftune", 5, "--run.dir", "runs/noisy") == 0
    assert losses("runs/noisy")[0]["loss"] != losses("runs/tuned")[0]["loss"]


# --- the embedded questions -------------------------------------------------------------------------------------------


def test_the_embedded_questions_hold_out_what_is_asked_of_three_families(tmp_path):
    data = with_questions(ConversationsConfig(cache_dir=str(tmp_path)))
    read = {path.stem: path.read_text().splitlines() for path in [Path(data.path), *Path(data.val).iterdir()]}
    learned = set(read.pop("train"))
    assert set(read) == {"recall", "reading", "counting"}
    for rows in read.values():
        assert not learned & set(rows)
        answers = [json.loads(row)["answer"] for row in rows]
        assert max(map(answers.count, answers)) <= 0.2 * len(answers)
    assert with_questions(data) == data


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.path", "runs/quickstart"], "there is no runs/quickstart yet; run `python train.py` first"),
        (["--model.path", "nowhere"], "model.path: nowhere"),
        (["--data.path", "nothing.json"], "nothing.json"),
        (["--model.dim", 64], "model.dim: 64 is given, but base has 32"),
        (["--sft.template", "llama-3"], "sft.template: the tokenizer has no <|begin_of_text|>"),
        (["--sft.template", "chatlm"], "chatml"),
        (["--sft.frozen", "blocks.7.*"], "sft.frozen: 'blocks.7.*' fits no weight"),
        (["--sft.frozen", "*"], "nothing is left to train"),
        (["--sft.frozen", "embed", "--lora.r", 2], "leave one of them out"),
        (["--lora.r", 2, "--lora.targets", "q_prj"], "lora.targets: 'q_prj' fits nothing; did you mean q_proj?"),
        (["--sft.train_on", "all"], "predict: with train_on all"),
        (["--sft.metrics", "exactmatch"], "metrics: 'exactmatch' is not known; did you mean exact_match?"),
        (["--sft.neftune", -1], "sft.neftune"),
        (["--data.seq_len", 100], "data.seq_len: 100 is longer than model.max_seq_len 64"),
        (["--sft.predicted", 3], "did you mean sft.predict"),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_one_line(workplace, capsys, words, said):
    line = failure(capsys, run, *words)
    assert said in line
    assert not Path("runs/tuned/config.json").exists()


def test_adapters_of_another_base_are_not_continued(workplace, capsys):
    assert run("--lora.r", 2) == 0
    model, tokenizer = minillm.load("base")
    with torch.no_grad():
        model.norm.weight.mul_(2)
    minillm.save(model, tokenizer, "other")
    Path("base").rename("moved")
    Path("other").rename("base")
    words = ["--run.dir", "runs/tuned", "--run.resume", "auto", "--train.max_steps", "8"]
    capsys.readouterr()
    assert run_command(sft.main, words) == 1
    assert "another run than the one to be continued: base_sha256" in capsys.readouterr().err
