"""One picture of how a run goes: loss, loss by time, gradients, the average, speed, rate."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from minidiffusion.cli import logs
from minidiffusion.cli.figures import axes
from minidiffusion.cli.main import MissingExtraError
from minidiffusion.cli.runfolder import LOG_FILE
from minidiffusion.files import whole_file

FILE = "dashboard.png"
POINTS = 1000
"""Of a line at most: more are not seen, and take long to draw."""
SMOOTH = 60
"""Points of a line that is a running mean."""
PALE, DARK, WARM = "#c8d4e3", "#1f4e8c", "#c8553d"
GAP = "ema gap"
BINNED = "loss t "
APART = 30.0
"""Seconds between two drawings, each of which takes one."""

Line = tuple[Float[ndarray, " _"], Float[ndarray, " _"]]


class Refreshed:
    """Draws when it is called, unless it has just done so or cannot."""

    def __init__(self, run: Path, clip: float | None) -> None:
        self.run, self.clip, self.last = run, clip, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.last >= APART:
            with suppress(MissingExtraError):
                draw(self.run / LOG_FILE, self.run / FILE, self.clip)
            self.last = time.monotonic()


def draw(log: Path, out: Path, clip: float | None) -> None:
    """The dashboard of a run's log; clip: the gradient norm that is clipped to.

    The picture is replaced at once, so that a viewer never sees half of it.
    """
    rows = logs.rows(log)
    figure, plots = axes(15.0, 7.5, rows=2, columns=3)
    panels: Sequence[Callable[[Any, list[dict[str, Any]]], None]] = (
        draw_loss, draw_parts, lambda plot, rows: draw_norm(plot, rows, clip),
        draw_gap, draw_speed, draw_rate,
    )  # fmt: skip
    for plot, panel in zip(plots.flat, panels, strict=True):
        panel(plot, rows)
        plot.set_xlabel("step")
        plot.spines[["top", "right"]].set_visible(False)
    with whole_file(out, sync=False) as file:
        figure.savefig(file, format="png")


def line(rows: Sequence[Mapping[str, Any]], name: str) -> Line:
    """Steps and values of one column, or part; what is missing or not finite is left out."""
    found = [(row["step"], row.get(name, row.get("parts", {}).get(name))) for row in rows]
    table = np.array([(s, v) for s, v in found if v is not None], dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    return table[:, 0], table[:, 1]


def pooled(points: Line, most: int) -> Line:
    """Means over equal stretches of the run, so that there are at most so many points."""
    x, y = points
    if len(x) <= most:
        return points
    edges = np.linspace(x[0], x[-1], most + 1)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, most - 1)
    counts = np.bincount(place, minlength=most)
    there = counts > 0
    means = [np.bincount(place, weights=v, minlength=most)[there] / counts[there] for v in (x, y)]
    return means[0], means[1]


def both(plot: Any, points: Line, names: tuple[str, str] | None = None) -> None:
    """A column as it is, pale, and its running mean."""
    first, second = names or (None, None)
    plot.plot(*pooled(points, POINTS), color=PALE, linewidth=0.8, label=first)
    plot.plot(*pooled(points, SMOOTH), color=DARK, linewidth=1.6, label=second)


def room(plot: Any, *lines: Line) -> None:
    """From 0 to what nearly all values lie under: the first ones would flatten the rest."""
    values = np.concatenate([y for _, y in lines] or [np.zeros(0)])
    top = float(np.quantile(values, 0.99)) if len(values) else 0.0
    plot.set_ylim(0, 1.1 * top or 1.0)


def draw_loss(plot: Any, rows: list[dict[str, Any]]) -> None:
    points = line(rows, "loss")
    both(plot, points, ("step", "running mean"))
    room(plot, points)
    plot.set_title("loss")
    plot.legend(frameon=False)


def draw_parts(plot: Any, rows: list[dict[str, Any]]) -> None:
    """The loss apart by time, dark where there is most noise; else whatever the task names."""
    found = dict.fromkeys(name for row in rows for name in row.get("parts", {}) if name != GAP)
    binned = sorted(n for n in found if n.startswith(BINNED))
    names = binned or list(found)
    lines = [pooled(line(rows, name), SMOOTH) for name in names]
    colours = shades(len(names))
    for name, points, colour in zip(names, lines, colours, strict=True):
        plot.plot(*points, color=colour, linewidth=1.2, label=name.removeprefix(BINNED))
    room(plot, *lines)
    plot.set_title("loss by t, 1 is noise" if binned else "parts of the loss")
    if names:
        plot.legend(frameon=False, fontsize=7, ncols=2)


def shades(count: int) -> list[Any]:
    """Colours from light to dark."""
    from matplotlib import colormaps

    return list(colormaps["viridis_r"](np.linspace(0.1, 1, count)))


def draw_norm(plot: Any, rows: list[dict[str, Any]], clip: float | None) -> None:
    points = line(rows, "grad_norm")
    both(plot, points)
    room(plot, points)
    if clip is not None:
        clipped = float((points[1] > clip).mean()) if len(points[1]) else 0.0
        label = f"clip {clip:g}: {100 * clipped:.0f} % of the steps"
        plot.axhline(clip, color=WARM, linewidth=1, linestyle="--", label=label)
        plot.set_ylim(0, max(plot.get_ylim()[1], 1.1 * clip))
        plot.legend(frameon=False)
    plot.set_title("gradient norm, before clipping")


def draw_gap(plot: Any, rows: list[dict[str, Any]]) -> None:
    points = pooled(line(rows, GAP), POINTS)
    plot.plot(*points, color=DARK, linewidth=1.2)
    room(plot, points)
    plot.set_title("distance of the weights to their average, relative")


def draw_speed(plot: Any, rows: list[dict[str, Any]]) -> None:
    points = pooled(line(rows, "pictures_per_second"), POINTS)
    plot.plot(*points, color=DARK, linewidth=1.2)
    room(plot, points)
    plot.set_title("pictures a second")


def draw_rate(plot: Any, rows: list[dict[str, Any]]) -> None:
    points = pooled(line(rows, "lr"), POINTS)
    plot.plot(*points, color=DARK, linewidth=1.2)
    room(plot, points)
    plot.set_title("learning rate")
