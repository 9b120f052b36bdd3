"""The pictures of chapters 6 to 8: sampling, guidance and judging, on data with known answers."""

import math
from functools import cache
from typing import Any

import torch
from docs_canvas import BLUE, COLOURS, GREEN, GREY, PALE, RED, bare, dressed, panels
from matplotlib.figure import Figure
from torch import Tensor

from minidiffusion import pipeline, train
from minidiffusion.data import FashionMNIST, Toy
from minidiffusion.diffusion import (
    SAMPLERS,
    START,
    Level,
    RectifiedFlow,
    VariancePreserving,
    cfg,
    denoiser,
    guided,
    inpainted,
    keyed,
    read,
)
from minidiffusion.evaluation.features import judge
from minidiffusion.evaluation.frechet import Gaussian, floor_of, frechet_distance, real_floor
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Cond
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import build


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
