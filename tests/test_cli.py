"""Each verb of `minillm` does what it says, and says what is wrong in one line."""

import json
import random
import re

import pytest
import torch

import train
from minillm import SamplingParams, cli, generate
from minillm.load import load
from minillm.log import run_command
from minillm.quantize import is_quantized

CONFIG = """
[run]
dir = "run"
[tokenizer]
vocab_size = 300
[data]
path = "rows.jsonl"
seq_len = 16
val = 0.1
[model]
dim = 16
n_layers = 1
n_heads = 2
max_seq_len = 48
[optim]
lr = 1e-3
[train]
max_steps = 3
batch_tokens = 64
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch, known_peak):
    """A directory with a few rows of text."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    rows = [" ".join(words.choices("a red blue cat dog ran sat under the old hill".split(), k=9)) for _ in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def run_dir(workplace):
    """A short run."""
    assert run_command(train.main, ["config.toml"]) == 0
    return workplace / "run"


def minillm(*words):
    return run_command(cli.dispatch, [str(word) for word in words])


def failure(capsys, *words):
    capsys.readouterr()
    assert minillm(*words) == 1
    return capsys.readouterr().err


def test_the_verbs_are_listed(capsys):
    assert minillm() == minillm("--help") == 0
    text = capsys.readouterr().out
    assert all(f"minillm {verb} " in text for verb in cli.VERBS)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_each_verb_lists_its_options(capsys, verb):
    assert minillm(*verb.split(), "--help") == 0
    assert f"usage: minillm {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_refused_with_the_list(capsys):
    assert "minillm tokeniser: there is no such verb" in failure(capsys, "tokeniser")


def test_a_misspelt_option_names_the_nearest(capsys):
    assert "temprature is not a field; did you mean temperature?" in failure(capsys, "generate", "x", "--temprature", 1)


def test_a_word_too_many_is_refused(capsys):
    assert "'b' is not expected" in failure(capsys, "generate", "a", "b")


def test_a_tokenizer_is_trained_and_described(workplace, capsys):
    assert minillm("tokenizer", "train", "tok", "--data.path", "rows.jsonl", "--tokenizer.vocab_size", 310) == 0
    assert minillm("tokenizer", "info", "tok") == 0
    assert "bpe" in capsys.readouterr().out


def test_a_tokenizer_is_measured_beside_another(workplace, capsys):
    assert minillm("tokenizer", "train", "tok", "--data.path", "rows.jsonl", "--tokenizer.vocab_size", 310) == 0
    assert minillm("tokenizer", "train", "bytes", "--tokenizer.kind", "byte") == 0
    (workplace / "zh.txt").write_text("母鸡跑回家了。")
    capsys.readouterr()
    assert minillm("tokenizer", "eval", "tok", "--data.path", "rows.jsonl,zh.txt", "--against", "bytes") == 0
    said = capsys.readouterr().out
    for expected in ("bpe, 310 ids", "byte, 272 ids", "rows.jsonl", "zh.txt", "Latin", "Han", "round trip      exact"):
        assert expected in said


@pytest.mark.parametrize(("make", "what"), [("mkdir", "not empty"), ("write_text", "a file")])
def test_a_tokenizer_is_not_trained_for_a_folder_that_cannot_take_it(workplace, capsys, monkeypatch, make, what):
    monkeypatch.setattr(cli.tokenizer, "train_tokenizer", None)
    out = workplace / "tok"
    if make == "mkdir":
        (out / "inside").mkdir(parents=True)
    else:
        out.write_text("")
    words = ["tokenizer", "train", "tok", "--data.path", "rows.jsonl"]
    assert f"out: tok is {what}; choose another folder" in failure(capsys, *words)


