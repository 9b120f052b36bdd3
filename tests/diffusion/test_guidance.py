"""Guidance against its closed forms, through the same door that real networks use."""

from functools import partial

import pytest
import torch
from rounding import assert_near
from torch import nn

from minidiffusion.diffusion import (
    SAMPLERS,
    TARGETS,
    Estimate,
    Level,
    RectifiedFlow,
    SkipLayers,
    VariancePreserving,
    aim,
    cfg,
    cfg_zero,
    denoiser,
    guided,
    inpainted,
    interval,
    read,
    rescaled,
)
from minidiffusion.shapes import Cond

LEVEL = Level(400.0, 0.6, 0.8)


def labels(*numbers):
    return Cond(labels=torch.tensor(numbers))


class Network(nn.Module):
    """Small, but real: matrix products, an embedding, the time; conditions of every kind."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.label = nn.Embedding(4, 6)
            self.inner, self.outer = nn.Linear(6, 32), nn.Linear(32, 6)
            self.double()
        self.batches = []

    def forward(self, x, t, cond):
        self.batches.append(len(x))
        h = x + torch.cos(t / 300)[:, None]
        for name in ("pooled", "concat", "tokens"):
            part = getattr(cond, name)
            h = h if part is None else h + part.flatten(1).sum(1, keepdim=True)
        h = h if cond.labels is None else h + self.label(cond.labels)
        return self.outer(torch.tanh(self.inner(h)))


@pytest.fixture
def network():
    with torch.no_grad():
        yield Network()


@pytest.fixture
def x():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


YES, NO = labels(0, 1, 2), labels(3, 3, 3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("scale", "which"), [(1.0, 0), (0.0, 1)])
def test_the_ends_of_the_scale_are_bit_equal_to_one_model(network, x, target, scale, which):
    found = guided(network, target, [YES, NO], cfg(scale))(x, LEVEL)
    # The same batch, one half of it read with nothing done to it.
    alone = guided(network, target, [YES, NO], lambda outs, level: outs[which])(x, LEVEL)
    assert torch.equal(found.x0, alone.x0) and torch.equal(found.eps, alone.eps)
    plain = denoiser(network, target, (YES, NO)[which])(x, LEVEL)
    # Another batch shape may sum a matrix product in another order, and no more than that.
    assert_near(found.x0, plain.x0, 32)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_ends_are_bit_equal_to_the_network_alone_where_it_works_by_element(x, scale):
    def network(x, t, cond):
        return x * (1 + cond.labels[:, None]) + t[:, None] / 1000

    found = guided(network, "eps", [YES, NO], cfg(scale))(x, LEVEL)
    alone = denoiser(network, "eps", YES if scale else NO)(x, LEVEL)
    assert torch.equal(found.x0, alone.x0) and torch.equal(found.eps, alone.eps)


def test_guidance_is_one_batch_and_a_straight_line_through_both(network, x):
    outs = [network(x, torch.full((3,), 400.0).double(), cond) for cond in (YES, NO)]
    network.batches.clear()
    found = guided(network, "v", [YES, NO], cfg(7.5))(x, LEVEL)
    assert network.batches == [6]
    expected = read("v", LEVEL, x, outs[1] + 7.5 * (outs[0] - outs[1]))
    assert_near(found.x0, expected.x0, 32)
    assert_near(found.eps, expected.eps, 32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("path", [VariancePreserving(), RectifiedFlow(3.0)], ids=["vp", "flow"])
def test_guiding_between_gaussians_of_one_variance_moves_the_mean(
    gaussian, last, target, scale, path
):
    """Data N(m1, s2) given, N(m0, s2) not: scale w samples N(m0 + w (m1 - m0), s2) exactly."""
    m0, m1, variance = -0.4, 0.7, 0.3
    means = torch.tensor([m1, m0], dtype=torch.float64)

    def network(x, t, cond):
        level = path.at(float(t[0]))
        total = level.alpha**2 * variance + level.sigma**2
        centred = x - level.alpha * means[cond.labels][:, None]
        eps = level.sigma / total * centred
        x0 = means[cond.labels][:, None] + level.alpha * variance / total * centred
        return aim(target, level, x0, eps)

    denoise = guided(network, target, [labels(0, 0), labels(1, 1)], cfg(scale))
    exact = gaussian(m0 + scale * (m1 - m0), variance)
    x = torch.tensor([[0.8], [-1.3]], dtype=torch.float64)
    levels = path.ladder([950.0, 700.0, 400.0, 90.0])
    for sampler in ("ddim", "dpmpp_2m", "heun"):
        found = last(SAMPLERS[sampler], denoise, x, levels)
        wanted = last(SAMPLERS[sampler], exact, x, levels)
        # at the first level alpha is 1 / 10, and the guided difference as large as the scale
        assert_near(found, wanted, 64, scale=10 * max(1, scale))


def test_rescaling_keeps_the_conditional_spread(x):
    outs = [x, torch.roll(x, 1) * 0.3]
    strong = cfg(7.5)(outs, LEVEL)
    whole = rescaled(cfg(7.5), 1.0)(outs, LEVEL)
    assert_near(whole.std(1), x.std(1), 16)
    ratio = (x.std(1) / strong.std(1))[:, None]
    assert_near(rescaled(cfg(7.5), 0.7)(outs, LEVEL), strong * (0.7 * ratio + 0.3), 16)
    assert torch.equal(rescaled(cfg(7.5), 0.0)(outs, LEVEL), strong)
    silent = rescaled(cfg_zero(7.5), 0.7)(outs, LEVEL._replace(index=0))
    assert torch.equal(silent, torch.zeros_like(x))
    # At scale 1 there is nothing to restore.
    assert_near(rescaled(cfg(1.0))(outs, LEVEL), x, 8)


def test_rescaling_works_picture_by_picture():
    rng = torch.Generator().manual_seed(0)
    outs = list(torch.randn(2, 4, 3, 5, 5, generator=rng, dtype=torch.float64))
    outs[0] = outs[0] * torch.tensor([1.0, 2.0, 5.0, 9.0]).view(4, 1, 1, 1)
    together = rescaled(cfg(5.0))(outs, LEVEL)
    for i in range(4):
        alone = rescaled(cfg(5.0))([out[i : i + 1] for out in outs], LEVEL)
        assert_near(together[i], alone[0], 16)


def test_an_interval_guides_only_inside(network, x):
    both = guided(network, "v", [YES, NO], cfg(4.0))
    alone = denoiser(network, "v", YES)
    limited = interval(both, alone, 200.0, 800.0)
    for t, inside in ((200.0, False), (200.5, True), (800.0, True), (800.5, False), (0.0, False)):
        level = Level(t, 0.6, 0.8)
        assert torch.equal(limited(x, level).x0, (both if inside else alone)(x, level).x0)
    assert (both(x, LEVEL).x0 - alone(x, LEVEL).x0).abs().max() > 0.01


def test_outside_the_interval_there_is_one_pass(network, x):
    both = guided(network, "v", [YES, NO], cfg(4.0))
    limited = interval(both, denoiser(network, "v", YES), 200.0, 800.0)
    for t in (100.0, 500.0, 900.0):
        limited(x, Level(t, 0.6, 0.8))
    assert network.batches == [len(x), 2 * len(x), len(x)]


def test_every_field_of_the_conditions_reaches_its_own_half(network, x):
    rng = torch.Generator().manual_seed(5)

    def cond():
        return Cond(
            tokens=torch.randn(3, 2, 4, generator=rng, dtype=torch.float64),
            pooled=torch.randn(3, 5, generator=rng, dtype=torch.float64),
            labels=torch.randint(0, 4, (3,), generator=rng),
            concat=torch.randn(3, 1, 2, 2, generator=rng, dtype=torch.float64),
        )

    conds = [cond() for _ in range(3)]
    for i, alone in enumerate(conds):
        found = guided(network, "eps", conds, lambda outs, level, i=i: outs[i])(x, LEVEL)
        expected = denoiser(network, "eps", alone)(x, LEVEL)
        assert_near(found.eps, expected.eps, 32)


def test_a_field_given_for_one_condition_only_is_refused(network):
    with pytest.raises(ValueError, match="for every condition or for none"):
        guided(network, "eps", [YES, Cond()], cfg(2.0))


def test_a_network_of_another_dtype_is_combined_in_that_of_x(x):
    seen = []

    def combine(outs, level):
        seen.extend(out.dtype for out in outs)
        return outs[0]

    guided(lambda x, t, cond: x.half(), "eps", [YES, NO], combine)(x, LEVEL)
    assert seen == [torch.float64] * 2


MASK = torch.tensor([[1.0, 1, 0, 0, 1, 0]] * 3, dtype=torch.float64)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_comes_back(gaussian, last, sampler, path):
    rng = torch.Generator().manual_seed(2)
    known = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    start = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    noise = [torch.randn(3, 6, generator=rng, dtype=torch.float64) for _ in range(8)]
    levels = path.ladder(8, "trailing")
    x = levels[0].mix(known, start)
    denoise = inpainted(gaussian(0.2, 0.5), known, MASK)
    found = last(SAMPLERS[sampler], denoise, x, levels, noise.__getitem__)
    outside, inside = MASK == 0, MASK == 1
    size = max(10.0, levels[0].sigma / levels[0].alpha if levels[0].alpha else 1.0)
    if sampler in ("heun", "plms", "lms"):
        # They end in a slope, not in the estimate: equal up to the rounding of x / alpha.
        assert_near(found[outside], known[outside], 1024, scale=size)
    else:
        assert torch.equal(found[outside], known[outside])
    # Where it paints, it does what it would have done without the rest: the data are independent.
    free = last(SAMPLERS[sampler], gaussian(0.2, 0.5), x, levels, noise.__getitem__)
    assert_near(found[inside], free[inside], 1024, scale=size)


def test_an_inpainted_estimate_stays_on_its_path(gaussian):
    rng = torch.Generator().manual_seed(4)
    x, known = torch.randn(2, 3, 6, generator=rng, dtype=torch.float64)
    mask = torch.rand(3, 6, generator=rng, dtype=torch.float64)
    found = inpainted(gaussian(), known, mask)(x, LEVEL)
    assert_near(LEVEL.mix(*found), x, 4)
    expected = (1 - mask) * known + mask * gaussian()(x, LEVEL).x0
    assert_near(found.x0, expected, 4)


def test_painting_depends_on_what_is_known():
    """A denoiser that looks at its neighbours sees the known region at every step."""
    seen = []

    def mean_of_all(x, level):
        seen.append(float(x[:, 2:].mean() / level.alpha))
        x0 = x.mean(1, keepdim=True).expand_as(x) / level.alpha
        return Estimate(x0, (x - level.alpha * x0) / level.sigma)

    known = torch.full((1, 6), 5.0, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1, 0, 0, 0, 0]], dtype=torch.float64)
    levels = VariancePreserving().ladder(10)
    run = partial(SAMPLERS["ddim"], inpainted(mean_of_all, known, mask))
    steps = list(run(levels[0].mix(known, torch.zeros_like(known)), levels, lambda k: known))
    assert_near(seen, [5.0] * 10, 64)
    assert_near(steps[-1].x, known, 64)


def test_cfg_zero_takes_the_nearest_multiple_of_the_unconditional_output():
    """Its length is the least-squares one, so the rest is orthogonal to it."""
    rng = torch.Generator().manual_seed(1)
    one, other = (torch.randn(2, 3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    found = cfg_zero(1.0)([one, other], LEVEL._replace(index=3))
    assert_near(found, one, 8)
    fitted = cfg_zero(0.0)([one, other], LEVEL._replace(index=3))
    residue = ((one - fitted) * other).sum((1, 2))
    assert_near(residue, [0, 0], 12, scale=10)  # a sum of 12 products, of which some are near 10
    three = cfg_zero(3.0)([one, other], LEVEL._replace(index=3))
    assert_near(three, fitted + 3 * (one - fitted), 8)
    nothing = cfg_zero(3.0)([one, torch.zeros_like(one)], LEVEL._replace(index=3))
    assert_near(nothing, 3 * one, 4)


def test_cfg_zero_is_silent_at_first():
    one, other = torch.ones(2, 3), torch.full((2, 3), 2.0)
    for index, silent in ((0, 1), (1, 2)):
        found = cfg_zero(3.0, silent)([one, other], LEVEL._replace(index=index))
        assert torch.equal(found, torch.zeros(2, 3))
    assert cfg_zero(3.0, 1)([one, other], LEVEL._replace(index=1)).any()
    assert cfg_zero(3.0, 0)([one, other], LEVEL).any()


def test_skipped_layers_are_led_away_from(network, x):
    less = Network()
    nn.init.zeros_(less.label.weight)
    skipping = SkipLayers(less, 2.5, first=0.2, last=4.0)
    for index, acts in ((0, False), (1, True), (3, True), (4, False), (9, False)):
        level = LEVEL._replace(index=index)
        outs = []

        def ask(x, t, cond, outs=outs):
            outs.append(network(x, t, cond))
            return outs[-1]

        found = guided(ask, "flow", [YES, NO], cfg(4.0), skipping)(x, level)
        yes, no = outs[0].chunk(2)
        out = no + 4 * (yes - no)
        if acts:
            out = out + 2.5 * (yes - less(x, x.new_full((3,), level.t), YES))
        wanted = read("flow", level, x, out)
        assert_near(found.x0, wanted.x0, 64)
    assert less.batches == [3] * 4


def test_the_shift_grows_with_the_root_of_the_pixels():
    path = RectifiedFlow(3.0)
    assert path.resized(1024**2, 1024**2) == path
    assert_near(path.resized(2048**2, 1024**2).shift, 6.0, 2)
    # Esser et al. 2024, eq. 23: t_m = sqrt(m/n) t / (1 + (sqrt(m/n) - 1) t), for shift 1.
    level = RectifiedFlow(1.0).resized(4, 1).level(0.3)
    assert_near(level.sigma, 2 * 0.3 / (1 + 0.3), 4)
