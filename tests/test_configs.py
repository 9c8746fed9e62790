"""Every config of configs/ is what it says it is: it builds, has the published size, and trains when it is shrunk."""

import importlib.util
import random
import typing
from pathlib import Path

import pytest

import train
from minillm.config import build, file_layer
from minillm.log import read_metrics, run_command
from minillm.model.config import ModelSection
from minillm.optim import OPTIMIZERS
from minillm.optim.config import OptimizerName
from minillm.plan import count_parameters
from minillm.recipe import read_layers

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.toml") if not path.name.startswith(("sft-", "dpo-")))
# name -> (tokens of the vocabulary, parameters as published)
PUBLISHED = {
    "gpt2-124m.toml": (50_257, 124_439_808),
    "base-26m-zh-en.toml": (6400, 25_829_888),
    "llama-1b.toml": (32_000, 1_100_048_384),
    "olmo-1b.toml": (50_280, 1_176_764_416),
}
UNPADDED = {"gpt2-124m.toml": 47 * 768}  # rows that are there for speed alone and not counted in the publication
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": "none", "head_dim": "none", "ffn_dim": 64}


def built(name: str) -> train.Config:
    return build(train.Config, read_layers(train.Config, [str(CONFIGS / name)]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_as_many_parameters_as_are_published(name):
    vocab_size, parameters = PUBLISHED[name]
    config = built(name)
    assert config.tokenizer.vocab_size == vocab_size
    total = count_parameters(config.model.to_config(vocab_size=vocab_size)).total
    assert total - UNPADDED.get(name, 0) == parameters
    assert config.data.seq_len == config.model.max_seq_len


@pytest.fixture
def text(tmp_path, monkeypatch, known_peak):
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(
        "the a cat dog sat ran on under mat hill and then it slept 山 水 花".split(), k=6000
    )
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, 6000, 12)))
    return tmp_path


@pytest.mark.parametrize("name", [name for name in NAMES if name != "continue.toml"])
def test_a_config_trains_when_it_is_shrunk(name, text):
    """On any machine: only sizes are changed, and what takes minutes to start."""
    values = {f"model.{key}": value for key, value in SHAPE.items()}
    values |= {"model.max_seq_len": 32, "data.seq_len": 32, "data.path": "text.txt", "data.document": "line"}
    values |= {"train.batch_tokens": 64, "train.micro_batch_size": 2, "train.max_steps": 2, "log.samples": 0}
    values |= {"train.precision": "fp32", "train.compile": "false", "run.dir": "runs/shrunk"}
    if file_layer(CONFIGS / name).values.get("tokenizer.kind", "bpe") == "bpe":
        values["tokenizer.vocab_size"] = 300
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert run_command(train.main, [str(CONFIGS / name), *words]) == 0
    assert read_metrics(Path("runs/shrunk/metrics.jsonl"))[-1]["step"] == 2


def test_the_recipe_to_go_on_takes_a_trained_model_to_new_text(text):
    small = ["--data.path", "text.txt", "--data.document", "line", "--train.batch_tokens", "64", "--log.samples", "0"]
    shape = [word for key, value in SHAPE.items() for word in (f"--model.{key}", str(value))]
    old = [*small, *shape, "--data.seq_len", "32", "--train.max_steps", "2", "--tokenizer.kind", "byte"]
    assert run_command(train.main, [*old, "--run.dir", "runs/old", "--optim.lr", "1e-2"]) == 0
    recipe = [str(CONFIGS / "continue.toml"), *small, "--model.path", "runs/old", "--train.max_steps", "100"]
    assert run_command(train.main, [*recipe, "--optim.lr", "1e-3", "--log.every", "1"]) == 0
    rates = [row["lr"] for row in read_metrics(Path("runs/continued/metrics.jsonl"))]
    assert rates[0] < rates[1] == max(rates) == 1e-3  # a hundredth of 100 steps of warm-up
    assert rates[-1] < 1e-6


# --- ablations --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ablations():
    spec = importlib.util.spec_from_file_location("ablate", CONFIGS.parent / "benchmarks" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    paths = sorted((CONFIGS / "ablations").glob("*.toml"))
    return {path.stem: module.read_ablation(path) for path in paths if path.stem != "base"}


def test_every_variant_of_every_ablation_is_a_config(ablations):
    for ablation in ablations.values():
        for variant in ablation.variants:
            words = [word for name, value in variant.items() for word in (f"--{name}", str(value))]
            build(train.Config, read_layers(train.Config, [str(ablation.base), *words]))


def test_every_optimizer_is_compared_at_several_learning_rates(ablations):
    variants = ablations["optimizers"].variants
    assert set(typing.get_args(OptimizerName)) == OPTIMIZERS.keys()
    for name in OPTIMIZERS:
        rates = {(one["optim.lr"], one.get("optim.muon_lr")) for one in variants if one["optim.name"] == name}
        assert len(rates) >= 3, name


def test_deep_and_wide_have_equally_many_parameters_in_their_blocks(ablations):
    base = file_layer(ablations["depth_width"].base).values
    counts = set()
    for variant in ablations["depth_width"].variants:
        values = {name: value for name, value in (base | variant).items() if name.startswith("model.")}
        section = ModelSection(**{name.removeprefix("model."): value for name, value in values.items()})
        counted = count_parameters(section.to_config(vocab_size=1024))
        counts.add(counted.matmul - 1024 * section.dim)
    assert max(counts) / min(counts) < 1.01
