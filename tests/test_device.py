"""The device and the precision: chosen by name, refused in one line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch

from minidiffusion import device

CPU = torch.device("cpu")


def test_pick() -> None:
    assert device.pick("cpu") == torch.device("cpu")
    assert device.pick("cpu:0") == torch.device("cpu:0")
    assert device.pick().type in ("cuda", "mps", "xpu", "cpu")


def test_auto_takes_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert device.pick() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.pick("cuda") == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"^device: 'cuda:2' is not on this machine; it has 2 of"):
        device.pick("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "meta", "cpu:1", "cpu:", "cpu:-1", "cpu:x", "CPU"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=r"^device: '.*' is not on this machine; ") as caught:
        device.pick(name)
    assert "\n" not in str(caught.value)


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert device.settle("fp32", cpu) == "fp32" and device.settle("bf16", cpu) == "bf16"
    assert device.settle("auto", torch.device("mps")) == "fp32"
    weight = torch.ones(2, 2)
    with device.autocast("bf16", cpu):
        assert (weight @ weight).dtype == torch.bfloat16
    with device.autocast("fp32", cpu):
        assert (weight @ weight).dtype == torch.float32


def test_auto_is_never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "multiplies_fast", lambda dtype, where, fast=fast: fast)
        assert device.settle("auto", CPU) == wanted
        assert device.settle("bf16", CPU) == "bf16"  # as it was asked for: weights are held so


def test_training_computes_in_what_is_fast(slow: None, recwarn: pytest.WarningsRecorder) -> None:
    assert device.arithmetic("auto", CPU) == device.arithmetic("fp32", CPU) == "fp32"
    assert not recwarn.list
    assert device.arithmetic("bf16", torch.device("cuda")) == "bf16"
    with pytest.warns(UserWarning, match="^precision: bf16: slow on this cpu; computing in fp32$"):
        assert device.arithmetic("bf16", CPU) == "fp32"


class Clock:
    """Time that goes on by what a piece of work is said to cost."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def work(self, costs: Sequence[float]) -> Callable[[], None]:
        """Each call takes the next cost, and the last one from then on."""
        left: Iterator[float] = iter(costs)

        def run() -> None:
            self.calls += 1
            self.now += next(left, costs[-1])

        return run


@pytest.mark.parametrize(
    ("costs", "than", "wanted"),
    [
        ([50e-6], [100e-6], True),
        ([5e-3, 50e-6], [100e-6], True),  # the first call also prepares
        ([50e-6, 4e-3], [4e-3, 100e-6], True),  # each was disturbed, but not every time
        ([2e-3], [100e-6], False),
        ([100e-6], [100e-6], False),
    ],
)
def test_the_faster_of_two(costs: list[float], than: list[float], wanted: bool) -> None:
    clock = Clock()
    assert device.faster(clock.work(costs), clock.work(than), clock) == wanted


def test_a_slow_machine_is_not_asked_often() -> None:
    clock = Clock()
    assert not device.faster(clock.work([0.05]), clock.work([1e-4]), clock)
    assert clock.calls == 4 and clock.now < 0.11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_processor_is_timed_once_and_plainly(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever autocast, default device or number of threads its caller has."""
    asked = []

    def ask(work: Callable[[], object], than: Callable[[], object]) -> bool:
        found = [one if isinstance(one, tuple) else (one,) for one in (work(), than())]
        asked.append((torch.get_num_threads(), [[x.dtype for x in one] for one in found]))
        assert all(x.device == CPU for one in found for x in one)
        return False

    monkeypatch.setattr(device, "faster", ask)
    monkeypatch.setattr(device, "_exact", lambda sums: True)
    device.multiplies_fast.cache_clear()
    try:
        threads = torch.get_num_threads()
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert not device.multiplies_fast(dtype, CPU)
            assert not device.multiplies_fast(dtype, CPU)
        assert torch.get_num_threads() == threads
    finally:
        device.multiplies_fast.cache_clear()
    kinds = (
        [[torch.int32], [torch.float32]]
        if dtype == torch.int8
        else [[dtype] * 2, [torch.float32] * 2]
    )
    assert asked == [(1, kinds)]


def test_sums_that_end_at_15_bits_are_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "faster", lambda work, than: True)
    for exact in (True, False):
        most = 2**31 - 1 if exact else 2**15 - 1
        monkeypatch.setattr(
            torch, "_int_mm", lambda a, b, most=most: (a.int() @ b.int()).clamp(max=most)
        )
        assert device.multiplies_fast.__wrapped__(torch.int8, CPU) == exact


def test_what_is_not_timed() -> None:
    assert device.multiplies_fast(torch.float32, CPU)
    for kind in ("meta", "mps", "xpu"):
        assert device.multiplies_fast(torch.bfloat16, torch.device(kind))


def test_a_card_is_asked_for_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.multiplies_fast.__wrapped__(torch.bfloat16, card)  # a plan for another machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda one: nullcontext(asked.append(one)))
    for there in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there
        )
        assert device.multiplies_fast.__wrapped__(torch.bfloat16, card) == there
    assert asked == [card, card]


def test_memory() -> None:
    cpu = torch.device("cpu")
    assert device.free_bytes(cpu) > 0 and device.available_bytes(cpu) > 0
    assert device.out_of_memory(MemoryError())
    assert device.out_of_memory(torch.OutOfMemoryError())
    assert device.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you"))
    assert not device.out_of_memory(RuntimeError("shapes differ"))
    assert not device.out_of_memory(ValueError("out of memory"))
