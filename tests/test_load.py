import dataclasses
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from live import Live
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from minillm import checkpoint
from minillm.checkpoint.folder import write_shards
from minillm.checkpoint.layout import Box, Layout, own_pieces
from minillm.checkpoint.manifest import make_manifest
from minillm.distributed.context import connect
from minillm.load import export, find_checkpoint, load, load_weights, save
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tensors import local_part
from minillm.tokenizer import ByteTokenizer, CharTokenizer

TOKENIZER = CharTokenizer("abcdefgh ")
SHAPE = {"vocab_size": TOKENIZER.vocab_size, "dim": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}


def make_model(seed: int = 0, **changes) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model


def add_checkpoint(run: Path, step: int, model: Transformer, **state) -> Path:
    """What a training run leaves behind at one step."""
    tensors = dict(model.named_parameters())
    tensors |= {f"optim.exp_avg.{name}": torch.zeros_like(t) for name, t in model.named_parameters()}
    section = dataclasses.asdict(model.config) | {"preset": None, "path": None}
    state = {"config": {"model": section}, "tokenizer_hash": TOKENIZER.hash} | state
    return checkpoint.save(run / "checkpoints", step, tensors, state)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of steps 10 and 20."""
    path = tmp_path / "run"
    TOKENIZER.save(path)
    add_checkpoint(path, 10, make_model(10))
    add_checkpoint(path, 20, make_model(20))
    return path


def same_weights(a: Transformer, b: Transformer) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# --- what can be loaded ----------------------------------------------------------------------------------------------


def test_run_gives_the_newest_model_ready_to_use(run):
    model, tokenizer = load(run)
    assert same_weights(model, make_model(20))
    assert not any(module.training for module in model.modules())
    assert tokenizer.hash == TOKENIZER.hash
    assert model.lm_head.weight is model.embed.weight
    tokens = torch.tensor([tokenizer.encode("a bad cab")])
    assert torch.equal(model(tokens), make_model(20).eval()(tokens))


def test_every_way_to_name_a_checkpoint(run):
    for path, step, seed in [
        (run, 10, 10),
        (str(run), 20, 20),
        (run / "checkpoints", None, 20),
        (run / "checkpoints" / "step-00000010", None, 10),
    ]:
        model, tokenizer = load(path, step=step)
        assert same_weights(model, make_model(seed))
        assert tokenizer is not None


def test_checkpoint_away_from_its_run_loads_without_a_tokenizer(run, tmp_path, caplog):
    moved = shutil.move(run / "checkpoints" / "step-00000010", tmp_path / "moved")
    model, tokenizer = load(moved)
    assert same_weights(model, make_model(10))
    assert tokenizer is None
    assert "the tokenizer this model was trained with is not there" in caplog.text


def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(run, caplog):
    shard = run / "checkpoints" / "step-00000020" / "model-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="minillm"):
        assert same_weights(load(run)[0], make_model(10))
    assert f"{shard}: has" in caplog.text


def test_damage_to_optimizer_files_does_not_matter(run):
    (run / "checkpoints" / "step-00000020" / "optim-00000.safetensors").write_bytes(b"")
    assert same_weights(load(run)[0], make_model(20))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True, "qkv_bias": True},
        {"vocab_multiple": 64, "n_kv_heads": 1, "qk_norm": True},
    ],
    ids=str,
)
def test_saved_folder_comes_back(tmp_path, changes):
    model = make_model(**changes)
    folder = save(model, TOKENIZER, tmp_path / "saved")
    loaded, tokenizer = load(folder)
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert tokenizer.hash == TOKENIZER.hash
    assert (loaded.lm_head.weight is loaded.embed.weight) == model.config.tie_embeddings
    assert load(save(model, None, tmp_path / "bare"))[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_stays(tmp_path, dtype):
    model = make_model().to(dtype)
    loaded, _ = load(save(model, TOKENIZER, tmp_path / "saved"))
    assert same_weights(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_another_dtype_can_be_asked_for(tmp_path):
    folder = save(make_model(), TOKENIZER, tmp_path / "saved")
    loaded, _ = load(folder, dtype=torch.bfloat16)
    assert same_weights(loaded, make_model().bfloat16())
    int8 = export(folder, tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match="dtype: weights in int8 are not cast to"):
        load(int8, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A run of 67 MB of parameters beside 134 MB of moments."""
    path = tmp_path_factory.mktemp("large")
    config = ModelConfig(vocab_size=65536, dim=256, n_layers=1, max_seq_len=16)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    tensors |= {f"optim.{moment}.{name}": torch.zeros(p.shape) for moment in "ab" for name, p in tensors.items()}
    checkpoint.save(path, 1, tensors, {"config": {"model": dataclasses.asdict(config)}})
    return path


