"""No picture of NaN: whatever makes a number that is not finite is named, or done in float32."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from emoji_like import write_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import minidiffusion
from minidiffusion.pipelines.finite import HALF, FiniteGuard, NotFiniteError
from minidiffusion.pipelines.pipeline import Pipeline

PARTS: dict[str, Callable[[Pipeline], nn.Module]] = {
    "network": lambda pipe: pipe.network,
    "text_encoder": lambda pipe: pipe.text.encoder,
    "autoencoder": lambda pipe: pipe.autoencoder,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("finite") / "model.safetensors")


def loaded(file: Path, dtype: torch.dtype) -> Pipeline:
    """In any dtype: `load` keeps float16 off the CPU, where it is slow, not wrong."""
    pipe = minidiffusion.load(file, "cpu", dtype=torch.float32)
    for part in pipe.parts:
        part.to(dtype)
    return pipe


def work(pipe: Pipeline, part: str) -> Tensor:
    """What a picture asks of this part."""
    if part == "autoencoder":
        return pipe.decode(torch.linspace(-1, 1, 64).view(1, 4, 4, 4))
    return list(pipe.stream("a cat", num_steps=1, guidance_scale=2.0))[-1].x


def spoilt(out: Any, value: float, only: tuple[torch.dtype, ...]) -> Any:
    def change(x: Tensor) -> Tensor:
        return torch.full_like(x, value) if x.dtype in only else x

    return tree_map_only(Tensor, change, out)


@contextmanager
def planted(module: nn.Module, value: float, only: tuple[torch.dtype, ...]) -> Iterator[list[int]]:
    """The module's output is this value wherever it has one of these dtypes; how often it ran."""
    run: list[int] = []

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        run.append(1)
        return spoilt(out, value, only)

    handle = module.register_forward_hook(hook)
    try:
        yield run
    finally:
        handle.remove()


SILENT = "network.blocks.1.text.attention.q_norm"
"""What the last block's texts look for is asked of nobody."""


NAN, INF = float("nan"), float("inf")
QUICK = [(torch.float32, NAN), (torch.bfloat16, INF), (torch.float16, INF)]
KINDS = [
    pytest.param(dtype, value, marks=[pytest.mark.long] * ((dtype, value) not in QUICK))
    for dtype in DTYPES
    for value in (NAN, INF)
]


