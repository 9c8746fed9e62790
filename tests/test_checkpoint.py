import errno
import hashlib
import json
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from minillm import checkpoint
from minillm.checkpoint.layout import Box
from minillm.checkpoint.manifest import MAX_PIECES, signed
from minillm.checkpoint.shard import write_shard
from minillm.files import machine

STATE = {"step": 3, "samples": 96, "loss": 0.1 + 0.2, "config": {"model": {"dim": 8}}, "best": math.inf}


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4, generator=g)
    tensors = {
        "embed.weight": weight,
        "lm_head.weight": weight,  # tied
        "norm.weight": torch.randn(4, generator=g),
        "transposed": torch.randn(3, 6, generator=g).T,
        "half": torch.randn(7, generator=g).bfloat16(),
        "double": torch.randn(2, 2, generator=g).double(),
        "empty": torch.zeros(0, 3),
        "ids": torch.randint(0, 9, (3,), generator=g),
        "mask": torch.rand(3, generator=g) > 0.5,
    }
    return (
        tensors
        | {f"optim.exp_avg.{name}": torch.randn(4, generator=g) for name in ("norm.weight",)}
        | {"optim.step.norm.weight": torch.tensor(float(seed))}
    )


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names, shapes, dtypes and ties, other values."""
    made = {}
    return {name: made.setdefault(id(t), torch.full_like(t, 1)) for name, t in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def assert_refused(path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    """Loading names the problem and leaves every tensor as it was."""
    into = blank(tensors)
    before = {name: t.clone() for name, t in into.items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_tensors(path, into)
    assert same(into, before)


@pytest.fixture
def saved(tmp_path) -> Path:
    return checkpoint.save(tmp_path, 3, make_tensors(), STATE)


# --- what is saved comes back ----------------------------------------------------------------------------------------


def test_state_and_tensors_come_back_bit_for_bit(saved):
    tensors = make_tensors()
    into = blank(tensors)
    addresses = {name: t.data_ptr() for name, t in into.items()}
    assert saved.name == "step-00000003"
    assert checkpoint.load_tensors(saved, into) == STATE == checkpoint.read(saved)[0]
    assert same(into, tensors)
    assert addresses == {name: t.data_ptr() for name, t in into.items()}  # in place


def test_shards_are_what_the_safetensors_library_reads_and_writes(saved, tmp_path):
    tensors = make_tensors()
    model = safetensors.torch.load_file(saved / "model-00000.safetensors")
    optim = safetensors.torch.load_file(saved / "optim-00000.safetensors")
    del tensors["lm_head.weight"]
    assert same(model | optim, {name: tensors[name] for name in model | optim})
    assert len(model) + len(optim) == len(tensors)
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, theirs)
    header = checkpoint.shard.read_header(theirs)
    assert {name: shape for name, (_, shape, _, _) in header.items()} == {n: list(t.shape) for n, t in tensors.items()}


def test_tied_tensors_are_stored_once_and_fill_both(saved):
    assert "lm_head.weight" not in checkpoint.read(saved)[1]["tensors"]
    into = blank(make_tensors())
    into["lm_head.weight"] = into.pop("embed.weight")  # known under the other name alone
    with pytest.raises(ValueError, match=r"missing in the checkpoint: lm_head\.weight\n.*not in the model: embed\.wei"):
        checkpoint.load_tensors(saved, into)


def test_manifest_lists_every_file_and_tensor(saved):
    _, manifest = checkpoint.read(saved)
    assert {p.name for p in saved.iterdir()} == manifest["files"].keys() | {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (saved / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["tensors"]["embed.weight"] == {
        "dtype": "F32",
        "shape": [5, 4],
        "pieces": {"model-00000.safetensors": Box((0, 0), (5, 4))},
    }


def test_model_loads_without_the_optimizers_file(saved):
    (saved / "optim-00000.safetensors").unlink()
    tensors = {name: t for name, t in make_tensors().items() if not name.startswith("optim.")}
    into = blank(tensors)
    checkpoint.load_tensors(saved, into, skip="optim.")
    assert same(into, tensors)


def test_pieces_in_many_files_are_put_together(saved):
    """What three ranks would write: one has the upper rows of a tensor, the others the lower in two column blocks."""
    whole = torch.arange(24.0).view(6, 4)
    parts = [([0, 0], whole[:4]), ([4, 0], whole[4:, :1]), ([4, 1], whole[4:, 1:])]
    for rank, (_, part) in enumerate(parts):
        write_shard(saved / f"model-{rank:05d}.safetensors", {"w": part})
    claim(saved, [(rank, offset, part.shape) for rank, (offset, part) in enumerate(parts)], [6, 4])
    into = {"w": torch.zeros(6, 4)}
    checkpoint.load_tensors(saved, into)
    assert torch.equal(into["w"], whole)


def as_written(path: Path) -> dict:
    """The manifest as it is in the file."""
    return json.loads((path / "manifest.json").read_text())


def rewrite(path: Path, manifest: dict) -> None:
    """A manifest that its own hash confirms, whatever it says."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    (path / "manifest.json").write_bytes(signed(body))


