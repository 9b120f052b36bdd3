"""Pictures of a run: its loss, its samples, the way from noise to picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minidiffusion.cli import logs
from minidiffusion.cli.main import MissingExtraError
from minidiffusion.data.dataset import Dataset, as_floats
from minidiffusion.data.pictures import to_pil
from minidiffusion.data.sheets import grid
from minidiffusion.files import whole_file
from minidiffusion.models import Autoencoder
from minidiffusion.pipelines.pipeline import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from minidiffusion.shapes import Latent


def axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, an array where they are several; drawn without a screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "plots need matplotlib: pip install 'minidiffusion[plots]'"
        ) from None
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def loss_curve(log: Path, out: Path) -> None:
    """The loss of each step as the log has it, and its running mean."""
    rows = [row for row in logs.rows(log) if math.isfinite(row["loss"])]
    steps = [row["step"] for row in rows]
    losses = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    figure, plot = axes(7.0, 4.0)
    plot.plot(steps, losses, color="#c8d4e3", linewidth=0.8, label="each step")
    window = max(1, len(rows) // 40)
    smooth = losses.unfold(0, window, 1).mean(dim=1)
    plot.plot(steps[window - 1 :], smooth, color="#1f4e8c", label=f"mean of {window} steps")
    plot.set(xlabel="step", ylabel="loss", ylim=(0, float(losses.quantile(0.99)) * 1.1))
    plot.legend(frameon=False)
    plot.spines[["top", "right"]].set_visible(False)
    with whole_file(out, sync=False) as file:
        figure.savefig(file, format="png")


def labelled(pipe: Pipeline, rows: int) -> list[int]:
    """``rows`` of each class, a class a column; or a plain count where there are none."""
    return list(range(len(pipe.row.classes))) * rows


def sheet(pipe: Pipeline, rows: int = 4, prompts: Sequence[str] = (), **options: Any) -> "Picture":
    """A contact sheet: a class a column where there are classes; points become a scatter plot.

    prompts: one picture of each, for a model that reads words.
    """
    if prompts:
        x = pipe.sample(pipe.condition(prompts), len(prompts), **options)
        x = pipe.decode(x).clamp(-1, 1).cpu()
        return grid(x, columns=8, labels=prompts, scale=scale_of(x))
    labels = labelled(pipe, rows) or None
    count = len(labels) if labels else 8 * rows
    x = pipe.sample(pipe.condition(labels, count), count, **options).cpu()
    if x.ndim == 2:
        return scatter(x, labels)
    names = list(pipe.row.classes) if labels else None
    return grid(x, columns=len(names) if names else 8, labels=names, scale=scale_of(x))


@torch.no_grad()
def compared(autoencoder: Autoencoder, dataset: Dataset, count: int = 16) -> "Picture":
    """Pictures of the data above, and below each what the autoencoder makes of it."""
    x = dataset.batch([i * len(dataset) // count for i in range(count)]).x
    device = next(autoencoder.parameters()).device
    made = autoencoder.decode(autoencoder.encode(x.to(device))).clamp(-1, 1).cpu()
    rows = [part for pair in zip(x.split(8), made.split(8), strict=True) for part in pair]
    return grid(torch.cat(rows), columns=8, scale=scale_of(x))


def scale_of(x: "Latent") -> int:
    """Small pictures are shown larger."""
    return max(1, 84 // x.shape[-1])


def scatter(x: "Latent", labels: list[int] | None = None) -> "Picture":
    """Points of the plane, coloured by class."""
    figure, plot = axes(5.0, 5.0)
    plot.scatter(x[:, 0], x[:, 1], s=3, c=labels, cmap="tab10")
    plot.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    figure.canvas.draw()
    pixels = torch.from_numpy(np.array(figure.canvas.buffer_rgba())[..., :3])
    return to_pil(as_floats(pixels.permute(2, 0, 1)[None]))[0]


def strip(
    pipe: Pipeline, moments: int = 10, prompt: int | str | None = None, **options: Any
) -> "Picture":
    """From noise to picture: x_t above, the predicted x0 below, of one picture in each moment.

    prompt: a text, or a class by name or number; else the last class. Latents are decoded.
    """
    if len(pipe.row.shape) != 3:
        raise ValueError("strip: this run makes points, not pictures; take grid or npz")
    last = len(pipe.row.classes) - 1 if pipe.row.classes else None
    prompt = last if prompt is None else prompt
    steps = list(pipe.stream(prompt, **options))
    chosen = [
        steps[round(i)]
        for i in torch.linspace(0, len(steps) - 1, min(moments, len(steps))).tolist()
    ]
    noised, clean = (torch.cat([getattr(step, part) for step in chosen]) for part in ("x", "x0"))
    noised, clean = pipe.decode(noised), pipe.decode(clean)
    names = [f"x, t={step.level.t:.0f}" for step in chosen] + ["its x0"] * len(chosen)
    pictures = torch.cat([noised / noised.std((1, 2, 3), keepdim=True).clamp(min=1), clean]).cpu()
    return grid(pictures, columns=len(chosen), labels=names, scale=scale_of(pictures))
