"""Reading is aiming inverted, reading a perfect network is Tweedie's formula, mixing composes."""

import math

import pytest
import torch
from rounding import EPS, assert_near

from minidiffusion.diffusion import TARGETS, Level, aim, denoiser, read
from minidiffusion.shapes import Cond


def determinant(target, level):
    a, b = TARGETS[target](level)
    return level.alpha * b - level.sigma * a


def pair(*shape):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, *shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS)
def test_reading_what_was_aimed_gives_back_sample_and_noise(target, path):
    x0, eps = pair(5, 3, 2, 2)
    seen = 0
    for t in torch.linspace(0, 1, 101, dtype=torch.float64).tolist():
        level = path.level(t)
        det = determinant(target, level)
        if abs(det) < 1e-3:
            continue
        seen += 1
        x = level.mix(x0, eps)
        found = read(target, level, x, aim(target, level, x0, eps))
        # The solve divides by det and by nothing else, so this is all that rounding may take.
        size = max(1.0, level.sigma) / min(1.0, abs(det))
        assert_near(found.x0, x0, 16, scale=size * 4)
        assert_near(found.eps, eps, 16, scale=size * 4)
    assert seen > 50


@pytest.mark.parametrize("target", TARGETS)
def test_one_level_a_picture_is_read_as_each_picture_alone(target, path):
    x0, eps = pair(6, 3, 4)
    t = torch.linspace(0.3, 0.9, 6, dtype=torch.float64)
    levels = path.level(t)
    x, out = levels.mix(x0, eps), aim(target, levels, x0, eps)
    together = read(target, levels, x, out)
    for i in range(6):
        alone = path.level(float(t[i]))
        assert_near(alone.mix(x0, eps)[i], x[i], 64)
        assert_near(aim(target, alone, x0, eps)[i], out[i], 64)
        found = read(target, alone, x[i : i + 1], out[i : i + 1])
        size = 4 * max(1.0, alone.sigma) / min(1.0, abs(determinant(target, alone)))
        assert_near(found.x0[0], together.x0[i], 64, scale=size)
        assert_near(found.eps[0], together.eps[i], 64, scale=size)


def test_the_table_by_hand():
    level = Level(0.0, 0.8, 0.6)
    x0, eps = pair(2, 3)
    assert torch.equal(aim("eps", level, x0, eps), eps)
    assert torch.equal(aim("x0", level, x0, eps), x0)
    assert_near(aim("v", level, x0, eps), 0.8 * eps - 0.6 * x0, 2)
    assert torch.equal(aim("flow", level, x0, eps), eps - x0)


def test_v_is_the_angular_velocity_and_flow_the_straight_one():
    """Both are dx/d(something) of the noising path itself."""
    x0, eps = pair(2, 3)
    # h**2 / 6 is wrong with a central difference, and EPS / h is rounding: least at this h
    angle, h = 0.7, EPS ** (1 / 3)
    there, back = (Level(0.0, math.cos(a), math.sin(a)) for a in (angle + h, angle - h))
    slope = (there.mix(x0, eps) - back.mix(x0, eps)) / (2 * h)
    level = Level(0.0, math.cos(angle), math.sin(angle))
    assert_near(slope, aim("v", level, x0, eps), 4, eps=EPS / h)
    there, back = (Level(0.0, 1 - s, s) for s in (0.6 + h, 0.6 - h))
    slope = (there.mix(x0, eps) - back.mix(x0, eps)) / (2 * h)
    assert_near(slope, aim("flow", Level(0.0, 0.4, 0.6), x0, eps), 4, eps=EPS / h)


@pytest.mark.parametrize(
    ("target", "alpha", "sigma"), [("x0", 1.0, 0.0), ("eps", 0.0, 1.0)], ids=["x0", "eps"]
)
def test_a_network_that_says_nothing_is_refused(target, alpha, sigma):
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"predicts '{target}' says nothing at alpha = {alpha}"):
        read(target, Level(0.0, alpha, sigma), x, x)
    some = torch.tensor([0.6, alpha]), torch.tensor([0.8, sigma])
    with pytest.raises(ValueError, match="says nothing"):
        read(target, Level(torch.zeros(2), *some), x, x)
    for other in sorted(set(TARGETS) - {target}):
        assert read(other, Level(0.0, alpha, sigma), x, x).x0.isfinite().all()


