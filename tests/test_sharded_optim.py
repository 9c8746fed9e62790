"""Optimizers on parameters of which each rank holds a part do what they do in one process."""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minillm.distributed.context import connect, with_mesh
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.optim import (
    OPTIMIZERS,
    OptimConfig,
    build_optimizer,
    clip_grad_norm_,
    gradient_norms,
    lamb,
    muon,
    optimizer_tensors,
    param_groups,
    unscale_,
)
from minillm.optim.exchange import divided
from minillm.optim.sharded import batched
from minillm.tensors import is_sharded, local_part, parameter_names
from minillm.trainer.norms import norms_noted

# Rows that no number of ranks divides, and matrices with fewer rows than ranks.
UNEVEN = ModelConfig(
    vocab_size=53, dim=14, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=2, ffn_dim=21, max_seq_len=8, qkv_bias=True
)
EVEN = dataclasses.replace(UNEVEN, vocab_size=56, dim=16, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=24)
STEPS = 20
WITHOUT_GRADIENT = "blocks.0.attn.k_proj.weight"  # now and then


def transformer(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    model.single = nn.Linear(9, 1)  # a matrix of one row
    return model


def optim_config(name: str) -> OptimConfig:
    momentum = {"momentum": 0.7} if name in ("sgd", "rmsprop", "muon") else {}
    return OptimConfig(name=name, lr=1e-2, warmup_steps=0, l1=1e-3, lr_scales=["*q_proj*=0.5", "norm*=2"], **momentum)


def give_gradients(parameters: dict[str, Tensor], seed: int) -> None:
    """The same gradients however the parameters are held."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        whole = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
        if name == WITHOUT_GRADIENT and seed % 3 == 1:
            parameter.grad = None
            continue
        part, offset = local_part(parameter)
        for dim, (start, size) in enumerate(zip(offset, part.shape)):
            whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
        parameter.grad = like(parameter, whole.contiguous())


def like(parameter: Tensor, part: Tensor) -> Tensor:
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().clone()


def train(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What 20 steps make of everything: parameters, state, norms, rows of norms.jsonl."""
    parameters = parameter_names(model)
    optimizer = build_optimizer(model, optim_config(name))
    norms, notes = [], []
    for step in range(STEPS):
        asked = step % 5 == 0
        give_gradients(parameters, step)
        each = gradient_norms(parameters.values())
        total = clip_grad_norm_(parameters.values(), 50.0 if step % 2 else 5.0, each)
        assert not is_sharded(each)
        assert not is_sharded(total)
        norms += [each, total[None]]
        with norms_noted(notes, step, parameters, each) if asked else nullcontext():
            optimizer.step()
    state = optimizer_tensors(optimizer, parameters)
    for key, tensor in state.items():
        parameter = parameters[key.split(".", 2)[2]]
        assert is_sharded(tensor) == (is_sharded(parameter) and tensor.ndim > 0), key
        if is_sharded(tensor):
            assert tensor.placements == parameter.placements, key
    rows = torch.tensor([number or 0.0 for _, row in notes for number in row.values()])
    found = {name: whole(tensor) for name, tensor in [*parameters.items(), *state.items()]}
    return found | {"norms": torch.cat(norms), "rows": rows}


def cut(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Sharded over those axes of the mesh that have more than one rank."""
    from torch.distributed.fsdp import fully_shard

    if mesh["tp"].size() > 1:
        cut_over_tp(model, mesh["tp"])
    data = mesh["dp_replicate", "dp_shard"] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    if data.size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)
    return model


CUT_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed")
CUT_COLUMNS = ("o_proj", "down_proj")


def cut_over_tp(model: Transformer, mesh: DeviceMesh) -> None:
    """Matrices by rows or columns, all else on every rank, as tensor parallelism has it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for module_name, module in model.named_modules():
        last = module_name.split(".")[-1]
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if last in CUT_ROWS else Shard(1) if last in CUT_COLUMNS else Replicate()
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))
    model.tie_embeddings()


def close(one: Tensor, other: Tensor) -> bool:
    return (one.double() - other.double()).norm() <= 1e-5 * other.double().norm()


