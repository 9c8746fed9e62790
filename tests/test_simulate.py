"""`minillm plan`: what it suggests can be trained with, and what it says is what the parts of the package say."""

import json

import pytest
import torch

import train
from minillm import cli
from minillm.config import build, file_layer
from minillm.distributed.config import layout
from minillm.log import run_command
from minillm.memory import GIB
from minillm.model.presets import preset
from minillm.model.transformer import Transformer
from minillm.plan import count_parameters, flops_per_token
from minillm.recipe import read_layers
from minillm.simulate import Plan, simulate

CONFIG = """
[model]
dim = 2048
n_layers = 22
n_heads = 32
n_kv_heads = 4
ffn_dim = 5632
max_seq_len = 2048
[tokenizer]
vocab_size = 32000
[data]
seq_len = 2048
[train]
batch_tokens = 2_097_152
max_tokens = 22_000_000_000
precision = "bf16"
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def planned(*words):
    return simulate(build(Plan, read_layers(Plan, [str(word) for word in words])))


def test_a_config_of_train_is_a_config_of_plan():
    assert not set(train.Config.__dataclass_fields__) - set(Plan.__dataclass_fields__)


@pytest.mark.parametrize(("gpus", "memory"), [(1, 24), (8, 6), (64, 24), (512, 80)])
def test_what_is_suggested_is_a_config_of_train(config, tmp_path, gpus, memory):
    best = planned(config, "--gpus", gpus, "--gpu_memory", memory)["suggested"]
    (tmp_path / "suggested.toml").write_text(best["toml"])
    made = build(train.Config, [file_layer(config), file_layer(tmp_path / "suggested.toml")])
    shape = layout(made.parallel, gpus, made.parallel.strategy, ranks_per_node=8)
    assert (shape.dp_replicate, shape.dp_shard, shape.tp) == (best["dp_replicate"], best["dp_shard"], best["tp"])
    assert made.train.micro_batch_size == best["micro_batch_size"]
    assert best["memory"]["peak"] <= memory * GIB


def test_less_memory_is_never_faster(config):
    seconds = [planned(config, "--gpus", 8, "--gpu_memory", size)["suggested"]["step_seconds"] for size in (6, 12, 79)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_time_and_cost_are_operations_by_what_a_gpu_does(config):
    found = planned(config, "--gpus", 1, "--gpu_memory", 1000, "--mfu", 0.5, "--peak_flops", 1e15, "--price", 3)
    best, model = found["suggested"], build(Plan, read_layers(Plan, [str(config)])).model.to_config(vocab_size=32_000)
    flops = flops_per_token(model, 2048) * 2_097_152
    assert best["activation_checkpointing"] == "none"
    assert best["sent_bytes"] == 0
    assert best["step_seconds"] == pytest.approx(flops / 0.5e15)
    assert found["steps"] == -(-22_000_000_000 // 2_097_152)
    assert best["cost"] == pytest.approx(3 * best["step_seconds"] * found["steps"] / 3600)


def test_adapters_take_less_of_everything():
    words = ["--model.preset", "llama2-7b", "--model.n_layers", 8, "--gpus", 8, "--train.micro_batch_size", 1]
    words += ["--parallel.strategy", "fsdp"]
    whole, adapters = planned(*words), planned(*words, "--lora.r", 16)
    assert 0.66 < adapters["flops_per_token"] / whole["flops_per_token"] < 0.7
    ours, theirs = (
        next(one for one in found["layouts"] if one["name"] == "fsdp 8 ZeRO-3") for found in (adapters, whole)
    )
    assert ours["memory"]["weights"] == pytest.approx(theirs["memory"]["weights"], rel=0.01)
    for part in ("gradients", "moments"):
        assert ours["memory"][part] < 0.01 * theirs["memory"][part]
    assert ours["sent_bytes"] < 0.7 * theirs["sent_bytes"]
    assert {one["tp"] for one in adapters["layouts"]} == {1}


@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_frozen_weights_have_no_gradients_and_no_moments(config, section):
    words = "--gpus 1 --gpu_memory 1000 --train.micro_batch_size 1 --optim.name adamw".split()
    whole, frozen = planned(config, *words), planned(config, *words, f"--{section}.frozen", "embed,blocks.1?.*")
    with torch.device("meta"):
        model = Transformer(build(Plan, read_layers(Plan, [str(config)])).model.to_config(vocab_size=32_000))
    trained = sum(p.numel() for block in (*model.blocks[:10], *model.blocks[20:]) for p in block.parameters())
    trained += model.norm.weight.numel()  # the head is tied to what is frozen
    ours, theirs = (found["layouts"][0]["memory"] for found in (frozen, whole))
    assert (ours["weights"], ours["gradients"]) == (theirs["weights"], 4 * trained)
    assert ours["moments"] == pytest.approx(8 * trained, rel=1e-4)
    assert ours["peak"] < theirs["peak"]
    assert frozen["flops_per_token"] < whole["flops_per_token"]
    assert frozen["suggested"]["step_seconds"] < whole["suggested"]["step_seconds"]


def test_without_an_end_the_tokens_are_those_of_hoffmann():
    found = planned("--model.preset", "llama2-7b", "--gpus", 64)
    assert found["tokens"] == round(found["optimal_tokens"]["hoffmann"])
    assert found["tokens"] / count_parameters(preset("llama2-7b")).total == pytest.approx(20.5, abs=0.3)
    assert any("seq_len" in said for said in found["assumed"])


def test_what_is_sent_is_what_the_collectives_send(config):
    words = "--gpus 8 --train.micro_batch_size 8 --parallel.tp 1".split()
    found = {
        one["name"]: one for one in planned(config, *words)["layouts"] if one["activation_checkpointing"] == "none"
    }
    P, R = 1_034_512_384, 2048 * 32_000 + 2048  # tied; the root's part is the table and the last norm
    assert found["ddp"]["sent_bytes"] == round(2 * 4 * P * 7 / 8)
    m = 1024 // (8 * 8)
    kept, freed = (round(m * (4 * P + 4 * R + times * 2 * (P - R)) * 7 / 8) for times in (1, 2))
    assert found["fsdp 8 ZeRO-2"]["sent_bytes"] == kept
    assert found["fsdp 8 ZeRO-3"]["sent_bytes"] == freed


def test_a_frozen_reference_is_a_copy_and_a_forward_more(config):
    words = "--gpus 8 --train.micro_batch_size 8 --parallel.strategy fsdp --parallel.tp 1".split()
    cached, frozen = (planned(config, *words, "--dpo.reference", kind)["layouts"] for kind in ("cached", "frozen"))
    for one, other in zip(cached, frozen):
        copy = other["memory"]["weights"] - one["memory"]["weights"]
        assert copy == one["memory"]["weights"] == other["memory"]["peak"] - one["memory"]["peak"]
        assert other["step_seconds"] > one["step_seconds"]


def test_what_is_given_is_kept(config):
    words = ["--gpus", 16, "--parallel.strategy", "hsdp", "--parallel.dp_shard", 4, "--train.micro_batch_size", 2]
    found = planned(config, *words, "--train.activation_checkpointing", "full")["layouts"]
    kept = {
        (one["strategy"], one["dp_shard"], one["micro_batch_size"], one["activation_checkpointing"]) for one in found
    }
    assert kept == {("hsdp", 4, 2, "full")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", 12], "gpus: 12 do not fill nodes of 8"),
        (["--gpus", 0], "gpus is 0; it must be >= 1"),
        (["--gpu", "H10"], "gpu: H10 is not known"),
        (["--gpus", 1024, "--train.batch_tokens", 2048], "share 1 sequences a step"),
        (["--gpus", 8, "--parallel.tp", 3], "parallel.tp: 3 does not divide"),
        (["--gpus", 8, "--parallel.strategy", "fsdp", "--parallel.dp_shard", 3], "dp_shard 3"),
        (["--tokenizer.vocab_size", "none"], "tokenizer.vocab_size: a plan needs to know it"),
        (["--data.seq_len", 4096], "longer than model.max_seq_len"),
        (["--sft.frozen", "blocks.99.*"], "sft.frozen: 'blocks.99.*' fits no weight"),
    ],
)
def test_what_cannot_be_is_one_clear_line(config, capsys, words, message):
    assert run_command(cli.dispatch, ["plan", str(config), *map(str, words)]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_verb_prints_tables_or_json(config, capsys):
    words = ["plan", str(config), "--gpus", "64", "--gpu_memory", "24"]
    assert run_command(cli.dispatch, words) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("ZeRO-3", "Kaplan", "[parallel]", "micro_batch_size", "GPU hours"))
    assert run_command(cli.dispatch, [*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["suggested"]["toml"] in said


def test_where_nothing_fits_that_is_said(config, capsys):
    assert run_command(cli.dispatch, ["plan", str(config), "--gpus", "1", "--gpu_memory", "4"]) == 0
    said = capsys.readouterr().out
    assert "nothing fits: the least takes" in said
    assert "[parallel]" not in said
