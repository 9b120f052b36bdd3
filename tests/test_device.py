"""The device and the precision: chosen by name, refused in one line."""

import pytest
import torch

from minidiffusion import device


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
    assert device.settle("auto", cpu) in ("fp32", "bf16")
    assert device.settle("auto", torch.device("mps")) == "fp32"
    weight = torch.ones(2, 2)
    with device.autocast("bf16", cpu):
        assert (weight @ weight).dtype == torch.bfloat16
    with device.autocast("fp32", cpu):
        assert (weight @ weight).dtype == torch.float32


def test_memory() -> None:
    cpu = torch.device("cpu")
    assert device.free_bytes(cpu) > 0 and device.available_bytes(cpu) > 0
    assert device.out_of_memory(MemoryError())
    assert device.out_of_memory(torch.OutOfMemoryError())
    assert device.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you"))
    assert not device.out_of_memory(RuntimeError("shapes differ"))
    assert not device.out_of_memory(ValueError("out of memory"))