def claim(path: Path, pieces: list, shape: list[int], form: int = 3) -> Path:
    """Make a manifest confirm the files that are there, and say that they hold one tensor, of these pieces."""
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    if form == 3:
        said = {"cuts": [{"shape": shape, "pieces": pieces}], "tensors": {"w": {"dtype": "F32", "cut": 0}}}
    else:
        pieces = [{"file": file, "offset": offset, "shape": size} for file, offset, size in pieces]
        said = {"tensors": {"w": {"dtype": "F32", "shape": shape, "pieces": pieces}}}
    rewrite(path, {"format": form, "step": 1, "files": files, **said})
    return path


@pytest.mark.parametrize(
    ("form", "sha256"),
    [
        (1, "94ce4d609b12de5d715949573cefe1a8f4ff52924d2de0195fe100660934b022"),
        (2, "8a32e91e9222ff6719d7bb2e43774b26b06a747674dc28c7a57d1af4d393845e"),
    ],
)
def test_checkpoints_of_earlier_formats_are_read(tmp_path, form, sha256):
    """A manifest as those versions wrote it: their hash of it proves that not a byte is different."""
    tensors = {"w": torch.tensor([[1.0, 2.0]]), "optim.exp_avg.w": torch.tensor([[3.0, 4.0]])}
    path = checkpoint.save(tmp_path, 3, tensors, {"step": 3})
    place = {"offset": [0, 0], "shape": [1, 2]}
    stored = {
        name: {"dtype": "F32", "shape": [1, 2], "pieces": [{"file": f"{kind}-00000.safetensors", **place}]}
        for kind, name in zip(("model", "optim"), tensors)
    }
    body = {"format": form, "step": 3, "files": as_written(path)["files"], "tensors": stored, "sha256": sha256}
    style = {"indent": 1} if form == 1 else {"separators": (",", ":")}
    (path / "manifest.json").write_text(json.dumps(body, **style) + "\n")
    into = blank(tensors)
    assert checkpoint.load_tensors(path, into) == {"step": 3}
    assert same(into, tensors)