def test_a_long_text_is_measured_exactly(workplace, capsys):
    """Also where it is read in pieces."""
    text = "one red hen\n" * 5000
    (workplace / "long.txt").write_text(text)
    assert minillm("tokenizer", "train", "tok", "--tokenizer.kind", "byte") == 0
    capsys.readouterr()
    assert minillm("tokenizer", "eval", "tok", "--data.path", "long.txt") == 0
    assert f"{len(text):,} bytes, {len(text):,} characters, {len(text):,} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "taken", "refused"),
    [
        ("data clean", {"path", "document", "text_field", "workers"}, "data.weights"),
        ("tokenizer eval", {"path", "document", "text_field", "cache_dir"}, "data.val"),
        ("tokenizer train", {"path", "document", "text_field", "cache_dir"}, "data.seq_len"),
    ],
)
def test_a_verb_takes_only_the_fields_of_data_that_it_uses(capsys, verb, taken, refused):
    assert minillm(*verb.split(), "--help") == 0
    assert set(re.findall(r"--data\.(\w+)", capsys.readouterr().out.partition("\n")[2])) == taken
    message = failure(capsys, *verb.split(), "out", "--data.path", "rows.jsonl", f"--{refused}", "1")
    assert f"command line: {refused} is not a field" in message


def test_no_text_is_nothing_to_measure(workplace, capsys):
    (workplace / "empty.txt").write_text("")
    assert minillm("tokenizer", "train", "tok", "--data.path", "rows.jsonl", "--tokenizer.kind", "byte") == 0
    message = failure(capsys, "tokenizer", "eval", "tok", "--data.path", "empty.txt")
    assert "data.path: no text in empty.txt, so there is nothing to measure" in message


def test_the_field_of_a_text_to_be_measured_can_be_chosen(workplace, capsys):
    """As the error for a row without the usual one says."""
    (workplace / "bodies.jsonl").write_text('{"body": "one red hen"}\n')
    assert minillm("tokenizer", "train", "tok", "--tokenizer.kind", "byte") == 0
    words = ["tokenizer", "eval", "tok", "--data.path", "bodies.jsonl"]
    assert "set data.text_field" in failure(capsys, *words)
    assert minillm(*words, "--data.text_field", "body") == 0
    assert "11 tokens" in capsys.readouterr().out


def test_data_is_prepared_once_and_described(workplace, capsys):
    words = ["--data.path", "rows.jsonl", "--tokenizer.kind", "byte"]
    assert minillm("data", "prepare", *words) == 0
    directory = capsys.readouterr().out.splitlines()[0]
    before = {path.name: path.stat().st_mtime_ns for path in (workplace / directory).iterdir()}
    assert minillm("data", "prepare", *words) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (workplace / directory).iterdir()} == before
    assert minillm("data", "info", directory, "--verify") == 0
    assert "300" not in failure(capsys, "data", "info", "nowhere")


def test_inspect_shows_the_documents_that_a_step_trained_on(workplace, run_dir, capsys):
    capsys.readouterr()
    assert minillm("data", "inspect", run_dir, "--step", 2, "--rows", 2) == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line)["text"] for line in (workplace / "rows.jsonl").read_text().splitlines()]
    assert shown.count("sample ") == 2
    assert shown.startswith("sample 4:")
    numbers = [int(line.split("rows.jsonl:")[1].split()[0]) for line in shown.splitlines() if "rows.jsonl:" in line]
    assert numbers
    assert any(lines[numbers[0] - 1].split()[k] in shown for k in range(3))


