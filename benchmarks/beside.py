"""What the scripts that time minillm beside other libraries share: a peer's model, a watch, and what is printed."""

import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from minillm.distributed.device import synchronize
from minillm.load import export_hugging_face, save
from minillm.model.transformer import Transformer

LLAMA_26M = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 1408, "tie_embeddings": True}


# --- peers ------------------------------------------------------------------------------------------------------------


def importable(names: Sequence[str]) -> list[str]:
    """Those of the libraries that can be imported; the others are named."""
    found = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            found.append(name)
    return found


def as_transformers(model: Transformer):
    """transformers' model of the same shape with the same weights."""
    with TemporaryDirectory() as folder:
        save(model, None, f"{folder}/ours")
        return transformers_from(export_hugging_face(f"{folder}/ours", f"{folder}/theirs"))


def transformers_from(folder: Path):
    """transformers' model of a folder, in memory of its own, where its own reading would map the file."""
    import transformers
    from safetensors.torch import load_model

    transformers.logging.set_verbosity_error()
    found = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    load_model(found, folder / "model.safetensors")
    return found


# --- time -------------------------------------------------------------------------------------------------------------


class Seconds(NamedTuple):
    wall: float
    cpu: float


def timed(run: Callable[[Any], object], argument: Any, device: torch.device) -> Seconds:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run(argument)
    synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


class Compared(NamedTuple):
    """A contender's speed, and how many times as long as minillm it took."""

    name: str
    rate: float  # of whatever was counted, a second
    wall: float
    cpu: float


def compared(seconds: dict[str, list[Seconds]], amount: float) -> Iterator[Compared]:
    """Medians over the rounds of each contender, in all of which it did `amount` of work; ratios are within a round."""
    own = seconds["minillm"]
    for name, took in seconds.items():
        rate = amount / statistics.median(one.wall for one in took)
        wall = statistics.median(a.wall / b.wall for a, b in zip(took, own))
        yield Compared(name, rate, wall, statistics.median(a.cpu / b.cpu for a, b in zip(took, own)))


# --- memory -----------------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory_during(run: Callable[[], object]) -> int:
    """Bytes of memory that a call needs, beside what the process has before it (from /proc, so on Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes that /proc says this process has, or has had at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


# --- what is printed --------------------------------------------------------------------------------------------------


def machine(device: torch.device, threads: int, peers: Sequence[str]) -> str:
    """Where and with what this was measured."""
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for peer in peers:
        try:
            versions.append(f"{peer} {importlib.metadata.version(peer)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type != "cpu":
        where = torch.get_device_module(device).get_device_name(device)
    else:
        where = f"{cpu_name()}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f} at the start"
    return f"{where}; {', '.join(versions)}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
