"""Draws the pictures of docs/from-noise-to-picture and refreshes the key tables of docs/recipes.md.

    python scripts/make_docs.py                   every picture, then the tables: about a minute
    python scripts/make_docs.py ladders paths     these pictures alone
    python scripts/make_docs.py --run runs/demo   samples.png and strip.png of a trained run as well

Everything is computed with public functions of the package; the clouds of points are learned here,
in seconds.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from minidiffusion import load, pipeline, train
from minidiffusion.cli import figures
from minidiffusion.data import FashionMNIST, Toy, save_png
from minidiffusion.diffusion import (
    SAMPLERS,
    SPACINGS,
    START,
    TARGETS,
    Level,
    LogitNormal,
    Mode,
    RectifiedFlow,
    Uniform,
    VarianceExploding,
    VariancePreserving,
    aim,
    cfg,
    denoiser,
    guided,
    inpainted,
    keyed,
    read,
)
from minidiffusion.evaluation.features import judge
from minidiffusion.evaluation.frechet import Gaussian, floor_of, frechet_distance, real_floor
from minidiffusion.layers.embeddings import sinusoidal
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Cond
from minidiffusion.training.objectives import Objective, weight
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import build, fields_help

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "from-noise-to-picture" / "pictures"
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


# --- one picture of the data set ----------------------------------------------------------------


def garment() -> tuple[Tensor, Tensor]:
    """An ankle boot and the noise that it meets in every picture of these pages."""
    return FashionMNIST().open().batch([0]).x, keyed([0], (1, 28, 28))(START)


def gallery(plots: Sequence[Axes], pictures: Sequence[Tensor], titles: Sequence[str]) -> None:
    for plot, picture, title in zip(plots, pictures, titles, strict=True):
        plot.imshow(picture[0, 0], cmap="gray", vmin=-1.5, vmax=1.5, interpolation="nearest")
        plot.set_title(title, fontsize=8)
        plot.set(xticks=[], yticks=[])
        plot.spines[:].set_visible(False)


def noising() -> Figure:
    """One picture at eight levels of the straight path."""
    x0, eps = garment()
    levels = [RectifiedFlow().level(k / 7) for k in range(8)]
    figure, plots = panels(1, 8, 1.25)
    titles = [f"$\\alpha$ {v.alpha:.2f}\n$\\sigma$ {v.sigma:.2f}" for v in levels]
    gallery(plots[0], [level.mix(x0, eps) for level in levels], titles)
    return figure


def targets() -> Figure:
    """What each row of TARGETS asks of the network, at five times of the cosine path."""
    x0, eps = garment()
    path, times = VariancePreserving("cosine"), (0.02, 0.25, 0.5, 0.75, 0.95)
    figure, plots = panels(1 + len(TARGETS), len(times), 7)
    levels = [path.level(t) for t in times]
    heads = [
        f"t = {t:g}\n$\\alpha$ {v.alpha:.2f}, $\\sigma$ {v.sigma:.2f}"
        for t, v in zip(times, levels, strict=True)
    ]
    gallery(plots[0], [level.mix(x0, eps) for level in levels], heads)
    for row, target in zip(plots[1:], TARGETS, strict=True):
        gallery(row, [aim(target, level, x0, eps) for level in levels], [""] * len(times))
    for row, name in zip(plots, ("input x", *TARGETS), strict=True):
        row[0].set_ylabel(name, fontsize=10)
    return figure


# --- paths, ladders, densities, weights ---------------------------------------------------------


def paths() -> Figure:
    """alpha and sigma of the three paths."""
    times = torch.linspace(0, 1, 200).tolist()
    rows = [
        ("variance preserving", VariancePreserving()), ("rectified flow", RectifiedFlow()),
        ("variance exploding", VarianceExploding()),
    ]  # fmt: skip
    figure, plots = panels(1, 3, 2.4)
    for plot, (title, path) in zip(plots[0], rows, strict=True):
        levels = [path.level(t) for t in times]
        plot.plot(times, [v.alpha for v in levels], color=BLUE, label=r"$\alpha$, signal")
        plot.plot(times, [v.sigma for v in levels], color=RED, label=r"$\sigma$, noise")
        dressed(plot, title, xlabel="t")
    plots[0, 2].set_yscale("log")
    plots[0, 2].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def snr() -> Figure:
    """The same paths in the plane of (alpha, sigma), and by their signal-to-noise ratio."""
    rows = [
        ("VP, scaled_linear", VariancePreserving(), BLUE, "-"),
        ("VP, cosine", VariancePreserving("cosine"), BLUE, "--"),
        ("flow", RectifiedFlow(), GREEN, "-"), ("flow, shift 3", RectifiedFlow(3.0), GREEN, "--"),
        ("VE", VarianceExploding(), ORANGE, "-"),
    ]  # fmt: skip
    times = torch.linspace(0.003, 0.997, 300).tolist()
    figure, plots = panels(1, 2, 3)
    plane, clock = plots[0]
    for name, path, colour, style in rows:
        levels = [path.level(t) for t in times]
        if style == "-":
            plane.plot([v.alpha for v in levels], [v.sigma for v in levels], color=colour)
        log_snr = [2 * half_log_snr(v) for v in levels]
        clock.plot(times, log_snr, style, color=colour, label=name)
    notes = {
        "VP: a circle": (0.45, 0.97),
        "flow: a line": (0.08, 0.4),
        "VE: straight up": (1.04, 1.2),
    }
    for text, place in notes.items():
        plane.annotate(text, place, fontsize=8)
    limits = {"xlim": (0, 1.7), "ylim": (0, 1.4), "aspect": "equal"}
    dressed(plane, "where the levels lie", xlabel=r"$\alpha$", ylabel=r"$\sigma$", **limits)
    dressed(clock, "how noisy at which t", xlabel="t", ylabel=r"log SNR = 2 log($\alpha/\sigma$)")
    clock.legend(frameon=False, fontsize=7.5)
    return figure


def ladders() -> Figure:
    """The levels of ten steps, spacing by spacing, on Stable Diffusion's path."""
    path = VariancePreserving()
    figure, plots = panels(1, 2, 3, sharey=True)
    for k, name in enumerate(SPACINGS):
        levels = path.ladder(10, name)
        noisy = [v for v in levels if v.sigma > 0]
        look = {"marker": "o", "ms": 4, "lw": 0.6, "color": COLOURS[k % 3]}
        plots[0, 0].plot([v.t for v in levels], [k] * len(levels), **look)
        plots[0, 1].plot([-half_log_snr(v) for v in noisy], [k] * len(noisy), **look)
    ticks = {"yticks": range(len(SPACINGS)), "yticklabels": SPACINGS}
    dressed(plots[0, 0], "by network time", xlabel="t, from noise to picture", **ticks)
    dressed(plots[0, 1], "by noise", xlabel=r"log($\sigma/\alpha$); the clean end is off the scale")
    for plot in plots[0]:
        plot.invert_xaxis()
        plot.grid(axis="y", color="#eeeeee")
    plots[0, 0].invert_yaxis()
    return figure