@pytest.mark.parametrize(("dtype", "value"), KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_every_module_is_named(file: Path, part: str, dtype: torch.dtype, value: float) -> None:
    pipe, named = loaded(file, dtype), 0
    for path, module in PARTS[part](pipe).named_modules():
        place = f"{part}.{path}" if path else part
        with planted(module, value, DTYPES) as run:
            try:
                work(pipe, part)
            except ValueError as error:
                step = " at step 1 of 1" if part == "network" else ""
                assert str(error) == f"{place}: numbers that are not finite{step}"
                named += 1
            else:
                assert not run or place == SILENT
    assert named == {"network": 38, "text_encoder": 15, "autoencoder": 52}[part]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_every_module_that_overflows_works_in_float32(
    file: Path, part: str, dtype: torch.dtype
) -> None:
    pipe = loaded(file, dtype)
    plain, warned = work(pipe, part), 0
    for path, module in PARTS[part](pipe).named_modules():
        place = f"{part}.{path}" if path else part
        with (
            planted(module, float("inf"), HALF) as run,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            assert all(work(pipe, part).isfinite().all() for _ in range(2))
        texts = [str(one.message) for one in said]
        expected = [f"{place} overflowed: it works in float32 now"]  # once
        assert texts == (expected if run and place != SILENT else [])
        warned += len(texts)
    assert warned == {"network": 38, "text_encoder": 15, "autoencoder": 52}[part]
    assert torch.equal(work(pipe, part), plain)  # later pictures do not show it
    assert {x.dtype for one in pipe.parts for x in one.parameters()} == {dtype}


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_every_damaged_weight_is_named(file: Path, part: str, value: float) -> None:
    """Or has no say in what is made; numbers that are not finite there are none."""
    pipe, silent = loaded(file, torch.bfloat16), []
    for name, weight in PARTS[part](pipe).named_parameters():
        kept = weight.data
        weight.data = torch.full_like(kept, value)
        try:
            assert work(pipe, part).isfinite().all()
            silent.append(name)
        except ValueError as error:
            assert str(error).startswith(f"{part}.{name}: numbers that are not finite")
        weight.data = kept
    assert not [name for name in silent if not name.startswith(("encoder.", "blocks.1.text."))]


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_official_networks(tmp_path: Path, family: str) -> None:
    pipe = minidiffusion.load(official.make(tmp_path / "a.safetensors", family), dtype=HALF[1])
    for part in PARTS:
        modules = [*PARTS[part](pipe).named_modules()]
        for path, module in modules[3::41]:
            with planted(module, float("nan"), DTYPES) as run:
                try:
                    pipe.generate("a cat", num_steps=1, width=64, height=64)
                except ValueError as error:
                    assert str(error).startswith(f"{part}.{path}: numbers that are not finite")
                else:
                    assert not run


def test_the_step_is_named(file: Path) -> None:
    pipe, calls = loaded(file, torch.float32), []

    def third(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return out if len(calls) < 3 else out * torch.nan

    pipe.network.context.register_forward_hook(third)
    steps = pipe.stream("a cat", num_steps=4)
    assert [next(steps).index, next(steps).index] == [0, 1]
    message = r"^network\.context: numbers that are not finite at step 3 of 4$"
    with pytest.raises(ValueError, match=message):
        next(steps)


def test_guidance_and_conditions_are_no_modules_fault(file: Path) -> None:
    pipe = loaded(file, torch.float32)
    cond = pipe.condition("a cat")
    for steps, at in ((1, 1), (5, 2)):
        message = (
            rf"^samples that are not finite at step {at} of {steps}: is the guidance too high\?$"
        )
        with pytest.raises(ValueError, match=message):
            pipe.sample(cond, num_steps=steps, guidance_scale=1e308)
    bad = cond._replace(pooled=cond.pooled * torch.inf)
    with pytest.raises(
        ValueError, match=r"^cond\.pooled: numbers that are not finite at step 1 of 2$"
    ):
        pipe.sample(bad, num_steps=2)


class Wide(nn.Module):
    """Its sum fits no float16; what is made of it does."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.enter.weight, 300.0)
        nn.init.constant_(self.leave.weight, 2**-14)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x))


def test_a_result_that_fits_no_sixteen_bits_stays_in_float32() -> None:
    part, x = Wide(), torch.full((1, 4), 100.0)
    with torch.no_grad():
        wanted = part(x)
        part.half()
        with (
            FiniteGuard(part, "part") as guard,
            pytest.warns(UserWarning, match="^part overflowed"),
        ):
            found = [guard(lambda: part(x.half())) for _ in range(2)]
    assert all(torch.equal(one, wanted) for one in found)
    assert {p.dtype for p in part.parameters()} == {torch.float16}
    with pytest.raises(NotFiniteError, match=r"^part\.enter: numbers that are not finite$"):
        FiniteGuard(part.bfloat16(), "part")(lambda: part(x.bfloat16() * 1e35))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_retry_that_is_ended_leaves_nothing_behind(error: type[BaseException]) -> None:
    """Float32 takes more memory: the next try, without it or in tiles, is of the same part."""
    part, calls = Wide().half(), 0

    def call() -> Tensor:
        nonlocal calls
        calls += 1
        handle = part.enter.register_forward_pre_hook(fail) if calls == 3 else None
        try:
            return part(torch.full((1, 4), 100.0).half())
        finally:
            if handle is not None:
                handle.remove()

    def fail(*_: object) -> None:
        raise error

    with pytest.raises(error), FiniteGuard(part, "part") as guard, torch.no_grad():
        guard(call)
    assert calls == 3 and {p.dtype for p in part.parameters()} == {torch.float16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in part.modules())
