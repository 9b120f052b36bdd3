"""Limits that are derived from rounding, so that they hold on every processor.

Processors add in another order, fuse a product with a sum or not, and round exp and sin their own
way: a limit tuned to what one of them shows fails on the next. So no limit is a number once seen:

- `assert_parity`: the reference runs in float64, which is the truth, and in float32. In float32 we
  may be FACTOR times as far from the truth as the reference is; in float64, where all code that
  names float32 gets float64, as far as the reference's rounding is when eps is that of float64.
- `assert_near`: for closed forms, a stated number of roundings at the scale of the numbers.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from minidiffusion.diffusion import noise

FLOAT32 = np.float32
Run = Callable[..., Any]
EPS, SHORT, HALF = 2.0**-52, 2.0**-23, 2.0**-10
"""Of float64, float32 and float16: the step from 1 to the next number."""
FACTOR = 8
"""Times the reference's own rounding: two sound implementations differ by 1 to 3."""
FLOOR = 4
"""Roundings that a reference is taken to have if it happens to be exact, as a single sum may be."""


def check(error: float, limit: float, what: str) -> None:
    """Every comparison ends here."""
    assert error <= limit, f"{what}: {error:.2e}, allowed {limit:.2e}"


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def peak(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@torch.no_grad()
def assert_parity(ours: Run, theirs: Run, *given: Any, factor: float = FACTOR) -> Any:
    """ours(*given), which is returned, computes what theirs(*given) does.

    given: networks and tensors, copies of which are turned to float64. A run gives a tensor, or
    several.
    """
    results = run_both(ours, theirs, *given)
    for one in results:
        check_parity(*one, factor)
    found = tuple(one[0] for one in results)
    return found if len(found) > 1 else found[0]


def run_both(ours: Run, theirs: Run, *given: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each result: ours, theirs, and both again in float64."""
    found = [several(run(*given)) for run in (ours, theirs)]
    with all_in_float64():
        given = in_float64(given)
        found += [several(run(*given)) for run in (ours, theirs)]
    return list(zip(*found, strict=True))


def several(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def check_parity(
    found: Tensor, usual: Tensor, exact: Tensor, truth: Tensor, factor: float = FACTOR
) -> None:
    """Ours and the reference in a short type, and both in float64.

    The root mean square hardly depends on chance; the largest error shows what is wrong in one
    place only. A file named by MINIDIFFUSION_PARITY gets a line of figures: how far ours is from
    the reference in float64; how far ours, and the reference, are from that in the short type.
    """
    assert found.shape == usual.shape == exact.shape == truth.shape
    assert found.dtype == usual.dtype and exact.dtype == truth.dtype == torch.float64
    eps = torch.finfo(found.dtype).eps
    if log := os.environ.get("MINIDIFFUSION_PARITY"):
        shares = (rms(x - truth) / rms(truth) for x in (exact, found, usual))
        with Path(log).open("a") as file:
            print(os.environ["PYTEST_CURRENT_TEST"], *(f"{x:.1e}" for x in shares), file=file)
    for size in (rms, peak):
        rounding = factor * max(size(usual - truth), FLOOR * eps * size(truth))
        check(size(found - truth), rounding, f"{size.__name__} of what ours rounds away")
        check(size(exact - truth), rounding * EPS / eps, f"{size.__name__} apart in float64")


def in_float64(x: Any) -> Any:
    """A copy whose floating-point numbers are float64."""
    if isinstance(x, nn.Module):
        return deepcopy(x).double()
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        parts = [in_float64(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def assert_near(
    found: Any, wanted: Any, roundings: float, scale: Any = None, eps: float | None = None
) -> None:
    """found is wanted but for so many roundings, each of eps * scale.

    scale: the largest number of wanted, unless stated; a tensor is a scale for each number.
    eps: that of found's type, float64 for Python's numbers.
    """
    if eps is None:
        eps = torch.finfo(found.dtype).eps if isinstance(found, Tensor) else EPS
    found, wanted = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, wanted))
    assert found.shape == torch.broadcast_shapes(found.shape, wanted.shape)
    size = peak(wanted) if scale is None else scale
    check(peak((found - wanted) / size), roundings * eps, "difference over scale")


class Draws:
    """A generator of float32 numbers, which are then float64: the same noise for both."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        with mock.patch.object(np, "float32", FLOAT32):
            return self.generator.standard_normal(shape, dtype=FLOAT32).astype(np.float64)


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Who asks for float32 by name gets float64: sines of times, norms, schedulers' tables."""
    usual, stream = torch.get_default_dtype(), noise.stream
    with ExitStack() as patches:
        for place, name, value in (
            (torch, "float32", torch.float64), (torch, "float", torch.float64),
            (torch.Tensor, "float", torch.Tensor.double), (np, "float32", np.float64),
            (noise, "stream", lambda *key: Draws(stream(*key))),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(place, name, value))
        patches.callback(torch.set_default_dtype, usual)
        torch.set_default_dtype(torch.float64)
        yield
