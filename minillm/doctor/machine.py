"""What a machine has besides its devices: each probe is asked by itself, and one that fails says why in its place."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minillm.doctor.devices import examine_devices

# The packages of each extra in setup.py that the library imports, by the name they are imported under.
EXTRAS = {
    "data": ("pyarrow",),
    "hf": ("tokenizers", "huggingface_hub"),
    "track": ("tensorboard", "wandb"),
    "plot": ("matplotlib",),
    "eval": ("sacrebleu", "rouge_chinese", "jieba"),
}
CORE = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")
COMPILERS = ("g++", "clang++", "c++", "cl")
CGROUP = Path("/sys/fs/cgroup")


def examine(seconds: float = 10.0, places: dict[str, str] | None = None) -> dict[str, Any]:
    """All that can be found out, as plain values that JSON can hold; measuring takes at most about `seconds`.

    Args: places, name and path of the directories whose disk is looked at.
    """
    probes: dict[str, Callable[[], Any]] = {
        "python": probe_python,
        "torch": probe_torch,
        "cpu": probe_cpu,
        "memory": probe_memory,
        "disk": lambda: {
            name: probed(lambda path=path: probe_disk(Path(path))) for name, path in (places or {}).items()
        },
        "extras": lambda: {extra: {name: version_of(name) for name in names} for extra, names in EXTRAS.items()},
        "distributed": probe_distributed,
        "compile": probe_compile,
        "nvidia": probe_nvidia,
        "devices": lambda: examine_devices(seconds),
    }
    return {name: probed(probe) for name, probe in probes.items()}


def probed(probe: Callable[[], Any]) -> Any:
    """What a probe finds, or `{"failed": reason}`: one that fails keeps no other from answering."""
    try:
        return probe()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def version_of(name: str) -> str | None:
    """The version of an installed package; None where it cannot be imported."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def probe_python() -> dict:
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "packages": {name: version_of(name) for name in CORE},
    }


def probe_torch() -> dict:
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,  # what it was built for; None for a build without
        "rocm": torch.version.hip,
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerator": str(torch.accelerator.current_accelerator(check_available=True) or "") or None,
    }


def probe_cpu() -> dict:
    return {
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def usable_cores() -> int:
    """Cores that this process may use: fewer where it is bound to some, or where a container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_line(CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def probe_memory() -> dict:
    """Bytes: of the machine, free now, and what a container may use (none: no limit)."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    if Path("/proc/meminfo").exists():  # counts what the system would give back, which "free" does not
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = read_line(CGROUP / "memory.max")
    return {"total": page * pages, "available": free, "limit": int(limit) if limit.isdigit() else None}


def read_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def probe_disk(path: Path) -> dict:
    """Bytes free where a directory is, or would be made."""
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {"path": str(path), "free": usage.free, "total": usage.total, "writable": os.access(place, os.W_OK)}


def probe_distributed() -> dict:
    if not torch.distributed.is_available():
        return {"available": False}
    return {
        "available": True,
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
        "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
    }


def probe_compile() -> dict:
    """What torch.compile needs: a C++ compiler and Python's headers for the CPU, triton for a GPU."""
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    triton = version_of("triton")
    return {
        "compiler": compiler,
        "python_headers": headers,
        "triton": triton,
        "cpu": bool(compiler and headers),
        "gpu": bool(compiler and headers and triton),
    }


def probe_nvidia() -> dict:
    """Whether an NVIDIA driver is there, whatever torch was built for."""
    version = read_line(Path("/proc/driver/nvidia/version")).partition("\n")[0]
    return {"driver": version or None, "nvidia_smi": shutil.which("nvidia-smi")}
