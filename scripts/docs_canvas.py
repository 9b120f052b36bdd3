"""What the pictures of the documentation share: colours, axes, and the boot that is noised."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from minidiffusion.data import FashionMNIST
from minidiffusion.diffusion import (
    START,
    Level,
    keyed,
)

BLUE, RED, GREEN, ORANGE, PURPLE, GREY = COLOURS = (
    "#1f4e8c", "#c0392b", "#2e8b57", "#d98200", "#7b4fa3", "#7f8c8d",
)  # fmt: skip
PALE = "#d5dbe3"


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of 7 inches' width (1050 pixels) and its axes, without the frame's upper half."""
    figure = Figure(figsize=(7, height), dpi=150, layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False, **options)
    for plot in plots.flat:
        plot.spines[["top", "right"]].set_visible(False)
        plot.tick_params(labelsize=8)
    return figure, plots[0, 0] if rows == columns == 1 else plots


def dressed(plot: Axes, title: str = "", **labels: Any) -> None:
    plot.set_title(title, fontsize=10)
    plot.set(**labels)
    plot.xaxis.label.set_size(9)
    plot.yaxis.label.set_size(9)


def bare(plot: Axes, title: str, side: float) -> None:
    """A square of the plane, without ticks."""
    dressed(
        plot, title, xlim=(-side, side), ylim=(-side, side), aspect="equal", xticks=[], yticks=[]
    )
    plot.spines[:].set_visible(False)


def half_log_snr(level: Level) -> float:
    return math.log(float(level.alpha) / float(level.sigma))


def garment() -> tuple[Tensor, Tensor]:
    """An ankle boot and the noise that it meets in every picture of these pages."""
    return FashionMNIST().open().batch([0]).x, keyed([0], (1, 28, 28))(START)


def gallery(plots: Sequence[Axes], pictures: Sequence[Tensor], titles: Sequence[str]) -> None:
    for plot, picture, title in zip(plots, pictures, titles, strict=True):
        plot.imshow(picture[0, 0], cmap="gray", vmin=-1.5, vmax=1.5, interpolation="nearest")
        plot.set_title(title, fontsize=8)
        plot.set(xticks=[], yticks=[])
        plot.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """64 colours are enough for a plot, and a third of the bytes."""
    FigureCanvasAgg(figure).draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
