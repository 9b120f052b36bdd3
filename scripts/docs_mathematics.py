"""The pictures of chapters 1 to 5: noising, targets, paths, ladders, densities, weights."""

import torch
from docs_canvas import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    dressed,
    gallery,
    garment,
    half_log_snr,
    panels,
)
from matplotlib.figure import Figure

from minidiffusion.diffusion import (
    SPACINGS,
    TARGETS,
    Level,
    LogitNormal,
    Mode,
    RectifiedFlow,
    Uniform,
    VarianceExploding,
    VariancePreserving,
    aim,
)
from minidiffusion.layers.embeddings import sinusoidal
from minidiffusion.training.objectives import Objective, weight


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