# --- twenty steps -----------------------------------------------------------------------------------------------------

# name -> (sizes of dp_replicate, dp_shard, tp; shape of the model)
LAYOUTS = {
    "fsdp 2": ((1, 2, 1), UNEVEN),
    "fsdp 4": ((1, 4, 1), UNEVEN),
    "hsdp 2x2": ((2, 2, 1), UNEVEN),
    "fsdp 2 x tp 2": ((1, 2, 2), EVEN),
}


def trained_on_ranks(layouts: list[str], names: list[str]) -> dict[tuple[str, str], dict[str, Tensor]]:
    with connect("cpu") as dist, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamb, "MAX_ELEMENTS", 500)  # several batches
        meshes = {layout: with_mesh(dist, *LAYOUTS[layout][0]).mesh for layout in layouts}
        return {
            (layout, name): train(cut(transformer(LAYOUTS[layout][1]), mesh), name)
            for layout, mesh in meshes.items()
            for name in names
        }


@pytest.mark.parametrize(
    ("ranks", "layouts", "names"),
    [(2, ["fsdp 2"], list(OPTIMIZERS)), (4, ["fsdp 4", "hsdp 2x2", "fsdp 2 x tp 2"], ["adamw", "muon", "lamb"])],
)
def test_twenty_steps_on_parts_equal_those_of_one_process(ranks, layouts, names):
    results = run_ranks(ranks, trained_on_ranks, layouts, names, seconds=300)
    for layout in layouts:
        for name in names:
            expected = train(transformer(LAYOUTS[layout][1]), name)
            for result in results:
                found = result[layout, name]
                assert found.keys() == expected.keys()
                assert [key for key in found if not close(found[key], expected[key])] == [], (layout, name)
                assert all(torch.equal(found[key], results[0][layout, name][key]) for key in found)


# --- gradients that are not as they should be -------------------------------------------------------------------------


def odd_gradients(sizes: tuple[int, int, int], name: str) -> dict[str, Any]:
    """What a rank says of a step in which only the second has a bad number, and of a good one after it."""
    found = {}
    with connect("cpu") as dist:
        model = cut(transformer(EVEN), with_mesh(dist, *sizes).mesh)
        parameters = parameter_names(model)
        found["none"] = gradient_norms(parameters.values())
        optimizer = build_optimizer(model, optim_config(name))
        # the first parameter of all is one that tp leaves whole
        optimizer.param_groups.sort(key=lambda group: group["name"] != "no_decay" or group["lr_scale"] != 2)
        before = {name: whole(p) for name, p in parameters.items()}
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        give_gradients(parameters, 0)
        gradient = local_part(parameters["blocks.0.mlp.up_proj.weight"].grad)[0]
        if dist.rank == 1:
            gradient[1, 1] = math.inf
        unscale_(scaler, optimizer)
        kept = gradient.clone()
        each = gradient_norms(parameters.values())
        found["norm"] = clip_grad_norm_(parameters.values(), 1.0, each)
        found["bad"] = [name for name, norm in zip(parameters, each.tolist()) if not math.isfinite(norm)]
        found["gradients stay"] = torch.equal(gradient, kept)
        scaler.step(optimizer)
        scaler.update()
        found["scale"] = scaler.get_scale()
        found["weights stay"] = all(torch.equal(whole(p), before[name]) for name, p in parameters.items())
        state = optimizer_tensors(optimizer, parameters)
        found["state stays"] = not any(whole(tensor).any() for tensor in state.values())
        give_gradients(parameters, 0)
        for parameter in parameters.values():
            local_part(parameter.grad)[0].mul_(found["scale"])
        unscale_(scaler, optimizer)
        scaler.step(optimizer)
        found["weights"] = {name: whole(p) for name, p in parameters.items()}
    return found


