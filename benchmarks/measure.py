"""Measuring in turns: what is compared alternates in one process, and only ratios are read.

On a shared machine the speed drifts from minute to minute. Two works that take turns see the same
drift, so the ratio within a round holds where the seconds do not.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minidiffusion.shapes import Cond

Work = Callable[[], object]
GEMM = 2048
"""Side of the square matrices whose product gives the machine's matrix rate."""

notes = Console(stderr=True)


class Ratio(NamedTuple):
    """How often the second fits into the first, over rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round; the order turns round, a first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        names = list(works) if round_ % 2 else list(reversed(works))
        for name in names:
            began = time.perf_counter()
            works[name]()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Round by round, slow over fast: above 1 where ``fast`` needed less time."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def product(dtype: torch.dtype) -> Work:
    """One product of square matrices; its work is 2 * GEMM^3."""
    a, b = (torch.randn(GEMM, GEMM).to(dtype) for _ in range(2))
    return lambda: a @ b


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def flops(network: nn.Module, shape: Sequence[int], classes: int) -> float:
    """Of forward and backward, a picture: products and convolutions, on tensors without contents.

    The plain form of attention is counted: the counter does not know the CPU's fused one.
    """
    network = deepcopy(network).to("meta")
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        x, t, labels = torch.rand(2, *shape), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network(x, t, Cond(labels=labels if classes else None)).sum().backward()
    return counter.get_total_flops() / 2


def machine() -> str:
    """One line on what was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{named[0] if named else platform.machine()}, {torch.get_num_threads()} threads{busy}, "
        f"torch {torch.__version__}"
    )


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout that is markdown as it stands."""
    table = Table(*header, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(width=240)
    with console.capture() as lines:
        console.print(table)
    body = [line.rstrip() for line in lines.get().splitlines() if line.strip()]
    print("", title, "", *body, sep="\n", flush=True)
