"""The benchmarks compare like with like; shapes and figures here are too small to say anything about speed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import minillm
from minillm.data.stories import questions
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")
# litgpt needs an environment of its own, so that it is no peer in the usual one
PEERS = ["transformers", "litgpt"] if importlib.util.find_spec("litgpt") else ["transformers"]


@pytest.fixture(scope="module")
def train_step():
    sys.path.insert(0, str(BENCHMARKS))  # where a process that the benchmark starts looks for it, too
    try:
        import train_step

        yield train_step
    finally:
        sys.path.remove(str(BENCHMARKS))


def rows(printed: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_trains_the_same_shape_on_the_same_targets(train_step, name, peer):
    pytest.importorskip(peer, reason=f"{peer} is not installed")
    shape = train_step.SHAPES[name]
    torch.manual_seed(0)
    ours, theirs = (train_step.CONTENDERS[library](shape, CPU, False) for library in ("minillm", peer))
    no_positions = shape.T * shape.model.dim if (name, peer) == ("gpt2-tiny", "litgpt") else 0
    assert theirs.parameters == ours.parameters - no_positions

    batch = train_step.random_batch(shape, 0, CPU)
    batch = batch._replace(targets=torch.full_like(batch.targets, 7))  # learned only by who is given the targets
    for contender in (ours, theirs):
        losses = [contender.step(batch) for _ in range(20)]
        train_step.check_loss(contender, losses[0], shape)
        assert losses[-1] < losses[0] - 0.4


def test_ratios_are_medians_over_rounds_of_times_within_a_round(train_step, monkeypatch, capsys):
    seconds = iter([1, 2, 2, 2, 4, 16])  # minillm and its peer, three rounds
    monkeypatch.setattr(train_step, "timed", lambda *_: train_step.Seconds(s := next(seconds), s / 2))
    peer = {"math": lambda *arguments: train_step.minillm_step(*arguments)._replace(name="math")}
    monkeypatch.setattr(train_step, "CONTENDERS", {"minillm": train_step.minillm_step} | peer)
    train_step.main(["--shapes", "llama-tiny", "--threads", "1", "--rounds", "3", "--warmup", "1"])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    tokens = 2 * 16
    assert [row[2:] for row in rows(printed)] == [
        ["minillm", "73,248", f"{tokens / 2:,.0f}", "1.00", "1.00"],
        ["math", "73,248", f"{tokens / 2:,.0f}", "2.00", "2.00"],
    ]


def test_a_peer_that_is_missing_is_named_and_left_out(train_step, capsys):
    assert train_step.importable(["minillm", "no_such_library"]) == ["minillm"]
    assert "no_such_library is left out" in capsys.readouterr().out


def test_memory_is_what_steps_add_to_what_was_there(train_step, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "memory_now", lambda device: 500_000_000)
    monkeypatch.setattr(train_step, "peak_memory", lambda device: 700_000_000)
    monkeypatch.setattr(train_step, "in_fresh_process", lambda function: function())
    monkeypatch.setattr(train_step, "importable", lambda names: ["minillm"])
    train_step.main(["--memory", "--shapes", "llama-tiny", "--threads", "1"])
    assert rows(capsys.readouterr().out) == [["llama-tiny", "minillm", "73,248", "0", "1", "199", "200", "1.00"]]


def test_a_loss_that_is_not_that_of_random_tokens_is_noticed(train_step):
    shape = train_step.SHAPES["llama-tiny"]
    contender = train_step.Contender("broken", 0, lambda batch: 0.0)
    with pytest.raises(AssertionError, match="broken: the loss is 0"):
        train_step.check_loss(contender, 0.0, shape)


@pytest.fixture
def asking():
    spec = importlib.util.spec_from_file_location("asking", BENCHMARKS / "questions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tuning_on_questions_learns_the_answers_and_nothing_else(asking):
    asked, tokenizer = list(questions(0, 30)), ByteTokenizer()
    (batch,) = asking.Answers(tokenizer, asked, 1000, row=512).batches(0)
    learned = [batch.targets[row][batch.targets[row] != IGNORE_INDEX].tolist() for row in range(len(batch.targets))]
    text = tokenizer.decode([token for row in learned for token in row if token != tokenizer.eos_id])
    assert text == "".join(f" {question.answer}" for question in asked)
    assert sum(row.count(tokenizer.eos_id) for row in learned) == 30


def test_tuning_on_questions_reports_each_family(asking, tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, n_heads=2, max_seq_len=512)
    minillm.save(Transformer(config), tokenizer, tmp_path / "model")
    asking.main([str(tmp_path / "model"), "--steps", "2", "--rows", "1", "--asked", "6", "--row", "512"])
    table = rows(capsys.readouterr().out.partition("\n\n")[2])
    assert [row[0] for row in table] == ["recall", "reading", "counting"]