def test_saving_and_loading_take_no_second_copy(tmp_path):
    """Peak resident memory of a process that saves 160 MB and loads them into place."""
    script = """
import resource, sys, torch
from minillm import checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
tensors = {str(i): torch.ones(5 * 2**20 // 16, 8).mul_(i) for i in range(16)}  # 10 MB each
start = peak()
path = checkpoint.save(sys.argv[1], 1, tensors, {})
saved = peak()
checkpoint.load_tensors(path, tensors)
print(saved - start, peak() - saved)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    saving, loading = map(int, result.stdout.split())
    assert saving < 40  # MB; a second copy would be 160
    assert loading < 40


# --- which checkpoints there are -------------------------------------------------------------------------------------


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_latest_is_the_newest_that_verifies_and_says_what_it_passed_over(tmp_path, caplog):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_tensors(step), STATE)
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    flip(tmp_path / "step-00000003" / "model-00000.safetensors", -1)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, logger="minillm"):
        assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert "step-00000003/model-00000.safetensors: not what was saved" in caplog.text
    assert "step-00000002/manifest.json: is missing" in caplog.text


def test_keep_last_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, make_tensors(), STATE, keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    checkpoint.save(tmp_path, 5, make_tensors(), STATE)
    assert len(names(tmp_path)) == 3  # 0 keeps all


def test_keep_last_counts_only_verified_checkpoints(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_tensors(), STATE)
    flip(tmp_path / "step-00000003" / "optim-00000.safetensors", -1)
    checkpoint.save(tmp_path, 4, make_tensors(), STATE, keep_last=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_same_step_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, make_tensors(1), STATE)
    checkpoint.save(tmp_path, 1, make_tensors(2), STATE)
    assert names(tmp_path) == ["step-00000001"]
    into = blank(make_tensors())
    checkpoint.load_tensors(tmp_path / "step-00000001", into)
    assert same(into, make_tensors(2))


def test_saving_an_earlier_step_ends_the_later_history(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_tensors(step), STATE)
    checkpoint.save(tmp_path, 2, make_tensors(9), STATE, keep_last=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_leftovers_of_dead_writers_are_removed_and_of_live_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".step-00000009.{machine()}.{process}.tmp").mkdir()
        (tmp_path / f".step-00000009.{machine()}.{process}.tmp" / "model-00000.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    assert names(tmp_path) == [f".step-00000009.{machine()}.{os.getppid()}.tmp", "step-00000001"]


# --- damaged files ---------------------------------------------------------------------------------------------------

FILES = ["manifest.json", "state.json", "model-00000.safetensors", "optim-00000.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_truncated_file(saved, file):
    whole = (saved / file).read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        (saved / file).write_bytes(whole[:size])
        assert_refused(saved, make_tensors(), file)
        assert checkpoint.latest(saved.parent) is None


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit(saved, file):
    """In the header, the data, the numbers, names and white space of the JSON: forty places of each file."""
    whole = (saved / file).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        flip(saved / file, at, bit=at % 8)
        assert_refused(saved, make_tensors(), file)
        (saved / file).write_bytes(whole)


@pytest.mark.parametrize("file", FILES)
def test_missing_file(saved, file):
    (saved / file).unlink()
    assert_refused(saved, make_tensors(), f"{file}: is missing")


def test_extra_file_is_named_and_ignored(saved, caplog):
    (saved / "model-00001.safetensors").write_bytes(b"whatever")
    into = blank(make_tensors())
    with caplog.at_level(logging.WARNING, logger="minillm"):
        checkpoint.load_tensors(saved, into)
    assert "not in the manifest and ignored: model-00001.safetensors" in caplog.text
    assert same(into, make_tensors())


def test_file_of_another_checkpoint(saved):
    other = checkpoint.save(saved.parent, 4, make_tensors(1), STATE)
    shutil.copy(other / "model-00000.safetensors", saved)
    assert_refused(saved, make_tensors(), r"model-00000\.safetensors: not what was saved")


def test_newer_format_is_named(saved):
    rewrite(saved, as_written(saved) | {"format": 4})
    assert_refused(saved, make_tensors(), "written in format 4; this version of minillm reads format 3 and older")


def test_incompatible_config_lists_everything_that_differs(saved):
    tensors = make_tensors()
    tensors["embed.weight"] = tensors["lm_head.weight"] = torch.zeros(6, 4)
    tensors["half"] = tensors["half"].float()
    tensors["blocks.0.norm"] = tensors.pop("norm.weight")
    with pytest.raises(ValueError, match="does not fit this model") as error:
        checkpoint.load_tensors(saved, tensors)
    assert str(error.value).splitlines()[1:] == [
        "  1 missing in the checkpoint: blocks.0.norm",
        "  1 not in the model: norm.weight",
        "  2 different: embed.weight is (5, 4) torch.float32 in the checkpoint, (6, 4) torch.float32 in the model, "
        "half is (7,) torch.bfloat16 in the checkpoint, (7,) torch.float32 in the model",
    ]
    assert not tensors["embed.weight"].any()


# --- hostile files: the manifest confirms them, so only what they say can give them away ------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def hostile_shard(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HOSTILE = {
    "pickle": pickle.dumps(Bomb()),
    "torch_pickle": b"PK\x03\x04" + pickle.dumps(Bomb()),
    "header_beyond_the_file": (2**40).to_bytes(8, "little") + b"{}",
    "header_too_large": (100 * 2**20).to_bytes(8, "little") + b" " * 64,
    "header_of_100_mb": hostile_shard(b" " * (100 * 2**20)),
    "header_not_json": hostile_shard(b"{{{{"),
    "header_deeply_nested": hostile_shard(b"[" * 100_000),
    "huge_integer": hostile_shard(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
    "huge_shape": hostile_shard({"w": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 2**65]}}, b"1234"),
    "overflowing_shape": hostile_shard({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
    "negative_shape": hostile_shard({"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
    "beyond_the_end": hostile_shard({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"1234"),
    "before_the_start": hostile_shard({"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
    "overlap": hostile_shard(
        {
            "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        },
        b"123456",
    ),
    "unread_bytes": hostile_shard({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
    "unknown_dtype": hostile_shard({"w": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "not_an_object": hostile_shard({"w": [1, 2, 3]}),
    "another_tensor": hostile_shard({"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
}


SHARD = "model-00000.safetensors"


def confirmed(path: Path, shard: bytes) -> Path:
    """A checkpoint of one tensor in one file, with a manifest whose hashes agree."""
    path.mkdir()
    (path / SHARD).write_bytes(shard)
    (path / "state.json").write_text("{}")
    return claim(path, [(0, [0], [1])], [1])


GOOD_SHARD = hostile_shard({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0\0\x80?")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_shard_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert_refused(confirmed(tmp_path / "c", HOSTILE[kind]), {"w": torch.zeros(1)}, SHARD)
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "", "a\0b"])
def test_file_names_that_lead_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes(GOOD_SHARD)
    path = claim(confirmed(tmp_path / "c", GOOD_SHARD), [(name, [0], [1])], [1], form=2)
    assert_refused(path, {"w": torch.zeros(1)}, "which is not listed")
    manifest = as_written(path)
    manifest["files"][name] = manifest["files"].pop(SHARD)
    rewrite(path, manifest)
    assert_refused(path, {"w": torch.zeros(1)}, "is not a plain file name")


@pytest.mark.parametrize("file", [SHARD, "state.json", "manifest.json"])
def test_symbolic_links_and_pipes_are_refused(tmp_path, file):
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    (path / file).rename(tmp_path / file)
    (path / file).symlink_to(tmp_path / file)
    assert_refused(path, {"w": torch.zeros(1)}, f"{file}: is a symbolic link")
    (path / file).unlink()
    os.mkfifo(path / file)
    assert_refused(path, {"w": torch.zeros(1)}, f"{file}: is not a plain file")


PLACES = [
    ([1], [1]),
    ([-1], [1]),
    ([0.0], [1]),
    ([False], [1]),
    ([], [1]),
    ([0], [2]),
    ([0], [0]),
    ([0, 0], [1, 1]),
    ([0], None),
    (0, 1),
]
HOLDERS = {
    2: ["state.json", "missing", [SHARD], None, 0],
    3: [1, -1, 10**9, 10**100, True, False, 0.0, None, "0", [0], SHARD],
}


@pytest.mark.parametrize(
    ("form", "piece"),
    [
        *((3, (0, *place)) for place in PLACES),
        *((2, (SHARD, *place)) for place in PLACES),
        *((form, (holder, [0], [1])) for form, holders in HOLDERS.items() for holder in holders),
        *((3, piece) for piece in ([], [0], [0, [0]], [0, [0], [1], [1]], {}, "0", 0, None)),
    ],
    ids=str,
)
def test_pieces_that_do_not_make_up_the_tensor_are_refused(tmp_path, form, piece):
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    assert_refused(claim(path, [piece], [1], form), {"w": torch.zeros(1)}, "c/")


@pytest.mark.parametrize("cut", [1, -1, 10**100, True, False, 0.0, None, "0", [0], [], {}])
def test_cuts_that_are_not_there_are_refused(tmp_path, cut):
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    rewrite(path, as_written(path) | {"tensors": {"w": {"dtype": "F32", "cut": cut}}})
    assert_refused(path, {"w": torch.zeros(1)}, r"manifest\.json: not a manifest: w has cut .* of 1")


@pytest.mark.parametrize("cuts", [None, {}, [], 0, "cut", [None], [[]], [{}], [{"shape": [1]}], [{"pieces": []}]])
def test_what_is_no_list_of_cuts_is_refused(tmp_path, cuts):
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    rewrite(path, as_written(path) | {"cuts": cuts})
    assert_refused(path, {"w": torch.zeros(1)}, r"manifest\.json: not a manifest")


def test_a_short_manifest_of_very_many_pieces_is_refused(tmp_path):
    """Thousands of tensors of the same thousands of pieces; and a tensor of as many dimensions as there may be."""
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    n = math.isqrt(MAX_PIECES) + 1
    tensors = {f"{i}": {"dtype": "F32", "cut": 0} for i in range(n)}
    rewrite(claim(path, [(i, [i], [1]) for i in range(n)], [n]), as_written(path) | {"tensors": tensors})
    assert_refused(path, {"w": torch.zeros(1)}, f"{n * n} pieces are more than any run makes")
    claim(path, [(i, [i] + [0] * 7, [1] * 8) for i in range(20_000)], [20_000] + [1] * 7)
    assert_refused(path, {"w": torch.zeros(1)}, "cut 0 has 20000 pieces, more than any run makes")


def two_pieces(path: Path, offsets: tuple[int, int], ranks: tuple[int, int], shape: list[int], form: int) -> Path:
    """A tensor of two pieces of one number each, in files whose hashes the manifest confirms."""
    confirmed(path, GOOD_SHARD)
    files = [f"model-{rank:05d}.safetensors" for rank in ranks]
    for file in files:
        (path / file).write_bytes(GOOD_SHARD)
    holders = ranks if form == 3 else files
    return claim(path, [(holder, [offset], [1]) for holder, offset in zip(holders, offsets)], shape, form)


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize(
    ("offsets", "ranks", "shape"),
    [
        ((0, 0), (0, 1), [2]),  # as many numbers as the whole has, one of them twice and one of them never
        ((1, 1), (0, 1), [2]),
        ((0, 0), (0, 1), [1]),
        ((0, 1), (0, 1), [3]),
        ((0, 1), (0, 0), [2]),  # one name in a file is one tensor
        ((0, 2**63 - 1), (0, 1), [2**63]),
    ],
)
def test_pieces_that_overlap_or_leave_gaps_are_refused(tmp_path, offsets, ranks, shape, form):
    into = {"w": torch.zeros(2)}
    checkpoint.load_tensors(two_pieces(tmp_path / "good", (0, 1), (0, 1), [2], form), into)
    assert into["w"].tolist() == [1, 1]
    hostile = two_pieces(tmp_path / "c", offsets, ranks, shape, form)
    assert_refused(hostile, {"w": torch.zeros(2)}, r"manifest\.json: not a")


@pytest.mark.parametrize("shape", [[2**63], [2**63, 2**63], [1] * 9, [True], [1.0], [-1, -1], None, {}, 1])
def test_impossible_shapes_in_the_manifest_are_refused(tmp_path, shape):
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    offset = [0] * len(shape) if isinstance(shape, list) else shape
    claim(path, [(0, offset, shape)], shape)
    assert_refused(path, {"w": torch.zeros(1)}, rf"manifest\.json: not a manifest|{SHARD}: ")


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_json_of_100_mb_is_refused_unread(tmp_path, file):
    path = confirmed(tmp_path / "c", GOOD_SHARD)
    manifest = as_written(path)
    manifest["files"]["state.json"]["size"] = 100 * 2**20
    rewrite(path, manifest)
    os.truncate(path / file, 100 * 2**20)
    assert_refused(path, {"w": torch.zeros(1)}, f"{file}: 104857600 bytes are too many for it")


def test_refusing_what_is_hostile_takes_no_memory(tmp_path):
    """Each hostile shard, and manifests of impossible shapes, in one process whose peak is measured."""
    for kind, shard in HOSTILE.items():
        confirmed(tmp_path / kind, shard)
    script = """
