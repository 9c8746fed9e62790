"""Adapters under ranks: the same run, however weights and work are divided, frozen beside trained."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from minillm.data.batch import Batch
from minillm.distributed.config import Layout
from minillm.distributed.context import connect, with_mesh
from minillm.distributed.parallelize import parallelize
from minillm.load import load, load_base, save, weights_hash
from minillm.lora import LoRAConfig, adapted, apply_lora, disabled
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer
from minillm.run import RunDirectory
from minillm.tensors import is_sharded, local_part
from minillm.trainer import TrainConfig, Trainer

V, T, ROWS, STEPS = 40, 16, 4, 6
SHAPE = {"vocab_size": V, "dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": T}
LORA = {"r": 3, "dora": True, "base_precision": "bf16"}
LAYOUTS = {"ddp": Layout("ddp", 2, 1, 1), "fsdp": Layout("fsdp", 1, 2, 1)}


class Dealt:
    """Four rows a step, a function of the cursor, dealt to ranks like cards."""

    samples_per_step, samples_per_epoch, tokens_per_step = ROWS, 100 * ROWS, ROWS * T

    def __init__(self, dist):
        self.dist = dist

    def batches(self, cursor):
        rows = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(cursor))
        rows = rows[self.dist.dp_rank :: self.dist.dp_size]
        return [Batch(rows[i : i + 1, :-1], rows[i : i + 1, 1:]) for i in range(len(rows))]


def train(directory: str, base: str, layout: Layout, resume: str | None = None) -> dict[str, float]:
    """As a recipe does it; returns what is asked of the end."""
    with connect("cpu") as dist:
        dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
        with torch.device("meta"):
            model = apply_lora(Transformer(ModelConfig(**SHAPE)), LoRAConfig(**LORA))
        called = parallelize(model, "full", dist=dist, layout=layout, init=lambda model: load_base(base, model, seed=3))
        optim = OptimConfig(lr=1e-2, grad_clip=0.5)
        trainer = Trainer(
            called,
            build_optimizer(called, optim),
            NextToken(V),
            Dealt(dist),
            TrainConfig(max_steps=STEPS, precision="fp32", save_every=3),
            steps=STEPS,
            lr_at=lambda step: optim.lr,
            dist=dist,
            grad_clip=optim.grad_clip,
            run=RunDirectory(directory),
            identity={"base_sha256": weights_hash(Path(base))},
            config_dict={"model": SHAPE, "lora": LORA},
            base_path=base,
        )
        if resume:
            trainer.resume(resume)
        summary = trainer.fit()
        held = sum(local_part(p)[0].nbytes for p in called.parameters())
        moments = sum(
            local_part(part)[0].nbytes for state in trainer.optimizer.state.values() for part in state.values()
        )
        sharded = sum(map(is_sharded, called.parameters()))
        tokens = torch.arange(T)[None]
        with torch.no_grad(), disabled(called):
            called.eval()
            without = called(tokens)
        return {
            "loss": summary["loss"],
            "grad_norm": summary["grad_norm"],
            "trained": summary["trained_parameters"],
            "without": without.sum().item(),
            "sharded": sharded,
            "held": held,
            "moments": moments,
        }


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    return str(save(model, None, tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("alone")
    return directory, train(str(directory), base, Layout("ddp", 1, 1, 1))


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_a_run_with_adapters_is_the_same_on_two_ranks(strategy, base, alone, tmp_path):
    ranks = run_ranks(2, train, str(tmp_path), base, LAYOUTS[strategy])
    directory, expected = alone
    for found in ranks:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert found["without"] == pytest.approx(expected["without"], rel=1e-4)
        assert found["trained"] == expected["trained"]
    mine, theirs = load(tmp_path)[0], load(directory)[0]
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(mine.get_parameter(name), parameter, rtol=1e-3, atol=1e-4), name
        assert mine.get_parameter(name).dtype == parameter.dtype
    assert adapted(mine).keys() == adapted(theirs).keys()
    if strategy == "fsdp":
        assert ranks[0]["sharded"] == len(list(theirs.parameters()))
        assert ranks[0]["held"] < 0.6 * expected["held"]
        assert ranks[0]["moments"] < 0.6 * expected["moments"]
        again = tmp_path / "again"
        again.mkdir()
        found = train(str(again), base, Layout("ddp", 1, 1, 1), f"{tmp_path}/checkpoints/step-00000003")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def cut(config: LoRAConfig) -> None:
    with connect("cpu") as dist:
        dist = with_mesh(dist, 1, 1, 2)
        with torch.device("meta"):
            model = apply_lora(Transformer(ModelConfig(**SHAPE)), config)
        message = "q_proj is a LoRALinear, and only nn.Linear can be cut; share the work by parallel.dp_shard"
        with pytest.raises(ValueError, match=message):
            parallelize(model, dist=dist, layout=Layout("ddp", 1, 1, 2))


def test_tensor_parallel_refuses_adapters():
    run_ranks(2, cut, LoRAConfig(r=2))
