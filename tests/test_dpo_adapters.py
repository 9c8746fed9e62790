"""`python dpo.py` from a run that has adapters goes on with them; what they were then is what it is compared with."""

import math

import pytest
import torch
from tuned import WORDS, question, write_base, write_rows

import dpo
import minillm
import sft
from minillm.load import adapters_in, find_checkpoint
from minillm.log import read_metrics, run_command

RUN = "--run.device cpu --data.seq_len 64 --data.val 0.1 --train.batch_tokens 256 --optim.lr 1e-2 --log.curves false"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model that knows nothing, a run with adapters on it, and pairs."""
    folder = tmp_path_factory.mktemp("workplace")
    write_base(folder)
    rows = [{"question": question(i), "answer": WORDS[i % 4]} for i in range(80)]
    pairs = [{"prompt": one["question"], "chosen": one["answer"], "rejected": "no"} for one in rows]
    write_rows(folder / "chats.jsonl", rows)
    write_rows(folder / "pairs.jsonl", pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("minillm.recipe.wiring.peak_flops", lambda *_: 1e10)
        tune(sft, "base", "chats", "tuned", "--lora.r 4 --lora.targets attn --train.max_steps 4")
        yield folder


def rows_of(run):
    return read_metrics(f"{run}/metrics.jsonl")


def tune(script, model, data, run, options):
    words = f"--model.path {model} --data.path {data}.jsonl --run.dir {run} {RUN} {options}".split()
    assert run_command(script.main, words) == 0


@pytest.mark.parametrize("reference", ["cached", "adapters"])
def test_adapters_go_on_and_are_compared_with_what_they_were(workplace, reference):
    directory = f"preferring-{reference}"
    tune(dpo, "tuned", "pairs", directory, f"--dpo.reference {reference} --train.max_steps 4 --train.save_every 2")
    rows = rows_of(directory)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows[-1]["margin"] > 0.01
    there = adapters_in(find_checkpoint(workplace / directory))
    assert there.base_path == str(workplace / "base")
    assert (there.config.r, there.config.targets) == (4, ["attn"])
    begun, (model, _) = minillm.load("tuned")[0], minillm.load(directory)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, begun.get_parameter(name))}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_run_that_goes_on_is_compared_with_the_same(workplace):
    """Its adapters are no longer those that it began with."""
    options = "--dpo.reference adapters --train.save_every 2"
    tune(dpo, "tuned", "pairs", "whole", f"{options} --train.max_steps 4")
    tune(
        dpo, "tuned", "pairs", "parts", f"{options} --train.max_steps 2 --train.eval_every 4 --optim.schedule constant"
    )
    tune(dpo, "tuned", "pairs", "parts", f"{options} --train.max_steps 4 --run.resume auto --optim.schedule constant")
    rows = rows_of("parts")
    for name in ("reference_logprobs_chosen", "reference_logprobs_rejected"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in rows_of("whole")], rel=1e-5)


def test_other_adapters_are_refused(workplace, capsys):
    words = f"--model.path tuned --data.path pairs.jsonl --run.dir other {RUN} --lora.r 2 --train.max_steps 1".split()
    assert run_command(dpo.main, words) == 1
    assert "has adapters of another kind: lora.r 4, not 2" in capsys.readouterr().err
