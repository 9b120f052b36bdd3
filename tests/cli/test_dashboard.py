"""The dashboard and the figures that it is drawn from."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minidiffusion.cli import dashboard, logs
from minidiffusion.cli.main import main
from minidiffusion.data.pictures import load_pixels
from minidiffusion.training.loop import Report


def report(step: int, seconds: float, total: int | None = 100, begun: int = 0) -> Report:
    samples, fresh = 8 * step, 8 * (step - begun)
    parts = {"loss t 0-0.125": 0.25, "ema gap": 1 / 3}
    return Report(step, total, 1.0, 1e-3, 2.0, seconds, 0, samples, fresh, lambda: None, parts)  # type: ignore[arg-type,return-value]


def test_rate_and_time_left() -> None:
    """A process that slows down: only the recent steps count; a resume counts its own."""
    assert logs.rate([report(1, 2.0)]) == 4 and logs.rate([report(41, 2.0, begun=40)]) == 4
    recent = [report(10, 100.0), report(11, 101.0), report(14, 104.0)]
    assert logs.rate(recent) == 8
    assert logs.left(recent) == 86
    assert logs.left([report(1, 1.0, total=None)]) is None
    assert logs.left([report(100, 50.0)]) == 0
    assert logs.pace(recent) == "8 pictures/s  ETA 0:01:26"
    assert logs.pace([report(100, 100.0)]) == "8 pictures/s"
    assert logs.pace([report(1, 1.0, total=None)]) == "8 pictures/s"


def test_a_line_of_the_log_holds_it_all(tmp_path: Path) -> None:
    with logs.opened(tmp_path, 0) as log:
        for step in range(1, 70):
            log.add(report(step, float(step) if step < 60 else 59 + 2.0 * (step - 59)))
        assert len(log.recent) == logs.RECENT
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["pictures_per_second"] == 8 and rows[0]["eta"] == 99
    assert rows[58]["pictures_per_second"] == 8 and rows[58]["eta"] == 41
    assert 6 < rows[-1]["pictures_per_second"] < 8
    assert rows[0]["parts"] == {"loss t 0-0.125": 0.25, "ema gap": 0.333333}


def test_tensorboard_holds_it_too(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with logs.opened(tmp_path, 0) as log:
        log.add(report(1, 1.0))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"loss", "lr", "grad_norm", "pictures_per_second", "parts/ema_gap"}
    assert tags | {"parts/loss_t_0-0.125"} == set(events.Tags()["scalars"])
    assert events.Scalars("parts/loss_t_0-0.125")[0].value == 0.25


def rows_of(count: int, **more: object) -> str:
    rows = [{"step": s, "loss": 1 / s, "lr": 1e-3, "grad_norm": 2.0, "pictures_per_second": 5.0,
             "parts": {"loss t 0-0.125": 0.5}, **more} for s in range(1, count + 1)]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize(
    "text",
    [
        "",
        rows_of(1),
        rows_of(3, loss=math.nan),
        rows_of(2500),
        rows_of(4, parts={"l1": 0.5, "kl": 2.0}),
        '{"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "seconds": 1.0}\n',  # an older log
    ],
    ids=["empty", "one", "nan", "long", "autoencoder", "older"],
)
def test_every_log_is_drawn(text: str, clip: float | None, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    dashboard.draw(tmp_path / "log.jsonl", tmp_path / "dashboard.png", clip)
    pixels = load_pixels(tmp_path / "dashboard.png", channels=3, size=None)
    assert pixels.shape == (3, 900, 1800)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "dashboard.png"}


def test_lines_leave_out_what_is_not_there() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": None},
            {"step": 4, "loss": 1.0, "parts": {"kl": 5.0}}]  # fmt: skip
    x, y = dashboard.line(rows, "loss")
    assert x.tolist() == [1, 4] and y.tolist() == [2, 1]
    assert dashboard.line(rows, "kl")[1].tolist() == [5] and not len(dashboard.line(rows, "no")[0])


def test_pooled_means() -> None:
    """10,000 steps to 100 points, each the mean of 100; every value counts once."""
    x, y = np.arange(10_000.0), np.random.default_rng(0).random(10_000)
    a, b = dashboard.pooled((x, y), 100)
    assert len(a) == len(b) == 100
    # the edges of a point's steps may lie a step or two beside, each a hundredth of its mean
    assert np.abs(b[1:-1] - y.reshape(100, 100).mean(axis=1)[1:-1]).max() < 0.02
    assert dashboard.pooled((x[:5], y[:5]), 100)[1] is not None
    sparse = np.array([0.0, 1.0, 1000.0]), np.array([1.0, 3.0, 7.0])
    assert [v.tolist() for v in dashboard.pooled(sparse, 2)] == [[0.5, 1000.0], [2.0, 7.0]]


def test_it_is_refreshed_but_not_all_the_time(monkeypatch, tmp_path: Path) -> None:
    now, drawn = [0.0], []
    monkeypatch.setattr(dashboard, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(dashboard, "draw", lambda *_: drawn.append(now[0]))
    refresh = dashboard.Refreshed(tmp_path, 1.0)
    for now[0] in (1.0, 29.0, 30.0, 59.0, 60.0, 200.0, 201.0):
        refresh()
    assert drawn == [30.0, 60.0, 200.0]


def test_a_run_leaves_it_and_draws_it_with_each_checkpoint(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    whole = dashboard.draw

    def spy(log: Path, out: Path, clip: float | None) -> None:
        steps.append(len(log.read_text().splitlines()))
        whole(log, out, clip)

    monkeypatch.setattr(dashboard, "draw", spy)
    monkeypatch.setattr(dashboard, "APART", 0.0)
    run = tmp_path / "run"
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(run), "--run.save_every", "4"]) == 0
    assert steps == [4, 6]
    assert load_pixels(run / "dashboard.png", channels=3, size=None).shape == (3, 900, 1800)
