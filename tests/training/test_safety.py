"""A bad number stops at the door, and running out of memory is survived."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiffusion.checkpoints import snapshot
from minidiffusion.data import Batch, Tensors
from minidiffusion.models import MLP, create
from minidiffusion.training import loop, memory
from minidiffusion.training.denoising import Denoising
from minidiffusion.training.loop import DivergedError, Trainer, train
from minidiffusion.training.optimizers import Muon
from minidiffusion.training.recipe import Recipe, fitted
from minidiffusion.training.start import Start

CPU = torch.device("cpu")


@dataclass
class Poisoned:
    """Good data, but for what the calls of these numbers return."""

    data: Tensors
    bad: set[int]
    value: float = torch.nan
    calls: int = field(default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int]) -> Batch:
        found = self.data.batch(indices)
        if self.calls in self.bad:
            found.x[-1].view(-1)[0] = self.value  # one number of one picture
        self.calls += 1
        return found

    def fingerprint(self) -> str:
        return self.data.fingerprint()


def sums(trainer: Trainer) -> str:
    """SHA-256 of weights, average and optimizer."""
    found = hashlib.sha256()
    for part, tensors in trainer.state.tensors().items():
        for name, tensor in sorted(tensors.items()):
            found.update(f"{part}/{name}".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", ["unet", "dit", "mlp"])
def test_a_bad_number_leaves_everything_as_it_was(
    name, value, models, pictures, points, tiny, trainer_of
) -> None:
    """1e30 is finite, but its square is not."""
    data = points() if name == "mlp" else pictures()
    reports = train(tiny(models[name]), dataset=Poisoned(data, {3, 6, 7}, value))
    states, skipped = [], []
    for report in reports:
        states.append(sums(trainer_of(report)))
        skipped.append(report.skipped)
        good = report.step not in (4, 7, 8)
        finite = torch.tensor([report.loss, report.norm]).isfinite().all()
        assert bool(finite) == good
    assert skipped == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert states[3] == states[2] and states[7] == states[6] == states[5]
    assert len(set(states)) == 10


def test_the_first_step_may_be_bad(models, points, tiny, trainer_of) -> None:
    """No optimizer has a state yet: none may appear. With Muon as well."""
    for recipe in (tiny(models["mlp"]), replace(tiny(models["mlp"]), optimizer=Muon())):
        reports = train(recipe, dataset=Poisoned(points(), {0, 1}))
        trainer = trainer_of(next(reports))
        assert not trainer.state.tensors()["optimizer"]
        fresh = Trainer(recipe, points(), CPU, loop.parallel.World())
        assert sums(fresh) == sums(trainer)
        assert [r.skipped for r in reports] == [2] * 12


def test_a_bad_gradient_of_a_finite_loss(models, points, tiny, trainer_of) -> None:
    reports = train(tiny(models["mlp"]), dataset=points())
    trainer = trainer_of(next(reports))
    before = sums(trainer)
    hook = trainer.network.enter.bias.register_hook(lambda gradient: gradient * torch.nan)
    report = next(reports)
    hook.remove()
    assert torch.tensor(report.loss).isfinite() and report.skipped == 1
    assert sums(trainer) == before
    assert next(reports).skipped == 1 and sums(trainer) != before


def test_a_skip_is_resumed_over(models, points, tiny, trainer_of, tmp_path) -> None:
    """The count of skipped steps is part of the state."""

    def states(until: int | None, *bad: int, resume: Path | None = None) -> list[tuple]:
        reports = train(recipe, resume, until, Poisoned(points(), set(bad)))
        return [(r.step, r.skipped, sums(trainer_of(r))) for r in reports]

    recipe = tiny(models["mlp"])
    whole = states(None, 3, 8)
    recipe = tiny(models["mlp"], tmp_path)
    parts = states(5, 3) + states(None, 3, resume=tmp_path)  # its call 3 is step 8 of the whole
    assert parts == whole and parts[-1][1] == 2


def test_three_in_a_row_stop_the_run(models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path, save_every=4)
    reports = train(recipe, dataset=Poisoned(points(), {1, 5, 6, 7}))
    assert [next(reports).skipped for _ in range(7)] == [0, 1, 1, 1, 1, 2, 3]
    with pytest.raises(DivergedError) as caught:
        next(reports)
    text = str(caught.value)
    assert text.startswith("stopped at step 8: no finite loss and gradient in three steps in a row")
    assert "at global samples 40..47, 48..55, 56..63;" in text
    assert text.endswith(f"the last good checkpoint is {tmp_path}/checkpoints/step_00000004")
    found, _ = snapshot.newest(tmp_path / "checkpoints")
    assert found is not None and found.step == 4
    assert all(t.isfinite().all() for part in found.tensors.values() for t in part.values())
    assert not (tmp_path / "model.safetensors").exists()
    rest = list(train(recipe, tmp_path, dataset=points()))  # the data mended: it goes on
    assert [r.step for r in rest] == list(range(5, 14))


def test_three_in_a_row_without_a_folder(models, points, tiny) -> None:
    with pytest.raises(DivergedError, match=r"0..7, 8..15, 16..23; no checkpoint was saved"):
        list(train(tiny(models["mlp"]), dataset=Poisoned(points(), {0, 1, 2})))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
@pytest.mark.parametrize(("fits", "micro"), [(7, 4), (3, 2), (1, 1)])
def test_out_of_memory_halves(
    fits, micro, error, models, points, tiny, digest, trainer_of, monkeypatch
) -> None:
    wanted = [digest(r) for r in train(tiny(models["mlp"], micro_batch=micro), dataset=points())]
    forward = MLP.forward

    def limited(self: MLP, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > fits:
            raise error
        return forward(self, x, *rest)

    monkeypatch.setattr(MLP, "forward", limited)
    found = []
    for report in train(tiny(models["mlp"]), dataset=points()):
        found.append(digest(report))
        assert trainer_of(report).micro == micro
    assert found == wanted


def test_out_of_memory_in_the_middle_of_a_step(models, points, tiny, digest, monkeypatch) -> None:
    """What the first micro-batches left is thrown away."""
    wanted = [digest(r) for r in train(tiny(models["mlp"], micro_batch=2), dataset=points())]
    forward, calls = MLP.forward, 0

    def limited(self: MLP, *inputs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError if calls > 2 else RuntimeError("HIP out of memory")
        return forward(self, *inputs)

    monkeypatch.setattr(MLP, "forward", limited)
    assert [
        digest(r) for r in train(tiny(models["mlp"], micro_batch=4), dataset=points())
    ] == wanted


def test_an_odd_batch_is_halved_upwards(models, points, tiny, trainer_of, monkeypatch) -> None:
    forward = MLP.forward

    def limited(self: MLP, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 3:
            raise RuntimeError("out of memory")
        return forward(self, x, *rest)

    monkeypatch.setattr(MLP, "forward", limited)
    report = next(train(tiny(models["mlp"], batch_size=9), dataset=points()))
    assert trainer_of(report).micro == 3  # 9, 5, 3


def test_what_cannot_be_survived(models, points, tiny, monkeypatch) -> None:
    for message, kind in (("out of memory", 1), ("mat1 and mat2 shapes cannot be multiplied", 8)):
        seen = []

        def broken(
            self: MLP, x: torch.Tensor, *rest: Any, message: str = message, seen: list = seen
        ) -> torch.Tensor:
            seen.append(len(x))
            raise RuntimeError(message)

        monkeypatch.setattr(MLP, "forward", broken)
        with pytest.raises(RuntimeError, match=message):
            next(train(tiny(models["mlp"]), dataset=points()))
        assert seen[-1] == kind


def kept_bytes(network: Any, data: Any, count: int, precision: str = "fp32") -> int:
    task = Denoising(Start(Recipe(), network, data, None), CPU, precision)
    return memory.kept_bytes(task, network, count)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["unet", "dit", "mlp"])
def test_kept_bytes_grow_evenly(name, precision, models, pictures, points, tiny) -> None:
    data = points() if name == "mlp" else pictures()
    network = create(fitted(tiny(models[name]), data).model)
    kept = [kept_bytes(network, data, n, precision) for n in (2, 3, 5, 9)]
    each = kept[1] - kept[0]
    assert each > 0
    assert kept == [kept[0] + each * (n - 2) for n in (2, 3, 5, 9)]


def test_kept_bytes_of_known_layers(points) -> None:
    """Each layer keeps its input: 2, 3 and 3 numbers a sample."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
            return self.two(torch.nn.functional.silu(self.one(x)))

    for count in (1, 4):
        found = kept_bytes(Two(), points(), count)
        assert found == 4 * count * (2 + 3 + 3)


