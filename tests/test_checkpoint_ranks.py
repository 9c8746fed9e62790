"""Checkpoints of several ranks: who writes what, and any number of ranks reading what any other wrote."""

import functools
import math
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from minillm import checkpoint
from minillm.checkpoint.layout import Box, Layout, deal, make_up
from minillm.checkpoint.manifest import file_of, make_manifest, read_manifest
from minillm.distributed.context import connect
from minillm.model.config import ModelConfig
from minillm.model.presets import preset_fields
from minillm.model.transformer import Transformer
from minillm.optim import optimizer_tensors
from minillm.tensors import is_sharded, local_part, parameter_names

# --- who writes what --------------------------------------------------------------------------------------------------

FLOAT = torch.float32


def whole(*shape: int) -> Box:
    return Box((0,) * len(shape), shape)


def sizes_by_rank(pieces: dict) -> Counter:
    return Counter({rank: 0 for found in pieces.values() for rank, _ in found}) + Counter(
        [rank for found in pieces.values() for rank, box in found for _ in range(math.prod(box.shape))]
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_what_all_ranks_hold_is_dealt_out_evenly_and_once(n):
    shapes = {"embed": [50, 8], "norm": [8], "step": [], "half": [7, 3, 2], "small": [1, 4]}
    described = {name: (FLOAT, shape) for name, shape in shapes.items()}
    pieces = deal(described, [[whole(*shape) for shape in shapes.values()]] * n)
    for name, shape in shapes.items():
        assert make_up(shape, [box for _, box in pieces[name]])
    total = sum(math.prod(shape) for shape in shapes.values())
    assert all(abs(size - total / n) <= 8 for size in sizes_by_rank(pieces).values())  # 8: the longest row
    assert sum(map(len, pieces.values())) <= len(shapes) + n - 1  # only tensors at the cuts become several pieces


def test_what_one_rank_holds_it_writes_and_replicas_share():
    """Rows over two ranks, each held twice, as under hybrid sharding, and one tensor that is nowhere empty."""
    upper, lower = Box((0, 0), (3, 4)), Box((3, 0), (2, 4))
    held = [[upper, whole(8)], [lower, whole(8)], [upper, whole(8)], [lower, whole(8)]]
    pieces = deal({"w": (FLOAT, [5, 4]), "b": (FLOAT, [8])}, held)
    assert make_up([5, 4], [box for _, box in pieces["w"]])
    assert make_up([8], [box for _, box in pieces["b"]])
    for rank, box in pieces["w"]:
        part = held[rank][0]
        assert part.offset[0] <= box.offset[0] < box.offset[0] + box.shape[0] <= part.offset[0] + part.shape[0]
    assert sorted(sizes_by_rank({"w": pieces["w"]}).items()) == [(0, 8), (1, 4), (2, 4), (3, 4)]
    assert sizes_by_rank({"b": pieces["b"]}) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_ranks_without_rows_write_nothing():
    held = [[Box((i, 0), (1, 2))] for i in range(2)] + [[Box((2, 0), (0, 2))]] * 2
    assert deal({"w": (FLOAT, [2, 2])}, held) == {"w": [(0, held[0][0]), (1, held[1][0])]}


def test_the_manifest_of_a_thousand_ranks_is_small(tmp_path):
    """A tenth of the blocks of 70B parameters, under AdamW, in rows over 1,024 ranks; all pieces come back."""
    n = 1024
    with torch.device("meta"):
        parameters = dict(Transformer(ModelConfig(**preset_fields("llama3-70b") | {"n_layers": 8})).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    moments = [f"optim.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in shapes]
    shapes |= {name: shapes[name.split(".", 2)[2]] for name in moments}

    @functools.cache
    def part(shape: tuple[int, ...], rank: int) -> Box:
        length = -(-shape[0] // n)
        begin, end = (min(length * i, shape[0]) for i in (rank, rank + 1))
        return Box((begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:]))

    described = {name: (FLOAT, list(shape)) for name, shape in shapes.items()}
    pieces = deal(described, [[part(shape, rank) for shape in shapes.values()] for rank in range(n)])
    entry = {"size": 8, "sha256": "0" * 64}
    files = {"state.json": entry} | {file_of(name, rank): entry for rank in range(n) for name in ("w", "optim.w")}
    data = make_manifest(Layout(described, pieces), files, step=1)
    assert len(data) < 2**20
    (tmp_path / "manifest.json").write_bytes(data)
    tensors = read_manifest(tmp_path)["tensors"]
    assert sum(len(entry["pieces"]) for entry in tensors.values()) > 200_000
    for name, entry in tensors.items():
        assert entry["shape"] == described[name][1]
        assert [*entry["pieces"].values()] == [box for _, box in pieces[name]]
        assert next(reversed(entry["pieces"])) == file_of(name, pieces[name][-1][0])


@pytest.mark.parametrize(
    ("boxes", "holds"),
    [
        ([((0, 0), (4, 6))], True),
        ([((0, 0), (2, 6)), ((2, 0), (2, 6))], True),
        ([((0, 0), (3, 4)), ((0, 4), (1, 2)), ((1, 4), (3, 2)), ((3, 0), (1, 4))], True),  # a windmill
        ([((0, 0), (4, 6)), ((1, 1), (0, 2))], True),  # an empty piece is no harm
        ([((0, 0), (4, 6)), ((0, 0), (4, 6))], False),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], False),  # as many elements as the whole: an overlap and a gap
        ([((0, 0), (2, 2)), ((0, 0), (2, 2)), ((0, 2), (4, 4))], False),
        ([((0, 0), (2, 6))], False),
        ([], False),
    ],
)
def test_pieces_make_up_a_whole_without_overlap_or_gap(boxes, holds):
    """Also against filling a grid of numbers."""
    count = torch.zeros(4, 6)
    for (row, column), (rows, columns) in boxes:
        count[row : row + rows, column : column + columns] += 1
    assert bool((count == 1).all()) == holds
    assert make_up([4, 6], [Box(*box) for box in boxes]) == holds


# --- any number of ranks reads what any other wrote -------------------------------------------------------------------


class Small(nn.Module):
    """Shapes that no number of ranks divides, wherever a strategy allows it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6, bias=False)
        self.up = nn.Linear(6, 10, bias=False)
        self.down = nn.Linear(10, 6, bias=False)
        self.last = nn.Linear(6, 2, bias=False)  # fewer rows than ranks


TP_STYLES = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "last": ColwiseParallel(),
    "embed": RowwiseParallel(),
}
STRATEGIES = {1: ["ddp"], 2: ["ddp", "fsdp", "tp"], 3: ["ddp", "fsdp"], 4: ["ddp", "fsdp", "hsdp", "fsdp_tp", "ddp_tp"]}


def tensors_of(strategy: str, n: int) -> dict[str, torch.Tensor]:
    """Parameters and moments of a model under a strategy on this rank, all 1."""
    model = Small()
    if strategy.endswith("tp"):
        mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], TP_STYLES)
        if strategy == "fsdp_tp":
            fully_shard(model, mesh=mesh["dp"])
    elif strategy == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    elif strategy == "fsdp":
        fully_shard(model.up)
        fully_shard(model)
    parameters = parameter_names(model)
    tensors = parameters | optimizer_tensors(torch.optim.AdamW(model.parameters()), parameters)
    with torch.no_grad():
        for tensor in tensors.values():
            local_part(tensor)[0].fill_(1)
    return tensors


def numbers(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of that model as one process has them, all numbers different."""
    tensors, at = {name: torch.zeros(t.shape) for name, t in tensors_of("ddp", 1).items()}, 1000.0 * seed
    for name, tensor in tensors.items():
        tensors[name] = (torch.arange(tensor.numel()) + at).reshape(tensor.shape)
        at += tensor.numel()
    return tensors


def is_now(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether the ranks together hold exactly these numbers; put together by DTensor, not by us."""
    full = {name: t.full_tensor() if is_sharded(t) else t for name, t in tensors.items()}
    return full.keys() == expected.keys() and all(torch.equal(full[name], expected[name]) for name in full)


def load_and_save(paths: list[str], out: str) -> list[str]:
    """Load each checkpoint under each strategy on so many ranks, and save what was loaded; the new checkpoints."""
    made = []
    with connect("cpu") as dist:
        for strategy in STRATEGIES[dist.world_size]:
            for path in paths:
                into = tensors_of(strategy, dist.world_size)
                state = checkpoint.load_tensors(path, into, dist=dist)
                assert state == {"seed": 7}, state
                assert is_now(into, numbers(7)), (strategy, path)
            made.append(f"{out}/{strategy}-{dist.world_size}")
            checkpoint.save(made[-1], 5, into, state if dist.is_main else {}, dist=dist)
        # nothing is touched on any rank where one of them finds something wrong
        if dist.world_size == 2:
            into = tensors_of("fsdp", 2)
            if dist.rank == 1:
                into["more"] = torch.zeros(1)
            with pytest.raises(ValueError, match=r"missing in the checkpoint: more"):
                checkpoint.load_tensors(path, into, dist=dist)
            into.pop("more", None)
            assert is_now(into, {name: torch.ones(t.shape) for name, t in into.items()})
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of the same numbers from each strategy on 1 to 4 ranks, each made from those before it."""
    out = tmp_path_factory.mktemp("strategies")
    paths = [str(checkpoint.save(out / "one", 5, numbers(7), {"seed": 7}))]
    for n in (4, 2, 3):
        made = run_ranks(n, load_and_save, paths, str(out))
        assert all(each == made[0] for each in made)
        paths += [f"{place}/step-00000005" for place in made[0]]
    return {Path(path).parent.name: Path(path) for path in paths}


def test_every_strategy_loads_what_every_other_saved(written):
    """The ranks have compared what they loaded; here what the last of them saved comes back to one process."""
    assert len(written) == 11
    for path in written.values():
        into = {name: torch.ones_like(t) for name, t in numbers(7).items()}
        checkpoint.load_tensors(path, into)
        assert is_now(into, numbers(7))


@pytest.mark.parametrize(("name", "n"), [("ddp-4", 4), ("fsdp-4", 4), ("hsdp-4", 4), ("fsdp_tp-4", 4), ("ddp-3", 3)])
def test_every_rank_writes_its_share(written, name, n):
    _, manifest = checkpoint.read(written[name])
    bytes_of = Counter()
    for file, entry in manifest["files"].items():
        if file.endswith(".safetensors"):
            bytes_of[file[-17:-12]] += entry["size"]
    assert len(bytes_of) == n
    data = sum(4 * t.numel() for t in numbers(7).values())
    assert sum(bytes_of.values()) < data + 2 * n * 4096  # nothing twice; headers
    if name.startswith("ddp"):
        sizes = [math.prod(box.shape) * 4 for t in manifest["tensors"].values() for box in t["pieces"].values()]
        assert sum(sizes) == data
        assert max(bytes_of.values()) - min(bytes_of.values()) < 3000  # headers, and the longest row


# --- which one to continue from, and what goes wrong on one rank ------------------------------------------------------


def names(directory: str | Path) -> list[str]:
    return sorted(p.name for p in Path(directory).iterdir())


def refuse_large_files() -> None:
    """From here on this process cannot write more than a few bytes to a file, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def save_where_some_cannot(directory: str) -> list[str]:
    """A disk that is full for one rank or the other; what each rank says."""
    said = []
    with connect("cpu") as dist:

        def there() -> list[str]:
            dist.barrier()  # rank 0 cleans up while the others go on
            return names(directory)

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        state = {"at": dist.rank}
        tensors = tensors_of("fsdp", 2)
        checkpoint.save(directory, 1, tensors, state, keep_last=1, dist=dist)
        for victim in (0, 1):
            if dist.rank == victim:
                refuse_large_files()
            try:
                checkpoint.save(directory, 2, tensors, state, keep_last=1, dist=dist)
            except ValueError as error:
                said.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert there() == ["step-00000001"]  # nothing evicted, nothing left behind
        extra = {"more": torch.zeros(1)} if dist.rank else {}
        # the state of rank 0 cannot be spelled; a rank has other tensors than the rest
        for ours, mine in ((tensors, {"bad": object()} if dist.is_main else state), (tensors | extra, state)):
            try:
                checkpoint.save(directory, 2, ours, mine, keep_last=1, dist=dist)
            except (ValueError, TypeError, RuntimeError) as error:
                said.append(str(error))
            assert there() == ["step-00000001"]
        # a step that is saved again is replaced; later ones go; keep_last counts those that verify, by all ranks
        for step in (1, 3, 4, 5):
            checkpoint.save(directory, step, tensors, state, dist=dist)
        if dist.is_main:
            damage(Path(directory) / "step-00000005" / "optim-00001.safetensors")
        assert checkpoint.latest(directory, dist=dist) == Path(directory, "step-00000004")
        checkpoint.save(directory, 6, tensors, state, keep_last=2, dist=dist)
        assert there() == ["step-00000004", "step-00000005", "step-00000006"]
        checkpoint.save(directory, 4, tensors, state, keep_last=2, dist=dist)
        assert there() == ["step-00000004"]
    return said


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(tmp_path):
    said = run_ranks(2, save_where_some_cannot, str(tmp_path))
    full = "step-00000002: cannot be written: the file would be larger than this process may write"
    for rank in (0, 1):
        for victim in (0, 1):
            assert full in said[rank][victim]
            assert said[rank][victim].startswith("rank ") == (rank != victim)
        assert "not JSON serializable" in said[rank][2]
        assert "rank 1 has other tensors than rank 0" in said[rank][3]
