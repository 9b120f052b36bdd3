"""Samplers: generators that walk a ladder of levels with a denoiser. SAMPLERS is the contents.

Each takes (denoise, x, levels, noise), where x lies at levels[0], and yields one Step a level
further; the last Step's x is the result. A sampler holds no state between calls, knows no network
and no noise schedule; to cancel it, stop iterating.

The deterministic ones solve one ordinary differential equation in one of two charts. Where there
is signal, y = x / alpha over s = sigma / alpha moves by eps. Where alpha = 0 that chart has no
place for x; on the straight path alpha + sigma = 1 the sample itself moves over sigma by the
velocity eps - x0. A method that averages slopes averages those of its chart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minidiffusion.diffusion.levels import Denoise, Estimate, Level, Noise, Step
from minidiffusion.shapes import Latent

Sampler = Callable[[Denoise, Latent, Sequence[Level], Noise], Iterator[Step]]


class Fixed(NamedTuple):
    """A level whose numbers are Python floats, as a ladder holds them."""

    t: float
    alpha: float
    sigma: float
    index: int  # type: ignore[assignment]  # the field wins over tuple.index


def _pairs(levels: Sequence[Level]) -> Iterator[tuple[int, Fixed, Fixed]]:
    """The steps of a ladder: (k, this level, the next)."""
    ladder = [Fixed(float(v.t), float(v.alpha), float(v.sigma), v.index) for v in levels]
    if len(ladder) < 2:
        raise ValueError("a ladder needs at least two levels: where x is and where it goes")
    for k, (here, there) in enumerate(pairwise(ladder)):
        if not (here.sigma > 0 and _kept(here, there) <= 1 + 1e-9):
            raise ValueError(
                f"a ladder must fall from noise to signal; step {k}: {here} -> {there}"
            )
        yield k, here, there


def _kept(here: Fixed, there: Fixed) -> float:
    """exp(-h): the noise-to-signal ratio ahead over the one here, the share of noise kept."""
    if here[1:3] == there[1:3]:
        return 1.0  # a level visited twice, at alpha = 0 too
    if there.alpha == 0:
        return math.inf
    return (there.sigma * here.alpha) / (here.sigma * there.alpha)


def ddim(
    denoise: Denoise, x: Latent, levels: Sequence[Level], noise: Noise, eta: float = 0.0
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12), on any path.

    eta = 0 is Euler's method on every path (in both charts); eta = 1 is ancestral sampling: DDPM
    (Ho et al. 2020, algorithm 2, with the smaller variance) and Euler-ancestral alike.
    """
    for k, here, there in _pairs(levels):
        x0, eps = denoise(x, Level(*here))
        fresh = eta * there.sigma * math.sqrt(max(0.0, 1 - _kept(here, there) ** 2))
        x = there.alpha * x0 + math.sqrt(max(0.0, there.sigma**2 - fresh**2)) * eps
        if fresh > 0:
            x = x + fresh * noise(k)
        yield Step(k, x, x0, Level(*there))


def lcm(denoise: Denoise, x: Latent, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): all noise is drawn anew."""
    for k, here, there in _pairs(levels):
        x0 = denoise(x, Level(*here)).x0
        x = there.alpha * x0 + there.sigma * noise(k) if there.sigma > 0 else there.alpha * x0
        yield Step(k, x, x0, Level(*there))


class Chart(NamedTuple):
    """The coordinates in which slopes are averaged; see the top of this file."""

    straight: bool

    def scale(self, level: Fixed) -> float:
        return level.alpha + level.sigma if self.straight else level.alpha

    def slope(self, estimate: Estimate) -> Latent:
        return estimate.eps - estimate.x0 if self.straight else estimate.eps

    def move(self, x: Latent, slope: Latent, here: Fixed, there: Fixed) -> Latent:
        """One straight step along a slope."""
        m, n = self.scale(here), self.scale(there)
        return n * (x / m + (there.sigma / n - here.sigma / m) * slope)


def chart(levels: Sequence[Level]) -> Chart:
    """The straight chart on a straight path (and so for every ladder that starts at alpha = 0)."""
    return Chart(any(abs(float(v.alpha) + float(v.sigma) - 1) < 1e-6 for v in levels[:1]))


def heun(denoise: Denoise, x: Latent, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); two network calls a step."""
    lines = chart(levels)
    for k, here, there in _pairs(levels):
        estimate = denoise(x, Level(*here))
        slope = lines.slope(estimate)
        ahead = lines.move(x, slope, here, there)
        if there.sigma > 0:
            slope = (slope + lines.slope(denoise(ahead, Level(*there)))) / 2
            ahead = lines.move(x, slope, here, there)
        x = ahead
        yield Step(k, x, estimate.x0, Level(*there))


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(denoise: Denoise, x: Latent, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, eq. 12): four slopes, one network call a step.

    The first step is corrected by a second call, as latent diffusion does it.
    """
    lines, slopes = chart(levels), list[Latent]()
    for k, here, there in _pairs(levels):
        estimate = denoise(x, Level(*here))
        slopes = [lines.slope(estimate), *slopes[:3]]
        slope = _mixed(slopes, ADAMS_BASHFORTH[len(slopes) - 1])
        if k == 0 and there.sigma > 0:
            ahead = lines.move(x, slope, here, there)
            slope = (slope + lines.slope(denoise(ahead, Level(*there)))) / 2
        x = lines.move(x, slope, here, there)
        yield Step(k, x, estimate.x0, Level(*there))


def lms(
    denoise: Denoise, x: Latent, levels: Sequence[Level], noise: Noise, order: int = 4
) -> Iterator[Step]:
    """Linear multistep with the weights of an uneven ladder: the slopes' polynomial, integrated."""
    lines, past = chart(levels), dict[float, Latent]()
    for k, here, there in _pairs(levels):
        m, n = lines.scale(here), lines.scale(there)
        estimate = denoise(x, Level(*here))
        # Slopes by their places, so that a level visited twice counts once.
        past = dict([*{here.sigma / m: lines.slope(estimate), **past}.items()][:order])
        x = n * (x / m + _mixed([*past.values()], _integrals([*past], there.sigma / n)))
        yield Step(k, x, estimate.x0, Level(*there))