def test_checkpointing_keeps_less(models, pictures, tiny) -> None:
    network = create(fitted(tiny(models["dit"]), pictures()).model)
    plain = kept_bytes(network, pictures(), 8)
    network.checkpointing = True
    assert kept_bytes(network, pictures(), 8) < plain / 3


def test_largest() -> None:
    assert memory.largest(100.0, 10, 1024) == 8
    assert memory.largest(79.9, 10, 1024) == 4 and memory.largest(80.0, 10, 1024) == 8
    assert memory.largest(1e12, 10, 1024) == 1024 and memory.largest(1e12, 10, 1000) == 512
    assert memory.largest(-5.0, 10, 1024) == 1 and memory.largest(5.0, 10, 0) == 1


@pytest.mark.parametrize("name", ["dit", "mlp"])
def test_auto(name, models, pictures, points, tiny, monkeypatch, trainer_of) -> None:
    """Room for 20 samples and a half, so 16 a step; and the run trains."""
    data = points(64) if name == "mlp" else pictures(64)
    recipe = tiny(models[name], batch_size="auto", steps=2)
    network = create(fitted(recipe, data).model)
    weights = 4 * sum(4 * p.numel() for p in network.parameters())
    two, three = (kept_bytes(network, data, n) for n in (2, 3))
    room = (weights + two + 18.5 * (three - two)) / memory.USABLE
    monkeypatch.setattr(memory.devices, "free_bytes", lambda where: round(room))
    reports = list(train(recipe, dataset=data))
    assert [r.samples for r in reports] == [16, 32]
    assert trainer_of(reports[0]).recipe.run.batch_size == 16
    monkeypatch.setattr(memory.devices, "free_bytes", lambda where: 10)
    assert next(train(recipe, dataset=data)).samples == 1
    monkeypatch.setattr(memory.devices, "free_bytes", lambda where: 10**15)
    assert next(train(recipe, dataset=data)).samples == 64
