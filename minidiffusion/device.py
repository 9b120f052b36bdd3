"""Which device and which dtype: the only place that names them."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
KINDS = ("auto", "cuda", "mps", "xpu", "cpu")
NAMES = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
MEMINFO = Path("/proc/meminfo")


def pick(name: str = "auto") -> torch.device:
    """The device of this name; "auto" takes cuda, mps, xpu or cpu, whichever is there first.

    Under torchrun each process takes the accelerator of its local rank. Raises ValueError for a
    device that this machine lacks.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
        "cpu": True,
    }
    kind = next(k for k, ok in there.items() if ok) if name == "auto" else name.split(":")[0]
    if not there.get(kind, False):
        usable = ", ".join(["auto", *(k for k, ok in there.items() if ok)])
        raise ValueError(f"device: {name!r} is not on this machine; allowed: {usable}")
    if kind in ("cuda", "xpu") and ":" not in name:
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    number, count = name.partition(":")[2], getattr(torch, kind).device_count()
    if ":" in name and not (number.isdecimal() and int(number) < count):
        raise ValueError(f"device: {name!r} is not on this machine; it has {count} of {kind}")
    return torch.device(kind if name == "auto" else name)


def settle(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        # torch has no public name for this; Intel's newer matrix unit implies the older one.
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "xpu" else "fp32"


def dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What weights are held in for drawing pictures."""
    return torch.bfloat16 if settle(precision, device) == "bf16" else torch.float32


def check(dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError for weights that a device cannot, or should not, work with."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: must be float32, bfloat16 or float16, got {dtype}")
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("dtype: float16 crawls on a CPU; allowed there: float32, bfloat16")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bf16, weights and sums in fp32; nothing at all for fp32."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def free_bytes(device: torch.device) -> int:
    """Memory that a run may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int:
    """Memory that a new program may take: of a CPU, what the system would clear for it as well."""
    if device.type == "cpu" and MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return free_bytes(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, on any device."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
