"""What was found, as lines for a person, and one line of advice for each finding that calls for something."""

from collections.abc import Callable, Iterator
from typing import Any

GIB = 2**30
LITTLE_DISK = 20 * GIB  # some checkpoints of a model of a few hundred million parameters, with its optimizer


def report(found: dict[str, Any]) -> str:
    """Sections of lines, and the advice at the end. A probe that failed says so in its section."""
    lines = []
    for title, section in SECTIONS.items():
        lines += [
            f"{title if not number else '':<12} {line}" for number, line in enumerate(lines_of(section, found[title]))
        ]
    for device in found["devices"] if isinstance(found["devices"], list) else []:
        lines += ["", f"{device['device']:<12} {device['name'] or 'name unknown'}"]
        lines += [f"{'':<12} {line}" for line in device_lines(device)]
    return "\n".join([*lines, "", "what to set", *(f"  - {line}" for line in advice(found))])


def lines_of(section: Callable[[dict], list[str]], values: Any) -> list[str]:
    if isinstance(values, dict) and "failed" in values:
        return [f"could not be examined: {values['failed']}"]
    return section(values)


def amount(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / GIB:.1f} GiB"


def yes(value: Any) -> str:
    return "yes" if value else "no"


# --- sections ---------------------------------------------------------------------------------------------------------


def python_lines(values: dict) -> list[str]:
    packages = ", ".join(f"{name} {version or 'MISSING'}" for name, version in values["packages"].items())
    return [f"{values['version']}, {values['executable']}", values["system"], packages]


def torch_lines(values: dict) -> list[str]:
    built = f"CUDA {values['cuda']}" if values["cuda"] else f"ROCm {values['rocm']}" if values["rocm"] else "the CPU"
    accelerator = values["accelerator"] or "none"
    return [
        f"{values['version']}, built for {built}; accelerator: {accelerator}; on the CPU {values['cpu_instructions']}"
    ]


def cpu_lines(values: dict) -> list[str]:
    said = values["OMP_NUM_THREADS"]
    said = "OMP_NUM_THREADS is not set" if said is None else f"OMP_NUM_THREADS={said}"
    return [f"{values['usable_cores']} of {values['cores']} cores usable; torch uses {values['threads']} ({said})"]


def memory_lines(values: dict) -> list[str]:
    limit = f", limited to {amount(values['limit'])} here" if values["limit"] else ""
    return [f"{amount(values['available'])} free of {amount(values['total'])}{limit}"]


def disk_lines(values: dict) -> list[str]:
    lines = []
    for name, place in values.items():
        if "failed" in place:
            lines.append(f"{name}: could not be examined: {place['failed']}")
            continue
        writable = "" if place["writable"] else ", NOT WRITABLE"
        lines.append(f"{name} ({place['path']}): {amount(place['free'])} free of {amount(place['total'])}{writable}")
    return lines or ["no place named"]


def extras_lines(values: dict) -> list[str]:
    return [
        f"{extra}: " + ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        for extra, packages in values.items()
    ]


def distributed_lines(values: dict) -> list[str]:
    if not values["available"]:
        return ["this build of torch has none"]
    version = f" {values['nccl_version']}" if values["nccl_version"] else ""
    return [f"gloo {yes(values['gloo'])}, NCCL {yes(values['nccl'])}{version}"]


def compile_lines(values: dict) -> list[str]:
    parts = (
        f"C++ compiler {values['compiler'] or 'missing'}",
        f"Python headers {'found' if values['python_headers'] else 'missing'}",
        f"triton {values['triton'] or 'missing'}",
    )
    return [f"on the CPU {yes(values['cpu'])}, on a GPU {yes(values['gpu'])} ({', '.join(parts)})"]


def nvidia_lines(values: dict) -> list[str]:
    return [values["driver"] or values["nvidia_smi"] or "no driver"]


SECTIONS: dict[str, Callable[[dict], list[str]]] = {
    **{"python": python_lines, "torch": torch_lines, "cpu": cpu_lines, "memory": memory_lines, "disk": disk_lines},
    **{"extras": extras_lines, "distributed": distributed_lines, "compile": compile_lines, "nvidia": nvidia_lines},
}