import resource, sys, torch
from pathlib import Path
from minillm import checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for path in Path(sys.argv[1]).iterdir():
    try:
        checkpoint.load_tensors(path, {"w": torch.zeros(1)})
    except ValueError:
        refused += 1
print(refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    refused, megabytes = map(int, result.stdout.split())
    assert refused == len(HOSTILE)
    assert megabytes < 50


def test_the_hostile_cases_differ_from_a_good_one_only_in_what_they_test(tmp_path):
    into = {"w": torch.zeros(1)}
    checkpoint.load_tensors(confirmed(tmp_path / "c", GOOD_SHARD), into)
    assert into["w"].item() == 1


# --- saving that fails, or is killed ---------------------------------------------------------------------------------


def test_disk_full_while_saving_leaves_the_earlier_checkpoint(disk):
    place, fill = disk
    first = checkpoint.save(place / "checkpoints", 1, make_tensors(), STATE, keep_last=1)
    fill()
    with pytest.raises(ValueError, match=r"cannot be written: (the disk is full|the file would be larger)"):
        checkpoint.save(place / "checkpoints", 2, {"large": torch.zeros(100_000)}, STATE, keep_last=1)
    assert names(place / "checkpoints") == ["step-00000001"]
    assert checkpoint.latest(place / "checkpoints") == first


def failing(monkeypatch, fail_at: int, error: Exception) -> list[str]:
    """Every opening for writing, fsync and rename of a save, in order; the one numbered `fail_at` raises."""
    calls = []

    def watch(owner, name, is_write=lambda *args: True):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if is_write(*args):
                calls.append(name)
                if len(calls) == fail_at:
                    raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(os, "fsync")
    watch(os, "replace")
    watch(Path, "rename")
    watch(Path, "mkdir")
    watch(checkpoint.folder, "write_shard")
    watch(Path, "write_bytes")
    return calls


def test_failing_at_any_step_of_a_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    """Each fsync, rename and write of a save fails in turn, for a new step and for one that is replaced."""
    tensors = make_tensors(1)
    for step in (1, 2):
        at = 0
        while True:
            at += 1
            directory = tmp_path / f"{step}-{at}"
            checkpoint.save(directory, 1, tensors, STATE)
            with monkeypatch.context() as patch:
                calls = failing(patch, at, OSError(errno.ENOSPC, "No space left on device"))
                try:
                    checkpoint.save(directory, step, make_tensors(2), STATE, keep_last=1)
                except ValueError as error:
                    assert "the disk is full" in str(error)  # noqa: PT017
                    assert "step-00000001" in names(directory)
            found = checkpoint.latest(directory)
            into = blank(tensors)
            checkpoint.load_tensors(found, into)
            assert same(into, tensors) or same(into, make_tensors(2))
            assert not [name for name in names(directory) if name.endswith(".tmp")]
            if len(calls) < at:  # nothing failed any more
                assert same(into, make_tensors(2))
                break
        assert at > 10


def test_read_only_directory():
    """As another user where root would be let through whatever the mode says."""
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(0o755)
        first = checkpoint.save(directory / "checkpoints", 1, make_tensors(), STATE)
        for folder in (directory / "checkpoints", first):
            folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match="cannot be written: no permission to write there"):
                checkpoint.save(directory / "checkpoints", 2, make_tensors(), STATE, keep_last=1)
            assert checkpoint.latest(directory / "checkpoints") == first
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
    finally:
        for folder in (directory / "checkpoints", first):
            folder.chmod(0o755)
        shutil.rmtree(directory)


