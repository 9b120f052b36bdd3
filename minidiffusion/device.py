"""Which device and which dtype: the only place that names them."""

import math
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
KINDS = ("auto", "cuda", "mps", "xpu", "cpu")
NAMES = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
SHORT = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8",
}  # fmt: skip
MEMINFO = Path("/proc/meminfo")
TURNS, ENOUGH = 10, 0.01
"""Timings of each of two products; no more after two of them once this many seconds have passed."""
MARGIN = 0.8
"""Of float32's time: what is about as fast must not be chosen by chance."""


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


@cache
def multiplies_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies numbers of this type right, and faster than float32.

    A processor is timed, once a process: what it has a unit for is not what its libraries use.
    On two cores bf16 takes 0.5 of float32's time where it has a unit, 20 times as long elsewhere.
    """
    if dtype == torch.float32:
        return True
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.is_available():
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    with ThreadPoolExecutor(1) as alone:  # where no autocast and no mode of the caller's reaches
        return alone.submit(_timed_faster, dtype).result()


def _timed_faster(dtype: torch.dtype) -> bool:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread that waits for another tells no time
    try:
        products = _products(dtype), _products(torch.float32, dtype == torch.int8)
        return (dtype != torch.int8 or _exact(products[0]())) and faster(*products)
    finally:
        torch.set_num_threads(threads)


def _products(dtype: torch.dtype, matrix_only: bool = False) -> Callable[[], object]:
    """A matrix product, and a convolution where there is one of this type: 17 MFLOP."""
    matrix = torch.full((160, 160), 127, dtype=dtype)
    if dtype == torch.int8:
        return lambda: torch._int_mm(matrix, matrix)
    if matrix_only:
        return lambda: matrix @ matrix
    image = torch.ones(1, 48, 16, 16, dtype=dtype)
    kernel = torch.ones(48, 48, 3, 3, dtype=dtype)
    return lambda: (matrix @ matrix, torch.conv2d(image, kernel, padding=1))


def _exact(sums: object) -> bool:
    """Before VNNI a processor's sums of two products of int8 end at 2^15."""
    return bool(torch.all(torch.as_tensor(sums) == 160 * 127**2))


def faster(
    work: Callable[[], object], than: Callable[[], object],
    clock: Callable[[], float] = time.thread_time,
) -> bool:  # fmt: skip
    """Whether one function takes less time than another, by the least of several turns.

    clock: this thread's own seconds, which other programs on the same cores do not lengthen.
    """
    least, began = [math.inf, math.inf], clock()
    for turn in range(TURNS):
        for i, function in enumerate((work, than)):
            start = clock()
            function()
            least[i] = min(least[i], clock() - start)
        if turn and clock() - began > ENOUGH:
            break
    return least[0] < MARGIN * least[1]


def settle(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What weights are held in. auto: bf16 where the hardware multiplies it faster, else fp32."""
    if precision != "auto":
        return precision
    # Of mps no speed is known here.
    fast = device.type != "mps" and multiplies_fast(torch.bfloat16, device)
    return "bf16" if fast else "fp32"


def arithmetic(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What training multiplies in: fp32, with a warning, where bf16 was asked for and is slow."""
    settled = settle(precision, device)
    if settled == "bf16" and not multiplies_fast(torch.bfloat16, device):
        warnings.warn(
            f"precision: bf16: slow on this {device.type}; computing in fp32", stacklevel=2
        )
        return "fp32"
    return settled


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
    """Memory that a run may still take; on a Mac, which does not tell, all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


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
