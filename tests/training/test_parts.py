"""Named figures of a step, against loops over pictures; the loss beside them is not touched."""

import math
from dataclasses import replace

import pytest
import torch
from rounding import SHORT, assert_near

from minidiffusion.diffusion import VarianceExploding, VariancePreserving
from minidiffusion.training import denoising, loop, parts
from minidiffusion.training.loop import train
from minidiffusion.training.objectives import Objective, losses
from minidiffusion.training.parallel import World
from minidiffusion.training.state import GAP_EVERY


def test_bins_by_a_loop() -> None:
    numbers = torch.Generator().manual_seed(0)
    t, each = 1000 * torch.rand(500, generator=numbers), torch.rand(500, generator=numbers)
    t[:4] = torch.tensor([0.0, 125.0, 999.99, 1000.0])  # edges belong to the bin above
    total = parts.added(parts.by_time(t[:200], each[:200]), parts.by_time(t[200:], each[200:]))
    loss, found = parts.read(torch.tensor(0.3), total, World())
    assert loss == float(torch.tensor(0.3)) and list(found) == list(parts.TIMES)
    assert parts.TIMES[:2] == ("loss t 0-0.125", "loss t 0.125-0.25")
    for k, name in enumerate(parts.TIMES):
        mine = [e for e, time in zip(each.tolist(), t.tolist(), strict=True)
                if min(7, int(time / 125)) == k]  # fmt: skip
        assert_near(found[name], sum(mine) / len(mine), 16, eps=SHORT)


def test_an_empty_bin_is_left_out_and_a_nan_stays_in_its_own() -> None:
    t = torch.tensor([10.0, 20.0, 990.0])
    each = torch.tensor([1.0, 3.0, math.nan], requires_grad=True)
    made = parts.by_time(t, each)
    assert not any(part.requires_grad for part in made.values())
    _, found = parts.read(torch.zeros(()), made, World())
    assert found.keys() == {"loss t 0-0.125", "loss t 0.875-1"}
    assert found["loss t 0-0.125"] == 2 and math.isnan(found["loss t 0.875-1"])


def test_a_part_over_all_pictures() -> None:
    """Micro-batches of 3 and 1: pictures count alike, not micro-batches."""
    one, two = (parts.overall(torch.tensor(x)) for x in ([1.0, 2.0, 3.0], [10.0]))
    total = parts.added({"l1": one}, {"l1": two})
    assert parts.read(torch.zeros(()), total, World())[1] == {"l1": 4.0}
    assert parts.read(torch.zeros(()), {}, World()) == (0.0, {})


def test_a_part_of_which_the_mean_is_known() -> None:
    each = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    made = parts.shared(each.mean(), 3)
    assert torch.equal(made, parts.overall(each)) and not made.requires_grad
    total = parts.added({"l1": made}, {"l1": parts.shared(torch.tensor(11.0), 1)})
    assert parts.read(torch.zeros(()), total, World())[1] == {"l1": 5.0}


PATHS = [
    ("vp", {"path": VariancePreserving(), "objective": Objective("v")}),
    ("ve", {"path": VarianceExploding(), "objective": Objective("eps")}),
    ("flow", {}),
]


@pytest.mark.parametrize(("name", "changed"), PATHS, ids=[name for name, _ in PATHS])
def test_the_parts_of_a_run_make_up_its_loss(
    name, changed, models, points, tiny, monkeypatch
) -> None:
    """Whatever the micro-batch: bins weighed by their pictures are the loss."""
    counts: list[dict[str, float]] = []
    whole = parts.read

    def spy(loss, found, world):
        counts.append({n: float(part[1]) for n, part in found.items()})
        return whole(loss, found, world)

    monkeypatch.setattr(loop, "read", spy)
    recipe = replace(tiny(models["mlp"], micro_batch=3, steps=20), **changed)
    for report in train(recipe, dataset=points()):
        by_bin = counts[-1]
        assert sum(by_bin.values()) == 8
        bins = {n: x for n, x in report.parts.items() if n in parts.TIMES}
        loss = sum(x * by_bin[n] for n, x in bins.items()) / 8
        assert_near(loss, report.loss, 16, eps=SHORT)
    assert {n for found in counts for n, c in found.items() if c} == set(parts.TIMES)


def test_the_loss_is_the_mean_to_the_bit(models, points, tiny, monkeypatch) -> None:
    """As it is without parts: each step's mean of the losses, in float32."""
    seen: list[float] = []

    def spy(*given):
        each = losses(*given)
        seen.append(float(each.detach().mean()))
        return each

    monkeypatch.setattr(denoising, "losses", spy)
    assert [r.loss for r in train(tiny(models["mlp"]), dataset=points())] == seen


def test_the_gap_is_that_of_the_weights_to_their_average(models, points, tiny, trainer_of) -> None:
    for report in train(tiny(models["mlp"], steps=25), dataset=points()):
        assert ("ema gap" in report.parts) == (report.step % GAP_EVERY == 0)
        if "ema gap" in report.parts:
            s = trainer_of(report).state
            w, a = (
                torch.cat([x.flatten().double() for x in xs]) for xs in (s.weights(), s.average)
            )
            gap = (w - a).norm() / a.norm()
            assert_near(report.parts["ema gap"], float(gap), 16, eps=SHORT)
            assert report.parts["ema gap"] > 0


def test_no_average_no_gap(models, points, tiny) -> None:
    recipe = tiny(models["mlp"], ema=0.0, ema_warmup=False)
    assert [r.parts["ema gap"] for r in train(recipe, dataset=points()) if r.step == 10] == [0.0]