def test_an_unknown_target_is_refused_by_name():
    x = torch.zeros(1, 1)
    for refused in (
        lambda: aim("score", Level(0.0, 0.6, 0.8), x, x),
        lambda: read("score", Level(0.0, 0.6, 0.8), x, x),
    ):
        with pytest.raises(ValueError, match="unknown 'score'; allowed: eps, x0, v, flow"):
            refused()


WEIGHTS, MEANS, SPREADS = (0.2, 0.5, 0.3), (-2.0, 0.3, 1.5), (0.2, 0.5, 1.1)


def log_density(x, level):
    """log q(x_t) of a mixture of Gaussians, picture by picture."""
    parts = [
        math.log(w) + normal(level.alpha * m, math.hypot(level.alpha * s, level.sigma), x)
        for w, m, s in zip(WEIGHTS, MEANS, SPREADS, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


def normal(mean, std, x):
    # The distribution would round bare Python numbers to float32.
    mean, std = x.new_tensor(mean), x.new_tensor(std)
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


def best_estimate(x, level):
    """E[x0 | x] and E[eps | x] by conditioning each Gaussian: no derivative anywhere."""
    logs, x0s = [], []
    for w, m, s in zip(WEIGHTS, MEANS, SPREADS, strict=True):
        total = (level.alpha * s) ** 2 + level.sigma**2
        centred = x - level.alpha * m
        logs.append(math.log(w) + (-(centred**2) / (2 * total) - 0.5 * math.log(total)).sum(1))
        x0s.append(m + level.alpha * s**2 / total * centred)
    share = torch.softmax(torch.stack(logs), 0)[:, :, None]
    x0 = (share * torch.stack(x0s)).sum(0)
    return x0, (x - level.alpha * x0) / level.sigma


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_tweedie_on_a_mixture_is_autograd_of_the_log_density(target, t, path):
    level = path.level(t)
    x = pair(64, 2)[0] * math.hypot(level.alpha, level.sigma)
    x.requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, level).sum(), x)
    x = x.detach()
    # A perfect network of this target; it must be given its input scale and its time.
    out = aim(target, level, *best_estimate(x, level))

    def network(scaled, times, cond):
        assert_near(scaled, x * min(1, 1 / math.hypot(level.alpha, level.sigma)), 4)
        assert (times == level.t).all() and times.shape == (64,)
        return out

    found = denoiser(network, target, Cond())(x, level)
    size = max(1.0, level.sigma)
    assert_near(found.eps / -level.sigma, score, 512, scale=max(1, 1 / level.sigma**2))
    tweedie = (x + level.sigma**2 * score) / level.alpha
    assert_near(found.x0, tweedie, 512, scale=size / level.alpha)


def test_noising_in_two_steps_is_noising_once(path):
    """q(x_t | x_s) composed with q(x_s | x_0) is q(x_t | x_0), in mean and in variance."""
    s, t = path.level(0.35), path.level(0.8)
    gain = t.alpha / s.alpha
    between = Level(0.0, gain, math.sqrt(t.sigma**2 - gain**2 * s.sigma**2))
    basis = torch.eye(3, dtype=torch.float64)  # x0, the first noise, the second
    x0, first, second = basis[:, None]
    twice = between.mix(s.mix(x0, first), second)[0]
    assert_near(twice[0], t.alpha, 16)
    assert_near(twice[1:].square().sum(), t.sigma**2, 16)


def test_a_network_runs_in_its_own_dtype_and_the_answer_in_that_of_x():
    def network(x, t, cond):
        assert x.dtype == t.dtype == torch.float64
        return x.bfloat16()

    found = denoiser(network, "v", Cond())(
        torch.ones(2, 3, dtype=torch.float64), Level(7.0, 0.6, 0.8)
    )
    assert found.x0.dtype == found.eps.dtype == torch.float64


def test_the_input_of_a_network_never_exceeds_unit_variance(path):
    for t in (0.0, 0.3, 1.0):
        level = path.level(t)
        size = math.hypot(level.alpha, level.sigma)
        assert_near(level.input_scale(), min(1.0, 1 / size), 8)
        many = path.level(torch.full((2,), t, dtype=torch.float64)).input_scale()
        many = many if isinstance(many, torch.Tensor) else torch.full((2,), many)
        assert_near(many, [level.input_scale()] * 2, 8, eps=EPS)
