"""`minillm doctor` says what there is and what there is not, and never fails for what is missing."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from minillm import cli
from minillm.distributed.device import best_precision
from minillm.doctor import advice, devices, examine, machine, report
from minillm.log import run_command

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return examine(0.2, {"run.dir": str(tmp_path_factory.mktemp("place") / "runs" / "not" / "there")})


def first(found):
    return found["devices"][0]


def test_every_probe_answers_on_this_machine(found):
    assert not [name for name, section in found.items() if "failed" in section]
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["cores"]
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["disk"]["run.dir"]["free"] > 0
    assert found["disk"]["run.dir"]["writable"]
    assert first(found)["device"] == "cpu"


def test_rates_are_measured_for_each_precision_and_size(found):
    rates = first(found)["matmul_flops"]
    assert list(rates) == ["fp32", "bf16"]
    assert 1e8 < rates["fp32"]["256"] < 1e14
    assert 1e8 < first(found)["copy_bytes_per_second"] < 1e13


def test_a_product_that_would_take_too_long_is_left_out(monkeypatch):
    asked = []

    def slow(device, dtype, size, seconds):
        asked.append(size)
        return 1e6

    monkeypatch.setattr(devices, "matmul_flops", slow)
    assert devices.product_rates(torch.device("cpu"), "bf16", 0.1) == {"256": 1e6, "1024": None}
    assert asked == [256]


def test_the_precision_of_products_is_afterwards_as_it_was():
    before = torch.get_float32_matmul_precision()
    with devices.fp32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_attention_paths_that_work_on_a_cpu_are_found_and_the_others_say_why(found):
    paths = first(found)["attention"]
    assert {name for name, path in paths.items() if path["usable"]} >= {"plain", "sdpa flash", "sdpa math"}
    for name in ("sdpa cudnn", "flex", "varlen"):
        assert not paths[name]["usable"]
        assert paths[name]["reason"]


def test_a_probe_that_fails_keeps_no_other_from_answering(monkeypatch):
    def broken():
        raise RuntimeError("no such thing\nin two lines")

    for name in ("probe_memory", "probe_compile", "probe_cpu", "probe_torch"):
        monkeypatch.setattr(machine, name, broken)
    monkeypatch.setattr(machine, "examine_devices", lambda seconds: broken())
    found = examine(0.0, {"run.dir": "runs"})
    assert found["devices"] == found["memory"] == {"failed": "RuntimeError: no such thing"}
    assert found["python"]["executable"] == sys.executable
    assert "could not be examined: RuntimeError: no such thing" in report(found)


def test_a_device_that_cannot_do_something_still_tells_the_rest(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("not implemented for this device")

    monkeypatch.setattr(devices, "matmul_flops", broken)
    monkeypatch.setattr(devices, "try_plain", broken)
    device = devices.examine_device(torch.device("cpu"), 0.0)
    assert device["matmul_flops"]["fp32"] == {"256": None}
    assert device["attention"]["plain"] == {"usable": False, "reason": "not implemented for this device"}
    assert device["attention"]["sdpa math"]["usable"]
    found = {name: {"failed": "x"} for name in ("python", "torch", "cpu", "memory", "disk", "extras")}
    found |= {name: {"failed": "x"} for name in ("distributed", "compile", "nvidia")} | {"devices": [device]}
    assert "not plain: not implemented for this device" in report(found)


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert machine.version_of("tokenizers") is None
    extras = {"hf": {"tokenizers": None, "huggingface_hub": "1.0"}, "plot": {"matplotlib": "3"}}
    lines = advice(found | {"extras": extras})
    assert "pip install 'minillm[hf]' for what needs tokenizers" in lines
    assert not any("minillm[plot]" in line for line in lines)
    assert "hf: tokenizers missing, huggingface_hub 1.0" in report(found | {"extras": extras})


def test_the_extras_are_those_of_the_setup():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    tables = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"]
    extras = ast.literal_eval(tables[0].value)
    assert {name: list(packages) for name, packages in machine.EXTRAS.items()} == {
        name: extras[name] for name in extras if name not in ("bench", "test")
    }


NVIDIA = {"driver": "NVRM version: 595", "nvidia_smi": "/usr/bin/nvidia-smi"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nvidia": NVIDIA, "torch": {"cuda": None, "accelerator": None}}, "torch is built without CUDA"),
        ({"nvidia": NVIDIA, "torch": {"cuda": "13.0", "accelerator": None}}, "sees no GPU: the driver may be too old"),
        ({"nvidia": {}, "torch": {"cuda": "13.0", "accelerator": None}}, "there is no NVIDIA driver"),
        ({"cpu": {"usable_cores": 8, "threads": 1}}, "OMP_NUM_THREADS=8 to train on the CPU: torch uses 1"),
        ({"compile": {"compiler": None, "python_headers": True}}, "would need a C++ compiler (apt install g++)"),
        (
            {"torch": {"accelerator": "cuda"}, "compile": {"compiler": "g++", "python_headers": True, "triton": None}},
            "train.compile false; it would need triton",
        ),
        ({"compile": {"cpu": True}, "torch": {}}, "train.compile true for a run of hours"),
        ({"disk": {"run.dir": {"path": "runs", "free": 2**30, "writable": True}}}, "1.0 GiB are left for runs"),
        ({"disk": {"run.dir": {"path": "runs", "free": 2**40, "writable": False}}}, "runs cannot be written"),
    ],
)
def test_a_finding_calls_for_its_advice(changes, said):
    assert any(said in line for line in advice(changes))
    assert not any(said in line for line in advice({}))


def test_the_precision_advised_is_the_one_that_training_takes(found):
    [line] = [line for line in advice(found) if "train.precision" in line]
    assert line.startswith(f"cpu: train.precision {best_precision(torch.device('cpu'))}, which is what auto means")
    rates = first(found)["matmul_flops"]
    device = {
        "device": "cuda:0",
        "precision": "bf16",
        "matmul_flops": rates | {"bf16": {"256": 4 * rates["fp32"]["256"]}},
    }
    assert "bf16 4" in " ".join(advice({"devices": [device]}))


def test_cores_are_those_that_a_container_grants(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    before = machine.usable_cores()
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert machine.usable_cores() == 1 <= before
    assert machine.probe_memory()["limit"] == 2**30
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores() == before


def test_the_command_prints_a_table_or_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(cli.dispatch, ["doctor", "--seconds", "0.2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) >= {"python", "torch", "cpu", "memory", "disk", "extras", "compile", "devices", "advice"}
    assert set(said["disk"]) == {"run.dir", "data.cache_dir"}
    assert run_command(cli.dispatch, ["doctor", "--seconds", "0.0"]) == 0
    said = capsys.readouterr().out
    for expected in ("matmul, GFLOP/s", "memory copy", "attention", "what to set", sys.executable):
        assert expected in said
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


@pytest.mark.gpu
def test_a_gpu_is_measured_in_each_precision():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    device = devices.examine_device(torch.device("cuda", 0), 0.5)
    assert device["memory"] > device["free_memory"] > 0
    assert device["precision"] == "bf16"
    assert device["matmul_flops"]["bf16"]["4096"] > device["matmul_flops"]["fp32"]["4096"]
    assert device["attention"]["sdpa flash"]["usable"]