def device_lines(device: dict) -> list[str]:
    memory = [f"{amount(device['free_memory'])} free of {amount(device['memory'])}"] if device["memory"] else []
    capability = [f"compute capability {'.'.join(map(str, device['capability']))}"] if device["capability"] else []
    lines = [", ".join(memory + capability)] if memory or capability else []
    sizes = list(dict.fromkeys(size for rates in device["matmul_flops"].values() for size in rates))
    lines.append(f"{'matmul, GFLOP/s':<17}" + "".join(f"{size:>10}" for size in sizes))
    for name, rates in device["matmul_flops"].items():
        cells = (f"{rates[size] / 1e9:>10,.1f}" if rates.get(size) else f"{'-':>10}" for size in sizes)
        lines.append(f"{name:>15}  " + "".join(cells))
    copy = device["copy_bytes_per_second"]
    lines.append(f"memory copy      {f'{copy / 1e9:.1f} GB/s, read and written' if copy else 'could not be measured'}")
    lines.append("attention        " + ", ".join(name for name, path in device["attention"].items() if path["usable"]))
    lines += [f"    not {name}: {path['reason']}" for name, path in device["attention"].items() if not path["usable"]]
    return lines


# --- advice -----------------------------------------------------------------------------------------------------------


def advice(found: dict[str, Any]) -> list[str]:
    """One line for each finding that calls for something."""
    return [line for rule in RULES for line in rule(found)]


def value(found: dict[str, Any], *keys: str) -> Any:
    """What was found under some keys, None where it was not."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def advise_build(found: dict) -> Iterator[str]:
    driver, cuda = (
        value(found, "nvidia", "driver") or value(found, "nvidia", "nvidia_smi"),
        value(found, "torch", "cuda"),
    )
    if value(found, "torch", "accelerator"):
        return
    if driver and not cuda:
        yield "an NVIDIA driver is here, but torch is built without CUDA: install a CUDA build of it (docs/setup.md)"
    elif driver:
        yield f"torch is built for CUDA {cuda} but sees no GPU: the driver may be too old for it (docs/setup.md)"
    elif cuda:
        yield f"torch is built for CUDA {cuda}, and there is no NVIDIA driver: install one, or train on the CPU"


def advise_precision(found: dict) -> Iterator[str]:
    devices = value(found, "devices")
    for device in devices if isinstance(devices, list) else []:
        gains = {name: gain(device, name) for name in ("bf16", "fp16", "tf32")}
        measured = ", ".join(f"{name} {times:.2g}" for name, times in gains.items() if times)
        if device["precision"]:
            said = f" (products, times fp32: {measured})" if measured else ""
            yield f"{device['device']}: train.precision {device['precision']}, which is what auto means there{said}"


def gain(device: dict, name: str) -> float | None:
    """How many times faster than in fp32 the largest product is that was measured in both."""
    fp32, other = device["matmul_flops"]["fp32"], device["matmul_flops"].get(name, {})
    both = [size for size in fp32 if fp32[size] and other.get(size)]
    return other[both[-1]] / fp32[both[-1]] if both else None


def advise_threads(found: dict) -> Iterator[str]:
    usable, threads = value(found, "cpu", "usable_cores"), value(found, "cpu", "threads")
    if usable and threads and threads != usable:
        yield f"OMP_NUM_THREADS={usable} to train on the CPU: torch uses {threads}, and {usable} cores are usable"
    if usable:
        yield f"data.workers {usable}, which is what none means here: one process a core"


def advise_compile(found: dict) -> Iterator[str]:
    values, on_gpu = value(found, "compile") or {}, bool(value(found, "torch", "accelerator"))
    if values.get("gpu" if on_gpu else "cpu"):
        yield "train.compile true for a run of hours: it costs minutes at the start"
        return
    if "compiler" not in values:  # the probe failed
        return
    needed = {
        "a C++ compiler (apt install g++)": values.get("compiler"),
        "Python's headers (apt install python3-dev)": values.get("python_headers"),
        "triton (pip install triton)": values.get("triton") or not on_gpu,
    }
    yield f"train.compile false; it would need {', '.join(name for name, there in needed.items() if not there)}"


def advise_disk(found: dict) -> Iterator[str]:
    for name, place in (value(found, "disk") or {}).items():
        if not isinstance(place, dict) or "free" not in place:
            continue
        if not place["writable"]:
            yield f"{name}: {place['path']} cannot be written; choose another directory"
        elif place["free"] < LITTLE_DISK:
            yield f"{name}: {amount(place['free'])} are left for {place['path']}; a large run needs more, elsewhere"


def advise_extras(found: dict) -> Iterator[str]:
    for extra, packages in (value(found, "extras") or {}).items():
        missing = [name for name, version in packages.items() if version is None] if isinstance(packages, dict) else []
        if missing:
            yield f"pip install 'minillm[{extra}]' for what needs {' and '.join(missing)}"


RULES = (advise_build, advise_precision, advise_threads, advise_compile, advise_disk, advise_extras)