@pytest.mark.parametrize(("sizes", "name"), [((1, 2, 1), "adamw"), ((1, 1, 2), "muon")])
def test_a_bad_number_on_one_rank_stops_the_step_on_all(sizes, name):
    model = transformer(EVEN)
    give_gradients(parameter_names(model), 0)
    build_optimizer(model, optim_config(name)).step()
    for result in run_ranks(2, odd_gradients, sizes, name):
        assert not result["none"].any()
        assert result["norm"] == math.inf
        assert result["bad"] == ["blocks.0.mlp.up_proj.weight"]
        assert result["scale"] == 4.0
        assert all(result[what] for what in ("gradients stay", "weights stay", "state stays"))
        assert [name for name, p in model.named_parameters() if not close(result["weights"][name], p)] == []


# --- Muon's work ------------------------------------------------------------------------------------------------------


def muon_steps(model: Transformer) -> dict[str, Tensor]:
    parameters = parameter_names(model)
    optimizer = build_optimizer(model, optim_config("muon"))
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    return {name: whole(p) for name, p in parameters.items()}


def muon_on_ranks(sizes: tuple[int, int, int]) -> tuple[dict[str, Tensor], list[tuple[int, ...]], list[int]]:
    """What becomes of the weights, the matrices that this rank orthogonalised, and how many numbers it sent."""
    done, sent = [], []
    with connect("cpu") as dist, pytest.MonkeyPatch.context() as patch:
        mesh = with_mesh(dist, *sizes).mesh
        orthogonalized, all_to_all = muon.orthogonalized, torch.distributed.all_to_all_single
        patch.setattr(muon, "orthogonalized", lambda ms: done.extend(tuple(m.shape) for m in ms) or orthogonalized(ms))
        patch.setattr(
            torch.distributed,
            "all_to_all_single",
            lambda into, out, *counts: sent.append((out.dtype, out.numel())) or all_to_all(into, out, *counts),
        )
        patch.setattr(muon, "orthogonalization_dtype", lambda x: torch.bfloat16)
        patch.setattr(muon, "MAX_SENT_ELEMENTS", 100)
        return muon_steps(cut(transformer(UNEVEN), mesh)), done, sent


def test_ranks_divide_the_matrices_and_send_each_part_once_there_and_once_back(monkeypatch):
    monkeypatch.setattr(muon, "orthogonalization_dtype", lambda x: torch.bfloat16)
    expected = muon_steps(transformer(UNEVEN))
    groups = {
        group["name"]: group["params"] for group in param_groups(transformer(UNEVEN), OptimConfig(name="muon", lr=1))
    }
    shapes = [tuple(p.shape) for p in groups["muon"]]
    assert (1, 9) in shapes
    for sizes in ((1, 2, 1), (2, 2, 1)):
        results = run_ranks(math.prod(sizes), muon_on_ranks, sizes)
        for found, _, _ in results:
            assert [name for name in expected if not close(found[name], expected[name])] == []
        done = [shape for _, shapes_of_rank, _ in results for shape in shapes_of_rank]
        assert len(done) == 3 * len(shapes) - 1  # one of three steps was without a gradient for one of them
        numbers = sum(rows * columns for rows, columns in done)
        there, back = (sum(count for _, _, sent in results for _, count in sent[way::2]) for way in (0, 1))
        assert (there, back) == (numbers, sizes[0] * numbers)
        assert all(dtype == torch.bfloat16 for _, _, sent in results for dtype, _ in sent)
        assert all(len(sent) > 3 * 2 * 2 for _, _, sent in results)  # several batches


def test_work_is_divided_evenly():
    assert divided([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert divided([1, 9, 2, 8], 2) == [0, 0, 1, 1]
    assert divided([3], 4) == [0]
    generator = torch.Generator().manual_seed(0)
    pieces = torch.randint(1, 100, (200,), generator=generator).tolist()
    load = [0] * 8
    for piece, rank in zip(pieces, divided(pieces, 8)):
        load[rank] += piece
    assert max(load) < 1.02 * sum(pieces) / 8


def test_batches_keep_the_order_and_their_size():
    parameters = [torch.zeros(size) for size in (3, 4, 9, 1, 2, 5, 8)]
    assert [[p.numel() for p in batch] for batch in batched(parameters, 8)] == [[3, 4], [9], [1, 2, 5], [8]]
    assert batched([], 8) == []