def densities() -> Figure:
    """Where training looks: a million draws of each density, as histograms."""
    u = (torch.arange(1_000_000) + 0.5) / 1_000_000
    rows = [
        ("uniform", Uniform(), GREY, "-"),
        ("logit_normal, mean 0, std 1", LogitNormal(), BLUE, "-"),
        ("logit_normal, mean 0.8, std 1", LogitNormal(mean=0.8), BLUE, "--"),
        ("mode, scale 1.29", Mode(), RED, "-"), ("mode, scale -0.5", Mode(-0.5), RED, "--"),
    ]  # fmt: skip
    figure, plot = panels(1, 1, 2.8)
    for name, density, colour, style in rows:
        heights, edges = torch.histogram(density.at(u), bins=100, range=(0, 1), density=True)
        plot.plot((edges[1:] + edges[:-1]) / 2, heights, style, color=colour, label=name)
    dressed(plot, xlabel="t: 0 is clean, 1 is noise", ylabel="density", ylim=(0, 3.9))
    plot.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def weights() -> Figure:
    """What one unit of squared x0-error costs, by target and weighting, on the VP path."""
    path = VariancePreserving()
    levels = [path.level(t) for t in torch.linspace(0, 1, 300).tolist()]
    figure, plot = panels(1, 1, 2.8)
    log_snr = [2 * half_log_snr(v) for v in levels]
    for target, colour in zip(TARGETS, COLOURS, strict=False):
        costs = [x0_cost(Objective(target=target), v) for v in levels]
        plot.plot(
            log_snr,
            costs,
            color=colour,
            label=f"{target}, uniform",
            lw=4 if target == "eps" else 1.5,
        )
    clipped = [x0_cost(Objective(weighting="min_snr"), v) for v in levels]
    plot.plot(log_snr, clipped, color="black", ls="--", label="any target, min_snr (gamma 5)")
    dressed(
        plot, xlabel="log SNR (clean on the left)", ylabel="cost of an error in x0", yscale="log"
    )
    plot.invert_xaxis()
    plot.legend(frameon=False, fontsize=8)
    return figure