def memory_of(function: str, *arguments: Path) -> int:
    """The megabytes that a function of minillm.load takes at its peak, in a process of its own."""
    script = f"""
import resource, sys
from minillm.load import {function}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{function}(*sys.argv[1:])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    return int(subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True).stdout)


def test_peak_memory_is_one_model_whatever_the_optimizer_holds(large):
    assert memory_of("load", large) < 67 * 1.4


# --- the weights of one model in another ------------------------------------------------------------------------------


def load_into_shards(path: Path) -> dict:
    """What this rank of FSDP2 has read and held: weights, files proved, bytes at the peak; and what it was told."""
    proved, file_hash = [], checkpoint.folder.file_hash
    with connect("cpu") as dist, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint.folder, "file_hash", lambda at, *size: (proved.append(at.name), file_hash(at, *size))[1]
        )
        model = make_model(1)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        with Live() as memory:
            assert load_weights(path, model, dist) == path
        held = sum(local_part(p)[0].untyped_storage().nbytes() for p in model.parameters())
        weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        seen = {"weights": weights, "proved": [*proved], "beside": memory.peak - held}
        wider = make_model(ffn_dim=80)
        with pytest.raises(ValueError, match="its model has another shape than the one that is to"):
            load_weights(path, wider, dist)
        assert same_weights(wider, make_model(ffn_dim=80))
    return seen


def test_each_rank_reads_its_part_of_the_weights_and_no_file_is_proved_twice(tmp_path):
    """From half precision into fp32, sharded over two ranks; a model of another shape is left as it was."""
    model = make_model().bfloat16()
    path = save(model, TOKENIZER, tmp_path / "saved")
    found = run_ranks(2, load_into_shards, path)
    for each in found:
        assert all(torch.equal(p.float(), each["weights"][name]) for name, p in model.named_parameters())
        assert each["beside"] <= max(4 * p.numel() for p in model.parameters())
    once = sorted(path.name for path in path.iterdir() if path.name != "manifest.json")
    assert sorted(name for each in found for name in each["proved"]) == once
    other = make_model(1)
    load_weights(path, other)
    assert same_weights(other, model.float())


def test_damaged_weights_of_a_run_are_not_started_from(run):
    shard = run / "checkpoints" / "step-00000020" / "model-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    model = make_model(1)
    assert load_weights(run, model).name == "step-00000010"
    assert same_weights(model, make_model(10))
    assert find_checkpoint(run, skip=checkpoint.TENSORS) == shard.parent  # which needs no weights


# --- one file of many -------------------------------------------------------------------------------------------------


def in_pieces(path: Path) -> None:
    """Cut each matrix of a checkpoint into an upper half and two lower quarters, as three ranks would write them."""
    _, manifest = checkpoint.read(path)
    tensors, pieces = checkpoint_tensors(path, manifest), {}
    for name, tensor in tensors.items():
        pieces[name] = [(0, Box((0,) * tensor.ndim, tuple(tensor.shape)))]
        if tensor.ndim == 2:
            (rows, columns), (a, b) = tensor.shape, (size // 2 for size in tensor.shape)
            places = [Box((0, 0), (a, columns)), Box((a, 0), (rows - a, b)), Box((a, b), (rows - a, columns - b))]
            pieces[name] = [*enumerate(places)]
    layout = Layout({name: (t.dtype, list(t.shape)) for name, t in tensors.items()}, pieces)
    for rank in range(3):
        manifest["files"] |= write_shards(path, own_pieces(layout, tensors, rank), rank)
    (path / "manifest.json").write_bytes(make_manifest(layout, manifest["files"], manifest["step"]))


def checkpoint_tensors(path: Path, manifest: dict) -> dict[str, torch.Tensor]:
    into = {
        name: torch.empty(entry["shape"], dtype=checkpoint.DTYPES[entry["dtype"]])
        for name, entry in manifest["tensors"].items()
        if not name.startswith(checkpoint.OPTIM)
    }
    checkpoint.load_tensors(path, into, skip=checkpoint.OPTIM)
    return into


def test_many_files_are_exported_as_one(run, tmp_path):
    model = make_model(30)
    model.blocks[0].mlp.up_proj.bfloat16()
    path = add_checkpoint(run, 30, model)
    in_pieces(path)
    assert len(list(path.glob("model-*.safetensors"))) == 3
    out = export(run, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "manifest.json",
        "model-00000.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    exported, tokenizer = load(out)
    assert same_weights(exported, model)
    assert tokenizer.hash == TOKENIZER.hash
    theirs = safetensors.torch.load_file(out / "model-00000.safetensors")
    assert all(torch.equal(theirs[name], parameter) for name, parameter in model.named_parameters())
    assert same_weights(load(export(run, tmp_path / "earlier", step=10))[0], make_model(10))


def test_nothing_is_exported_over_something_or_from_something_damaged(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="full: is there already"):
        export(run, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    shard = run / "checkpoints" / "step-00000020" / "model-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model-00000\.safetensors: not what was saved"):
        export(shard.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_takes_the_memory_of_a_block(large, tmp_path):
    assert memory_of("export", large, tmp_path / "out") < 30


# --- what cannot be loaded -------------------------------------------------------------------------------------------


def test_path_that_is_none_of_these_says_what_was_looked_for(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no run, checkpoint or saved folder; looked for manifest\.json"):
        load(tmp_path)


def test_unknown_step_names_the_known_ones(run):
    with pytest.raises(ValueError, match="no step 15; there are step-00000010, step-00000020"):
        load(run, step=15)
    with pytest.raises(ValueError, match="is a single checkpoint"):
        load(run / "checkpoints" / "step-00000010", step=10)


def test_run_without_a_valid_checkpoint_says_what_is_wrong_with_the_newest(run):
    for folder in (run / "checkpoints").iterdir():
        (folder / "model-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-00000020/model-00000\.safetensors: is missing"):
        load(run)


def test_damaged_saved_folder_is_refused(tmp_path):
    folder = save(make_model(), TOKENIZER, tmp_path / "saved")
    for file in ("config.json", "tokenizer.json", "model-00000.safetensors"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:-1] + b"\xff")
        with pytest.raises(ValueError, match=f"{file}: not what was saved"):
            load(folder)
        (folder / file).write_bytes(whole)


def test_another_tokenizer_is_refused(run):
    CharTokenizer("abcdefg ").save(run)
    with pytest.raises(ValueError, match=r"is not the one that .*step-00000020 was trained with"):
        load(run)


def test_tokenizer_larger_than_the_model_is_refused(run):
    ByteTokenizer().save(run)
    add_checkpoint(run, 30, make_model(), tokenizer_hash=None)
    with pytest.raises(ValueError, match="its model has 25 tokens, the tokenizer beside it 272"):
        load(run)


def test_checkpoint_of_another_shape_than_its_config_lists_the_differences(run):
    section = dataclasses.asdict(make_model().config) | {"n_layers": 3, "ffn_dim": 128}
    add_checkpoint(run, 30, make_model(), config={"model": section})
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load(run)
    assert "missing in the checkpoint: blocks.2.attn_norm.weight" in str(error.value)
    assert "blocks.0.mlp.gate_proj.weight is (64, 16) torch.float32 in the checkpoint, (128, 16)" in str(error.value)


def test_config_beside_the_checkpoint_is_used_where_it_carries_none(run):
    path = add_checkpoint(run, 30, make_model(30), config=None)
    with pytest.raises(ValueError, match="the shape of the model is unknown"):
        load(path)
    (run / "config.json").write_text('{"model": {"vocab_size": null, "dim": 16, "n_layers": 2, "n_heads": 2}}')
    assert same_weights(load(path)[0], make_model(30))
    (run / "config.json").write_text('{"model": {"vocab_size": 25, "dim": 16, "layers": 2}}')
    with pytest.raises(ValueError, match=r"config\.json: model\.layers is not a field of a model"):
        load(path)
    (run / "config.json").write_text('{"model": {"vocab_size": 25, "dim": 16, "n_heads": 3}}')
    with pytest.raises(ValueError, match=r"config\.json: its section `model` is not a model: n_heads"):
        load(path)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_save_never_writes_over_anything(tmp_path):
    (tmp_path / "saved").mkdir()
    save(make_model(1), TOKENIZER, tmp_path / "saved")  # empty: fine
    with pytest.raises(ValueError, match="is there already"):
        save(make_model(2), TOKENIZER, tmp_path / "saved")
    assert same_weights(load(tmp_path / "saved")[0], make_model(1))


def test_save_that_fails_leaves_nothing(tmp_path):
    class Broken(CharTokenizer):
        def save(self, directory):
            super().save(directory)
            raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="the disk is full"):
        save(make_model(), Broken("abc"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
