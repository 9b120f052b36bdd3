"""An accelerator's clock and the rate of its matrix products."""

import statistics
import time

import torch
from measure import Work


def seconds(work: Work, count: int) -> float:
    """The median, each with the queue empty before and after."""
    each = []
    for k in range(count + 3):
        torch.accelerator.synchronize()
        began = time.perf_counter()
        work()
        torch.accelerator.synchronize()
        if k >= 3:
            each.append(time.perf_counter() - began)
    return statistics.median(each)


def matrix_rate(where: torch.device, side: int = 8192) -> float:
    """Operations a second of one large bf16 product."""
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, 20)


def kind(where: torch.device) -> str:
    name = getattr(torch.get_device_module(where), "get_device_name", lambda: where.type)
    return str(name())
