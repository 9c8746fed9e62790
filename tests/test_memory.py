"""The memory of training by estimate is that which is measured, and what is advised where it is wanting does run."""

import os
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from live import held_bytes, measured_peaks
from ranks import run_ranks

from minillm.distributed.config import Layout
from minillm.log import OutOfMemory, memory_explained
from minillm.lora import LoRAConfig, add_adapters
from minillm.memory import Setting, alternatives, estimate, memory_advice, usable
from minillm.model.config import ModelConfig
from minillm.model.presets import preset
from minillm.model.transformer import Transformer
from minillm.optim import OptimConfig, build_optimizer, optimizer_tensors

ROOT = Path(__file__).parent.parent
SHAPE = {"vocab_size": 1000, "dim": 64, "n_layers": 4, "n_heads": 4, "ffn_dim": 172, "max_seq_len": 512}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "ffn_dim": 256}


@pytest.mark.parametrize(
    ("shape", "setting"),
    [
        ({}, {}),
        ({}, {"seq_len": 512}),
        ({"n_kv_heads": 2}, {}),
        ({"qk_norm": True, "head_dim": 64}, {}),
        (GPT2, {}),
        ({"mlp": "geglu"}, {}),
        ({"mlp": "relu2"}, {}),
        ({"dropout": 0.1}, {}),
        ({"tie_embeddings": False, "vocab_size": 8000}, {}),
        ({"vocab_size": 8000}, {"accumulates": True}),
        ({"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 16}),
        ({"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 128, "accumulates": True}),
        ({"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 16, "precision": "bf16"}),
        ({"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 64, "precision": "bf16", "accumulates": True}),
        ({}, {"activation_checkpointing": "selective"}),
        ({"n_layers": 12}, {"activation_checkpointing": "full"}),
        ({}, {"precision": "bf16"}),
        (GPT2, {"precision": "bf16"}),
        ({}, {"precision": "bf16", "activation_checkpointing": "selective"}),
        ({}, {"precision": "bf16", "activation_checkpointing": "full"}),
    ],
)
def test_the_estimate_is_within_a_tenth_of_what_is_measured(shape, setting):
    config = ModelConfig(**{**SHAPE, **shape})
    setting, optim = Setting(**{"rows": 2, "seq_len": 256, **setting}), OptimConfig(lr=1e-3)
    (measured,) = measured_peaks([(config, optim, setting)])
    within = 0.1 if setting.seq_len == 512 else 0.05  # attention in slices keeps masks, which are not counted
    assert estimate(config, optim, setting).peak == pytest.approx(measured, rel=within)


def lower_half(model):
    """The embeddings and the lower half of the blocks stay as they are."""
    for module in (model.embed, *model.blocks[: len(model.blocks) // 2]):
        module.requires_grad_(False)


def head_frozen(model):
    model.lm_head.requires_grad_(False)


def adapters(**fields):
    return partial(add_adapters, config=LoRAConfig(**{"r": 8, **fields}))


@pytest.mark.parametrize(
    ("adapt", "shape", "setting"),
    [
        (lower_half, {}, {}),
        (lower_half, {"tie_embeddings": False}, {"precision": "bf16"}),
        (head_frozen, {"tie_embeddings": False, "vocab_size": 8000}, {}),
        (adapters(), {}, {}),
        (adapters(), {"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 32}),
        (adapters(), {"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 64, "accumulates": True}),
        (adapters(base_precision="bf16"), {"dim": 256, "ffn_dim": 688}, {"rows": 1, "seq_len": 32}),
        (adapters(), {}, {"precision": "bf16", "seq_len": 64}),
        (adapters(), {}, {"activation_checkpointing": "full"}),
        (adapters(dropout=0.1), {}, {}),
        (adapters(modules_to_save=["embed"]), {"vocab_size": 8000}, {}),
    ],
)
def test_what_is_frozen_takes_no_more_than_its_weights(adapt, shape, setting):
    config = ModelConfig(**{**SHAPE, **shape})
    setting, optim = Setting(**{"rows": 2, "seq_len": 256, "adapt": adapt, **setting}), OptimConfig(lr=1e-3)
    (measured,) = measured_peaks([(config, optim, setting)])
    assert estimate(config, optim, setting).peak == pytest.approx(measured, rel=0.1)


WIDE = {"dim": 256, "ffn_dim": 688}
UNTIED = {"tie_embeddings": False, "vocab_size": 8000}
ONE_ROW = {"rows": 1, "seq_len": 16}
LAYOUTS = {
    Layout("ddp", 2, 1, 1): [(WIDE, ONE_ROW), (WIDE, {"rows": 1, "seq_len": 64, "accumulates": True})],
    Layout("fsdp", 1, 2, 1): [
        ({}, {}),
        (WIDE, ONE_ROW | {"precision": "bf16"}),
        (WIDE, ONE_ROW | {"reshard_after_forward": False}),
        (WIDE, {"rows": 1, "seq_len": 64, "accumulates": True}),
        (UNTIED, ONE_ROW),
        (WIDE, ONE_ROW | {"adapt": adapters()}),
    ],
    Layout("fsdp", 1, 4, 1): [({"n_layers": 6}, {"activation_checkpointing": "full", "rows": 1})],
    Layout("hsdp", 2, 2, 1): [(UNTIED, ONE_ROW | {"accumulates": True})],
    Layout("ddp", 1, 1, 2): [(UNTIED, ONE_ROW), (WIDE, ONE_ROW | {"precision": "bf16"})],
    Layout("fsdp", 1, 2, 2): [(WIDE, ONE_ROW)],
}


def layout_id(layout):
    return f"{layout.strategy}-{layout.dp_replicate}-{layout.dp_shard}-{layout.tp}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_the_estimate_of_a_rank_is_within_a_tenth_of_what_is_measured(layout):
    cases = [
        (ModelConfig(**{**SHAPE, **shape}), OptimConfig(lr=1e-3), Setting(**{"rows": 2, "seq_len": 256, **setting}))
        for shape, setting in LAYOUTS[layout]
    ]
    ranks = run_ranks(layout.dp_replicate * layout.dp_shard * layout.tp, measured_peaks, cases, layout)
    for case, *measured in zip(cases, *ranks):
        assert estimate(*case, layout).peak == pytest.approx(max(measured), rel=0.1), case


@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen2.5-0.5b", Layout("fsdp", 1, 24, 1)), ("llama3-70b", Layout("hsdp", 8, 64, 2))],  # 24 divides nothing there
    ids=["uneven", "large"],
)
def test_what_a_rank_of_many_holds_is_known_to_the_byte(name, layout):
    config, optim = preset(name, n_layers=1), OptimConfig(lr=1e-3)
    found = estimate(config, optim, Setting(rows=1, seq_len=8), layout)
    (held,) = run_ranks(1, held_bytes, config, optim, layout)  # in a process that may have a group of its own
    assert (found.weights, found.gradients, found.moments) == held


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_moments_are_those_of_the_optimizer(name):
    config, optim = ModelConfig(**SHAPE), OptimConfig(name=name, lr=1e-3)
    model = Transformer(config)
    tensors = optimizer_tensors(build_optimizer(model, optim), dict(model.named_parameters()))
    bytes_held = sum(tensor.nbytes for tensor in tensors.values())
    assert estimate(config, optim, Setting(rows=1, seq_len=8)).moments == bytes_held


def test_the_advice_changes_the_least_that_fits():
    config, optim, setting = ModelConfig(**SHAPE), OptimConfig(lr=1e-3), Setting(rows=16, seq_len=256)

    def peak(rows, **changes):
        return estimate(config, optim, Setting(rows=rows, seq_len=256, accumulates=True, **changes)).peak

    def advised(room):
        free = next(free for free in range(10**8, 10**9, 10**4) if usable(free, "cpu") >= room)
        return memory_advice(config, optim, setting, free).partition("what would fit: ")[2].partition(" (")[0]

    assert advised(peak(5) + 10**5) == "--train.micro_batch_size 5"
    mode = advised(peak(1) - 10**5)
    assert "--train.activation_checkpointing selective" in mode
    rows = int(mode.split()[1])
    selective = {"activation_checkpointing": "selective"}
    assert peak(rows, **selective) < peak(1) < peak(rows + 1, **selective)
    assert "--optim.name muon" in advised(peak(1, activation_checkpointing="full") - 10**5)
    nothing = memory_advice(config, optim, setting, 10**8)
    assert "no setting fits" in nothing
    assert "model.dim" in nothing


def test_what_failed_is_not_advised_again():
    """Also where by estimate it should have fitted: other processes take memory, too."""
    setting = Setting(rows=4, seq_len=256)
    assert all(smaller != setting for _, smaller, _ in alternatives(setting, OptimConfig(name="muon")))
    assert "--train.micro_batch_size 3 " in memory_advice(ModelConfig(**SHAPE), OptimConfig(), setting, 2**40)


def test_what_filled_the_memory_is_free_when_advice_is_asked_for():
    """The frames of the error hold it, and the advice builds a model, if only of shapes."""
    filled = []

    def fill():
        tensor = torch.zeros(1)
        filled.append(weakref.ref(tensor))
        raise MemoryError

    with pytest.raises(OutOfMemory, match="free: True"), memory_explained(lambda: f"free: {filled[0]() is None}"):
        fill()


LIMITED = """
import resource, sys
from pathlib import Path
import train
from minillm.log import run_command
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
sys.exit(run_command(train.main, sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to set a limit")
def test_a_run_that_lacks_memory_says_what_would_fit_and_that_does(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"the {i}th line of some text\n" for i in range(900)))
    options = """--tokenizer.kind byte --data.path text.txt --data.seq_len 256 --data.packing false --data.val 0.1
        --model.dim 64 --model.n_layers 12 --model.n_heads 4 --model.ffn_dim 176 --model.max_seq_len 256
        --optim.name adamw --optim.lr 1e-3 --train.max_steps 1 --train.batch_tokens 16384 --train.micro_batch_size 64
        --log.samples 0 --log.curves false --run.resume auto --run.dir run""".split()

    def run(*more):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-c", LIMITED, *options, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    failed = run()
    assert failed.returncode == 1, failed.stderr
    (line,) = re.findall("^error: .*$", failed.stderr, re.M)
    assert re.match(r"error: out of memory \(\d+ bytes more were needed\); by estimate training takes [\d.]+ GiB", line)
    advised = re.search(r"what would fit: (.*) \(", line)[1]
    assert re.fullmatch(r"--train\.micro_batch_size \d+", advised)
    fits = run(*advised.split())
    assert fits.returncode == 0, fits.stderr