def _mixed(slopes: Sequence[Latent], weights: Sequence[float]) -> Latent:
    return sum(
        (w * s for w, s in zip(weights[1:], slopes[1:], strict=True)), weights[0] * slopes[0]
    )


def _integrals(places: Sequence[float], end: float) -> list[float]:
    """The integral of each Lagrange polynomial over ``places``, from places[0] to ``end``."""
    weights = []
    for j, place in enumerate(places):
        others = [p - places[0] for i, p in enumerate(places) if i != j]
        top = np.polynomial.polynomial.polyfromroots(others) if others else np.ones(1)
        bottom = math.prod(place - places[0] - p for p in others)
        whole = np.polynomial.polynomial.polyint(top)
        weights.append(float(np.polynomial.polynomial.polyval(end - places[0], whole)) / bottom)
    return weights


def half_log_snr(level: Fixed | Level) -> float:
    """The clock of DPM-Solver: log(alpha / sigma)."""
    return _log(float(level.alpha)) - _log(float(level.sigma))


def log_sigma(level: Fixed | Level) -> float:
    """The clock of Stable Diffusion 3.5's own code: -log(sigma)."""
    return -_log(float(level.sigma))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


Clock = Callable[[Fixed], float]


def _slowness(clock: Clock, before: Fixed | None, here: Fixed, there: Fixed) -> float:
    """The coming step over the last one by the clock, h / h_last; 0 asks for first order.

    So the first step, the last (which ends at sigma = 0) and one from alpha = 0 are first order.
    """
    if before is None:
        return 0.0
    last, step = clock(here) - clock(before), clock(there) - clock(here)
    return step / last if math.isfinite(step) and math.isfinite(last) and last > 0 else 0.0


def dpmpp_2m(
    denoise: Denoise,
    x: Latent,
    levels: Sequence[Level],
    noise: Noise,
    eta: float = 0.0,
    clock: Clock = half_log_snr,
) -> Iterator[Step]:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order, one network call a step.

    eta = 1 solves the stochastic equation instead, in its midpoint form (section 6 there).
    """
    before: Fixed | None = None
    last: Latent | None = None
    for k, here, there in _pairs(levels):
        x0 = denoise(x, Level(*here)).x0
        ratio = _slowness(clock, before, here, there)
        ahead = x0 if last is None else x0 + ratio / 2 * (x0 - last)
        kept = _kept(here, there)
        decay = kept**eta if kept > 0 else float(eta == 0)
        fresh = there.sigma * math.sqrt(max(0.0, 1 - decay**2))
        share = there.alpha * (1 - kept * decay)
        x = there.sigma / here.sigma * decay * x + share * ahead
        if fresh > 0:
            x = x + fresh * noise(k)
        before, last = here, x0
        yield Step(k, x, x0, Level(*there))


def unipc(denoise: Denoise, x: Latent, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """UniPC of order 2, B2 (Zhao et al. 2023): each network call also corrects the step before."""
    before: Fixed | None = None
    start, last = x, x  # where the step that led here began, and the estimate there
    history: list[tuple[Fixed, Latent]] = []
    for k, here, there in _pairs(levels):
        x0 = denoise(x, Level(*here)).x0
        if before is not None:
            x = _corrected(start, x0, history, here)
        ratio = _slowness(half_log_snr, before, here, there)
        ahead = x0 if before is None else x0 + ratio / 2 * (x0 - last)
        start, history = x, [(here, x0), *history[:1]]
        x = there.sigma / here.sigma * x + there.alpha * (1 - _kept(here, there)) * ahead
        before, last = here, x0
        yield Step(k, x, x0, Level(*there))


def _corrected(
    start: Latent, x0: Latent, history: list[tuple[Fixed, Latent]], here: Fixed
) -> Latent:
    """UniC: the step that ended here, taken again now that the estimate here is known.

    With r = (clock two levels ago - clock one ago) / h, the two weights solve Vandermonde's
    equations (Zhao et al. 2023, eq. 9): w1 + w2 = b1, r w1 + w2 = b2.
    """
    back, x0_back = history[0]
    kept = _kept(back, here)
    change = 0.5 * (x0 - x0_back)
    if len(history) > 1:
        older, x0_older = history[1]
        h = half_log_snr(here) - half_log_snr(back)
        r = (half_log_snr(older) - half_log_snr(back)) / h if h > 0 else -math.inf
        if math.isfinite(r) and r < 0:
            b1 = (math.expm1(-h) / -h - 1) / math.expm1(-h)
            b2 = 2 * ((math.expm1(-h) / -h - 1) / -h - 0.5) / math.expm1(-h)
            w1 = (b2 - b1) / (r - 1)
            change = w1 / r * (x0_older - x0_back) + (b1 - w1) * (x0 - x0_back)
    return here.sigma / back.sigma * start + here.alpha * (1 - kept) * (x0_back + change)


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": partial(ddim, eta=1.0),
    "plms": plms,
    "lms": lms,
    "euler": partial(ddim, eta=0.0),
    "euler_ancestral": partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "unipc": unipc,
    "lcm": lcm,
}
