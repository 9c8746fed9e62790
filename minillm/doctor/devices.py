"""What each device can do and how fast: precisions, attention paths, products of matrices, copies.

Shapes: B batch, T queries and keys, H heads, d head_dim.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.distributed.device import best_precision, find_device, matmul_flops, synchronize
from minillm.model.kernels import has_flex, has_varlen

SIZES = {"cpu": (256, 1024), "accelerator": (1024, 4096, 8192)}
COPIED = {"cpu": 2**26, "accelerator": 2**30}  # bytes of a copy: more than caches hold
HEAD_DIM = 64  # of the attention that is tried
LEAST = 3  # products that `matmul_flops` takes at the least
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def examine_devices(seconds: float) -> list[dict[str, Any]]:
    """The CPU and every accelerator that can be used; `seconds` are divided among them."""
    devices = [torch.device("cpu")]
    accelerator = find_device("auto")
    if accelerator.type != "cpu":
        devices += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    return [examine_device(device, seconds / len(devices)) for device in devices]


def examine_device(device: torch.device, seconds: float) -> dict[str, Any]:
    """One device: what it is, and what it does in `seconds`."""
    dtypes = dtypes_of(device)
    share = seconds / (len(dtypes) * len(SIZES[kind_of(device)]) + 1)
    return {
        "device": str(device),
        **identity(device),
        "precision": tried(lambda: best_precision(device)),
        "matmul_flops": {name: product_rates(device, name, share) for name in dtypes},
        "copy_bytes_per_second": tried(lambda: copy_rate(device, share)),
        "attention": {name: usable(path, device) for name, path in attention_paths().items()},
    }


def kind_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "accelerator"


def identity(device: torch.device) -> dict[str, Any]:
    """Name and memory, as far as torch's module for the device tells them."""
    if device.type == "cpu":
        return {"name": processor_name(), "memory": None, "free_memory": None, "capability": None}
    module = torch.get_device_module(device)
    free, total = tried(lambda: module.mem_get_info(device)) or (None, None)
    capability = tried(lambda: module.get_device_capability(device))
    return {
        "name": tried(lambda: module.get_device_name(device)),
        "memory": total,
        "free_memory": free,
        "capability": list(capability) if isinstance(capability, tuple) else None,
    }


def processor_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        return None


def tried(probe: Callable[[], Any]) -> Any:
    """What a probe finds, None where it fails."""
    try:
        return probe()
    except Exception:
        return None


# --- rates ------------------------------------------------------------------------------------------------------------


def dtypes_of(device: torch.device) -> list[str]:
    """The precisions worth measuring: TF32 is a way in which some CUDA devices multiply fp32."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    capability = identity(device)["capability"]
    has_tf32 = device.type == "cuda" and torch.version.hip is None and capability is not None and capability[0] >= 8
    return ["fp32", *(["tf32"] if has_tf32 else []), "bf16", "fp16"]


def product_rates(device: torch.device, name: str, seconds: float) -> dict[str, float | None]:
    """FLOP/s of square products by size, `seconds` each; None where it fails, or would take much longer than that."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    rates: dict[str, float | None] = {}
    before = None
    for size in SIZES[kind_of(device)]:
        too_long = before is not None and LEAST * 2 * size**3 / before > 2 * max(seconds, 0.1)
        with fp32_products("high" if name == "tf32" else "highest"):
            before = None if too_long else tried(lambda size=size: matmul_flops(device, dtype, size, seconds))
        rates[str(size)] = before
        if before is None:
            break
    return rates


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """How fp32 matrices are multiplied for the time of a block: "highest", or "high", which is TF32 on CUDA."""
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes a second that a copy inside the device's memory reads and writes."""
    source = torch.ones(COPIED[kind_of(device)] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first touch pays for the pages
    synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count < 2:
        target.copy_(source)
        synchronize(device)
        count += 1
    return 2 * source.nbytes * count / (time.perf_counter() - start)


# --- attention --------------------------------------------------------------------------------------------------------


def attention_paths() -> dict[str, Callable[[torch.device], None]]:
    """Each way to compute attention, as a function that tries it forward and backward."""
    kernels = {
        f"sdpa {name}": lambda device, kernel=kernel: try_sdpa(device, kernel) for name, kernel in KERNELS.items()
    }
    return {"plain": try_plain, **kernels, "flex": try_flex, "varlen": try_varlen}


def usable(path: Callable[[torch.device], None], device: torch.device) -> dict[str, Any]:
    """Whether a path works on a device, and if not, why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once for each kernel that it leaves out
            path(device)
            synchronize(device)
    except Exception as error:
        reason = f"{error}".strip().partition("\n")[0].partition(". ")[0]
        return {"usable": False, "reason": reason[:120] or type(error).__name__}
    return {"usable": True, "reason": None}


def heads(device: torch.device) -> tuple[torch.Tensor, ...]:
    """q, k, v (B, H, T, d) that want gradients."""
    options = {"device": device, "dtype": training_dtype(device), "requires_grad": True}
    return tuple(torch.randn(1, 2, 128, HEAD_DIM, **options) for _ in range(3))


def training_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def try_plain(device: torch.device) -> None:
    q, k, v = heads(device)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, T)
    (scores.softmax(-1) @ v).sum().backward()


def try_sdpa(device: torch.device, kernel: SDPBackend) -> None:
    q, k, v = heads(device)
    with sdpa_kernel([kernel]):
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def try_flex(device: torch.device) -> None:
    if not has_flex(device, HEAD_DIM):
        raise RuntimeError("needs an accelerator and triton, which compiles it")


def try_varlen(device: torch.device) -> None:
    if not has_varlen(device, training_dtype(device), HEAD_DIM, grouped=False, causal=True, windowed=False):
        raise RuntimeError("torch's varlen_attn does not run here")