def x0_cost(objective: Objective, level: Level) -> float:
    """An error of 1 in x0 is an error of det / sigma in the output; what that costs."""
    a, b = TARGETS[objective.target](level)
    det = level.alpha * b - level.sigma * a
    return float(weight(objective, level)) * (det / level.sigma) ** 2


def time_embedding() -> Figure:
    """Each time of the network as a row of waves."""
    waves = sinusoidal(torch.arange(1000.0), 64)
    figure, plot = panels(1, 1, 2.4)
    image = plot.imshow(waves.T, aspect="auto", cmap="RdBu", interpolation="nearest")
    dressed(plot, xlabel="t", ylabel="feature: 32 cosines,\nthen 32 sines")
    figure.colorbar(image, ax=plot, ticks=[-1, 0, 1])
    return figure


# --- points of the plane ------------------------------------------------------------------------


@cache
def moons() -> Pipeline:
    """configs/two_moons.yaml in short: a perceptron, 1,500 steps, seconds."""
    values = {
        "data": {"name": "toy", "kind": "two_moons"}, "model": "mlp", "path": "rectified_flow",
        "objective": {"density": "uniform", "label_drop": 0.5}, "schedule": {"warmup": 20},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "run": {"steps": 1500, "batch_size": 256, "ema": 0.99, "precision": "fp32"},
    }  # fmt: skip
    *_, last = train(build(Recipe, values))
    return pipeline(last.average())


