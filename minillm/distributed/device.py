"""The device that a process computes on: which it is, how fast, and how much memory there is."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

# Dense bf16 peaks in FLOP/s, from the makers' datasheets; the first name found in the device's name counts.
DATASHEET_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def find_device(name: str) -> torch.device:
    """The device of that name, "auto" being the best one here. Raises ValueError when it cannot compute."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device makes tensors, but has no numbers to put into them
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"run.device: {name!r} cannot be used here ({reason}); auto finds what can") from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.05) -> float:
    """Measured FLOP/s of a square matrix product."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a  # the first call pays for loading the kernel
    synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count < 2:
        a @ a
        synchronize(device)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def best_precision(device: torch.device) -> str:
    """What `precision = auto` means: "bf16" on an accelerator that multiplies it faster than fp32, else "fp32".

    On a CPU it is fp32: even where a large bf16 product is fast, the small ones and the casts around them are not.
    """
    if device.type == "cpu":
        return "fp32"
    try:
        flops = {dtype: matmul_flops(device, dtype, 2048) for dtype in (torch.bfloat16, torch.float32)}
    except RuntimeError:
        return "fp32"
    return "bf16" if flops[torch.bfloat16] > flops[torch.float32] else "fp32"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that MFU is a share of: a known device's datasheet in half precision, else a measured matmul's."""
    if device.type != "cpu" and dtype in (torch.bfloat16, torch.float16):
        name = getattr(torch.get_device_module(device), "get_device_name", lambda _: "")(device)
        for key, flops in DATASHEET_BF16.items():
            if key in name:
                return flops
    return matmul_flops(device, dtype, 1024 if device.type == "cpu" else 4096, seconds=0.2)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device where it counts them, else of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take: of the device where it tells, else of the machine; None where unknown."""
    if device.type != "cpu":
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        return ask(device)[0] if ask else None
    found = []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:  # ulimit -v
            found.append(limit - pages * resource.getpagesize())
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a container's share; "max", which is no number, where it has none
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None