def test_inspect_refuses_a_step_that_was_not_made_and_text_that_changed(workplace, run_dir, capsys):
    assert "has made 3 steps, so there is no step 4" in failure(capsys, "data", "inspect", run_dir, "--step", 4)
    with open("rows.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert "is no longer that of the run" in failure(capsys, "data", "inspect", run_dir)


@pytest.mark.parametrize("log_every", [1, 2, 10])
def test_inspect_follows_a_run_whose_batches_changed(workplace, capsys, log_every):
    """Also where the change fell between two rows of metrics that the settings ask for."""
    assert run_command(train.main, ["config.toml", "--log.every", str(log_every)]) == 0
    words = ["--run.dir", "run", "--run.resume", "auto", "--train.max_steps", "5", "--train.batch_tokens", "128"]
    assert run_command(train.main, words) == 0
    samples = {}
    for step in range(1, 6):
        capsys.readouterr()
        assert minillm("data", "inspect", "run", "--step", step, "--rows", 99) == 0
        lines = capsys.readouterr().out.splitlines()
        samples[step] = [
            int(line.split(":")[0].removeprefix("sample ")) for line in lines if line.startswith("sample ")
        ]
    sizes = {1: (0, 4), 2: (4, 8), 3: (8, 12), 4: (12, 20), 5: (20, 28)}
    assert samples == {step: list(range(*size)) for step, size in sizes.items()}


def test_inspect_refuses_to_guess_where_the_batch_changed(run_dir, capsys):
    rows = [{"step": 2, "tokens": 128}, {"step": 5, "tokens": 128 + 64 + 2 * 128}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "does not say where between steps 2 and 5 the batch changed" in failure(
        capsys, "data", "inspect", run_dir, "--step", 4
    )


def test_generation_continues_the_prompt_and_repeats_under_a_seed(run_dir, capsys):
    words = ["generate", run_dir, "--prompt", "the cat", "--max_new_tokens", 12, "--seed", 3]
    capsys.readouterr()
    assert minillm(*words) == 0
    first = capsys.readouterr().out
    assert minillm(*words) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("the cat")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", -1], "temperature"),
        (["--top_p", 0], "top_p"),
        (["--max_new_tokens", 500], "48"),
        (["--prompt", "a cat " * 100], "48"),
        (["--step", 77], "77"),
        (["--logprobs", 2], "give --json with them"),
    ],
)
def test_impossible_generation_is_refused_before_any_text(run_dir, capsys, words, message):
    capsys.readouterr()
    assert minillm("generate", run_dir, *words) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_text_is_generated_from_weights_of_the_dtype_that_is_asked_for(run_dir, capsys):
    expected = generate(*load(run_dir, dtype=torch.bfloat16), "the cat", SamplingParams(max_new_tokens=8, seed=3))
    words = ["--prompt", "the cat", "--max_new_tokens", 8, "--seed", 3, "--dtype", "bf16", "--json"]
    capsys.readouterr()
    assert minillm("generate", run_dir, *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["tokens"], told["cumulative_logprob"]) == (expected.tokens, expected.cumulative_logprob)


@pytest.mark.parametrize(
    "fields",
    [{"n": 3, "seed": 3}, {"best_of": 3, "seed": 3}, {"use_beam_search": True, "num_beams": 3, "n": 2}],
    ids=["samples", "best", "beams"],
)
def test_several_completions_are_made_where_they_are_asked_for(run_dir, capsys, fields):
    given = {"max_new_tokens": 8, **fields}
    words = ["--prompt", "the cat", *(word for name, value in given.items() for word in (f"--{name}", value))]
    expected = generate(*load(run_dir), "the cat", SamplingParams(logprobs=2, **given))
    expected = expected if "n" in fields else [expected]
    capsys.readouterr()
    assert minillm("generate", run_dir, *words) == 0
    assert capsys.readouterr().out == "".join(f"the cat{one.text}\n" for one in expected)
    assert minillm("generate", run_dir, *words, "--json", "--logprobs", 2) == 0
    for row, one in zip(map(json.loads, capsys.readouterr().out.splitlines()), expected, strict=True):
        assert [row["text"], row["tokens"], row["finish_reason"]] == [one.text, one.tokens, one.finish_reason]
        assert row["cumulative_logprob"] == one.cumulative_logprob
        assert [len(token["alternatives"]) for token in row["logprobs"]] == [2] * len(one.tokens)


def test_an_exported_model_is_that_of_the_run(run_dir, workplace, capsys):
    assert minillm("export", run_dir, "out") == 0
    assert "MB; minillm.load('out') reads it" in capsys.readouterr().out
    said = []
    for path in (run_dir, "out"):
        assert minillm("generate", path, "--prompt", "the cat", "--max_new_tokens", 12, "--seed", 3) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "out: out is not empty" in failure(capsys, "export", run_dir, "out")


def test_an_exported_model_in_int8_generates(run_dir, workplace, capsys):
    assert minillm("export", run_dir, "out", "--quantize", "int8") == 0
    assert is_quantized(load("out")[0])
    capsys.readouterr()
    assert minillm("generate", "out", "--prompt", "the cat", "--max_new_tokens", 5) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert "quantize" in failure(capsys, "export", run_dir, "other", "--quantize", "int4")


def test_a_directory_that_is_no_run_is_named(workplace, capsys):
    (workplace / "empty").mkdir()
    assert "empty" in failure(capsys, "generate", "empty")
    assert "not a run directory" in failure(capsys, "data", "inspect", "empty")


def test_generation_runs_without_gradients(run_dir):
    assert torch.is_grad_enabled()
    assert minillm("generate", run_dir, "--max_new_tokens", 2) == 0
    assert torch.is_grad_enabled()