def trajectories() -> Figure:
    """Sixteen noises on their way to two moons, by three samplers of fifteen steps."""
    pipe, data, count = moons(), Toy().open().x, 16
    cond, start = (
        pipe.condition(["upper", "lower"] * (count // 2)),
        keyed(range(count), (2,))(START),
    )
    titles = {"ddim": "Euler's method", "heun": "two calls a step", "ddpm": "fresh noise each step"}
    figure, plots = panels(1, 3, 2.6)
    for plot, name in zip(plots[0], titles, strict=True):
        steps = pipe.steps(cond, sampler=name, num_steps=15, guidance_scale=1.0, seed=0)
        way = torch.stack([start, *(step.x for step in steps)])
        plot.scatter(*data[:1500].T, s=1, color=PALE)
        for k, colour in enumerate((BLUE, RED)):
            plot.plot(way[:, k::2, 0], way[:, k::2, 1], lw=0.7, color=colour, alpha=0.6)
            plot.scatter(*way[0, k::2].T, s=9, facecolors="white", edgecolors=colour, lw=0.8)
            plot.scatter(*way[-1, k::2].T, s=12, color=colour, zorder=3)
        bare(plot, f"{name}: {titles[name]}", 2.6)
    return figure


def inpainting() -> Figure:
    """Points whose first coordinate is known to be 0; the sampler fills in the second."""
    pipe, data = moons(), Toy().open().x
    cond, noise, levels = (
        pipe.condition(count=100),
        keyed(range(100), (2,)),
        pipe.row.path.ladder(50),
    )
    denoise = denoiser(pipe.network, "flow", cond)
    denoise = inpainted(denoise, known=torch.zeros(100, 2), mask=torch.tensor([0.0, 1.0]))
    figure, plots = panels(1, 3, 2.6)
    for plot, name in zip(plots[0], ("ddim", "ddpm", "lcm"), strict=True):
        with torch.no_grad():
            *_, last = SAMPLERS[name](denoise, noise(START), levels, noise)
        plot.scatter(*data[:1500].T, s=1, color=PALE)
        plot.axvline(0, color=GREY, lw=0.6)
        plot.scatter(*last.x.T, s=120, color=RED, alpha=0.4, marker="_", lw=1.2)
        bare(plot, name, 2.6)
    return figure


# --- clouds whose best network is known exactly --------------------------------------------------

CENTRES = 1.2 * torch.tensor([[0.0, 1.0], [-0.87, -0.5], [0.87, -0.5]])
WIDTH = 0.7


def three_gaussians(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The best flow network for three Gaussians: E[eps - x0 | x], by Bayes; label 3 is none."""
    sigma = t[:, None] / 1000
    alpha, variance = 1 - sigma, ((1 - sigma) * WIDTH) ** 2 + sigma**2
    away = x[:, None] - alpha[..., None] * CENTRES
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=1)
    chosen = torch.nn.functional.one_hot(cond.labels, 4).to(x.dtype)
    share = torch.where(chosen[:, 3:] > 0, share, chosen[:, :3])[..., None]
    x0 = CENTRES + (alpha * WIDTH**2 / variance)[..., None] * away
    eps = (sigma / variance)[..., None] * away
    return (share * (eps - x0)).sum(1)


def guided_points(scale: float, count: int) -> tuple[Tensor, Tensor]:
    """Points drawn from the three Gaussians under guidance, and the classes asked for."""
    labels = torch.arange(count) % 3
    conds = [Cond(labels=labels), Cond(labels=torch.full_like(labels, 3))]
    denoise = guided(three_gaussians, "flow", conds, cfg(scale))
    noise, levels = keyed(range(count), (2,)), RectifiedFlow().ladder(40)
    *_, last = SAMPLERS["heun"](denoise, noise(START), levels, noise)
    return last.x, labels


def guidance() -> Figure:
    """The same noises at four scales of guidance; each class has a colour."""
    figure, plots = panels(1, 4, 2.1)
    for plot, scale in zip(plots[0], (0, 1, 2, 4), strict=True):
        x, labels = guided_points(scale, 900)
        plot.scatter(*x.T, s=2, c=[(BLUE, RED, GREEN)[k] for k in labels], linewidths=0)
        plot.scatter(*CENTRES.T, s=40, marker="+", color="black", linewidths=1)
        bare(plot, f"scale {scale}", 3.5)
    return figure


def tradeoff() -> Figure:
    """What guidance wins and what it costs, on points whose truth is known."""
    scales = [1, 1.25, 1.5, 2, 3, 4, 6]
    count = 3000
    draws = keyed(range(50_000, 50_000 + 2 * count), (2,))(START)
    true = CENTRES[torch.arange(2 * count) % 3] + WIDTH * draws
    agreed, far = [], []
    for scale in scales:
        x, labels = guided_points(scale, count)
        nearest = torch.cdist(x, CENTRES).argmin(1)
        agreed.append(100 * float((nearest == labels).float().mean()))
        far.append(frechet_distance(x, true[:count]))
    figure, plots = panels(1, 2, 2.4)
    plots[0, 0].plot(scales, agreed, "o-", color=BLUE, ms=4)
    titles = ["agreement rises", "the distribution suffers"]
    for plot, values, title, colour in zip(
        plots[0], (agreed, far), titles, (BLUE, RED), strict=True
    ):
        plot.plot(scales, values, "o-", color=colour, ms=4)
        dressed(plot, title, xlabel="guidance scale")
    plots[0, 0].set(ylim=(80, 101), ylabel="% nearest to their class")
    floor = frechet_distance(true[count:], true[:count])
    plots[0, 1].axhline(floor, color=GREY, lw=0.8)
    plots[0, 1].annotate(f"floor: {floor:.4f}", (4.2, 0.06), fontsize=8, color=GREY)
    plots[0, 1].set(ylabel="Frechet distance")
    return figure


def convergence() -> Figure:
    """The error of a Gaussian's exact flow against the number of network calls."""
    path, mean, spread = VariancePreserving("linear"), 0.5, 0.25
    x = keyed(range(64), (1,))(START).double()
    figure, plot = panels(1, 1, 3.6)
    names = ("ddim", "heun", "dpmpp_2m", "unipc", "plms", "lms")
    for name, colour in zip(names, COLOURS, strict=True):
        calls, errors = [], []
        for n in (8, 10, 14, 20, 28, 40, 56, 80, 113, 160):
            counted = Counted(mean, spread)
            levels = [
                path.at_noise(s)
                for s in torch.linspace(math.log(10), math.log(0.05), n + 1).exp().tolist()
            ]
            *_, last = SAMPLERS[name](counted, x, levels, lambda k: x)
            calls.append(counted.calls)
            errors.append(float((last.x - counted.moved(x, levels[0], levels[-1])).abs().mean()))
        plot.loglog(calls, errors, "o-", ms=3.5, lw=1.2, color=colour, label=name)
    for order, factor in ((1, 0.42), (2, 1.0), (4, 130.0)):
        plot.loglog([30, 150], [factor / c**order for c in (30, 150)], ":", color="black", lw=0.9)
        plot.annotate(f"order {order}", (155, factor / 150**order), fontsize=8)
    dressed(plot, xlabel="network calls", ylabel="mean error of the sample")
    plot.legend(frameon=False, fontsize=8)
    return figure


class Counted:
    """The best denoiser of N(mean, spread^2), which counts how often it is asked."""

    def __init__(self, mean: float, spread: float) -> None:
        self.mean, self.spread, self.calls = mean, spread, 0

    def size(self, level: Level) -> float:
        return math.hypot(level.alpha * self.spread, level.sigma)

    def __call__(self, x: Tensor, level: Level) -> Any:
        self.calls += 1
        eps = level.sigma / self.size(level) ** 2 * (x - level.alpha * self.mean)
        return read("eps", level, x, eps)

    def moved(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """Where the exact flow carries x: it keeps the place within the Gaussian."""
        centred = (x - start.alpha * self.mean) / self.size(start)
        return end.alpha * self.mean + self.size(end) * centred


def floors() -> Figure:
    """The Frechet distance of two sets of real pictures falls with their number, and is never 0."""
    data, critic = FashionMNIST().open(), judge("fashion_mnist")
    features = critic.extractor(data.batch(range(len(data))).x)
    whole, counts = Gaussian.of(features), [150, 300, 600, 1250, 2500, 5000]
    measured = [[real_floor(features, n, seed) for seed in range(3)] for n in counts]
    figure, plot = panels(1, 1, 2.8)
    plot.loglog(
        counts,
        [floor_of(whole, n) for n in counts],
        color=GREY,
        label="floor_of: by formula, to first order in 1/n",
    )
    for seed in range(3):
        label = "real_floor: measured, three shuffles" if seed == 0 else None
        plot.loglog(counts, [row[seed] for row in measured], "o", ms=4, color=BLUE, label=label)
    dressed(
        plot,
        xlabel="pictures in each set",
        ylabel="Frechet distance of\nreal to real",
        xticks=counts,
        xticklabels=counts,
    )
    plot.minorticks_off()
    plot.legend(frameon=False, fontsize=8)
    return figure


DRAWN: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw
    for draw in (
        noising, paths, snr, targets, densities, weights, time_embedding, ladders, trajectories,
        convergence, guidance, inpainting, floors, tradeoff,
    )
}  # fmt: skip


def of_run(run: Path) -> None:
    """A contact sheet and the way from noise to picture."""
    pipe = load(run)
    save_png(figures.sheet(pipe, rows=4), PICTURES / "samples.png")
    save_png(figures.strip(pipe), PICTURES / "strip.png")


# --- docs/recipes.md ----------------------------------------------------------------------------

TABLE = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROW = re.compile(r"\| `([\w.]+)`(?: \((\w+)\))? \| .*? \| .*? \| (.*) \|")


def with_tables(page: str) -> str:
    """The page with its tables of keys as the package has them now.

    Keys, what they take and their defaults come from Recipe; the meanings stay as they stand.
    """
    meanings = {(key, of): meaning for key, of, meaning in ROW.findall(page)}

    def table(found: re.Match[str]) -> str:
        lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
        for key, of, takes, default in recipe_keys():
            if key.split(".")[0] == found[2]:
                name = f"`{key}` ({of})" if of else f"`{key}`"
                meaning = meanings.get((key, of), "TODO")
                lines.append(f"| {name} | {takes} | {default} | {meaning} |")
        return "\n".join([found[1], *lines, "", found[3]])

    return TABLE.sub(table, page)


def recipe_keys() -> list[tuple[str, str, str, str]]:
    """(key, the block that it belongs to where several may stand there, takes, default)."""
    rows = []
    for key, takes, default in fields_help(Recipe):
        takes, _, of = takes.partition(" (of ")
        takes = re.sub(r"(\.\d{3})\d+", r"\1", takes).replace(" | ", " or ")
        default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        rows.append((key, of.removesuffix(")"), takes, default))
    return rows


def save(figure: Figure, path: Path) -> None:
    """64 colours are enough for a plot, and a third of the bytes."""
    FigureCanvasAgg(figure).draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    options = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    options.add_argument("pictures", nargs="*", metavar="PICTURE", help=", ".join(DRAWN))
    options.add_argument("--run", type=Path, help="a trained run, for samples.png and strip.png")
    given = options.parse_args()
    if unknown := [name for name in given.pictures if name not in DRAWN]:
        options.error(f"no picture {unknown[0]!r}; there are {', '.join(DRAWN)}")
    torch.set_num_threads(1)
    PICTURES.mkdir(exist_ok=True)
    for name in given.pictures or DRAWN:
        save(DRAWN[name](), PICTURES / f"{name}.png")
        print(f"{name}.png  {(PICTURES / f'{name}.png').stat().st_size // 1024} KB", flush=True)
    if given.run is not None:
        of_run(given.run)
    page = DOCS / "recipes.md"
    page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