KILLED_SAVE = """
import os, signal, sys
import torch
from minillm import checkpoint

def save_and_die(directory, step, at):
    '''SIGKILL at the `at`-th time that saving asks the system to open, make, rename, remove or flush something.'''
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "flush"):
            if event == "flush" or str(directory) in str(args[0]):
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
    fsync = os.fsync
    os.fsync = lambda handle: (hook("flush", ()), fsync(handle))
    sys.addaudithook(hook)
    checkpoint.save(directory, step, {"w": torch.full((1000,), 2.0)}, {"step": step}, keep_last=1)

torch.set_num_threads(1)
for line in sys.stdin:  # one save a line: each in a process of its own, forked so that torch is imported once
    directory, step, at = line.split()
    child = os.fork()
    if child == 0:
        save_and_die(directory, int(step), int(at))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed_save():
    """save(directory, step, at): in another process that is killed at its `at`-th system call; returns its status."""
    command = [sys.executable, "-c", KILLED_SAVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def save(directory: Path, step: int, at: int) -> int:
            process.stdin.write(f"{directory} {step} {at}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield save
        process.stdin.close()


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_kill_during_save_leaves_a_whole_checkpoint(tmp_path, killed_save, step):
    """At each of its system calls in turn: what is found is the old state or the new one, and saving goes on."""
    found = []
    for at in range(1, 100):
        directory = tmp_path / str(at)
        checkpoint.save(directory, 1, {"w": torch.full((1000,), 1.0)}, {"step": 1})
        status = killed_save(directory, step, at)
        into = {"w": torch.zeros(1000)}
        checkpoint.load_tensors(checkpoint.latest(directory), into)
        found.append(into["w"][0].item())
        assert torch.equal(into["w"], torch.full((1000,), found[-1]))
        checkpoint.save(directory, 3, {"w": torch.full((1000,), 3.0)}, {"step": 3}, keep_last=1)
        assert names(directory) == ["step-00000003"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0
    assert len(found) > 15
    assert found == sorted(found)  # the old one until the commit, the new one ever after
    assert set(found) == {1.0, 2.0}
