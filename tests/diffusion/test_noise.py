"""Noise is a function of (seed, picture, step) and of nothing else."""

import math

import numpy as np
import torch
from rounding import assert_near

from minidiffusion.diffusion import START, keyed, stream


def test_a_picture_has_the_same_bits_alone_and_in_a_batch():
    seeds = [7, 3, -1, 2**63 + 5, 3]
    batch = keyed(seeds, (4, 5, 6))
    for step in (START, 0, 1, 999):
        together = batch(step)
        assert together.shape == (5, 4, 5, 6) and together.dtype == torch.float32
        for i, seed in enumerate(seeds):
            assert torch.equal(keyed([seed], (4, 5, 6))(step)[0], together[i])
        assert torch.equal(together[1], together[4])


def test_the_order_of_asking_does_not_matter():
    one, other = keyed([5], (8,)), keyed([5], (8,))
    forwards = [one(k) for k in range(5)]
    backwards = [other(k) for k in reversed(range(5))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert torch.equal(one(3), forwards[3])


def test_seeds_pictures_and_steps_all_differ():
    seeds = [0, 1, -1, 2**32, 2**63, 2**64 - 2, -(2**62)]
    steps = [START, 0, 1, 2, 2**20]
    draws = [
        tuple(stream(seed, picture, step).standard_normal(4))
        for seed in seeds
        for picture in (0, 1, 2**40)
        for step in steps
    ]
    assert len(set(draws)) == len(seeds) * 3 * len(steps)


def test_no_draw_of_one_step_reappears_in_another():
    """The steps' counters lie so far apart that no run can reach the next one's numbers."""
    numbers = np.concatenate([stream(0, 0, k).integers(0, 2**63, 20_000) for k in (START, 0, 1)])
    assert len(np.unique(numbers)) == 60_000


def test_negative_seeds_are_their_own_64_bits():
    assert torch.equal(keyed([-1], (9,))(0), keyed([2**64 - 1], (9,))(0))
    assert not torch.equal(keyed([-1], (9,))(0), keyed([1], (9,))(0))


def test_a_known_draw():
    """The bits are a promise to every picture that was ever saved with its seed."""
    first = stream(0, 0, START).integers(0, 2**64, 2, dtype=np.uint64)
    again = np.random.Philox(
        key=np.zeros(2, dtype=np.uint64), counter=np.array([0, 0, 0, 2**64 - 1], dtype=np.uint64)
    ).random_raw(2)
    assert first.tolist() == again.tolist()
    assert_near(keyed([42], (3,))(START)[0], KNOWN, 1)


KNOWN = [-0.4791516363620758, -0.34619560837745667, 0.9713176488876343]


def test_the_draws_are_normal():
    n = 400_000
    x = keyed([11], (n,))(0)[0].double()
    tolerance = 4 / math.sqrt(n)
    assert abs(float(x.mean())) < tolerance
    assert abs(float(x.var()) - 1) < tolerance * math.sqrt(2)
    assert abs(float((x**3).mean())) < tolerance * math.sqrt(15)
    assert abs(float((x**4).mean()) - 3) < tolerance * math.sqrt(96)
    ranked = torch.special.ndtr(x.sort().values)
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((ranked - even).abs().max()) < 1.95 / math.sqrt(n)  # Kolmogorov, 0.1 %


def test_neighbouring_seeds_and_steps_are_uncorrelated():
    n = 100_000
    draws = torch.stack(
        [*keyed([0, 1, 2, -1], (n,))(0), *keyed([0], (n,))(1), *keyed([0], (n,))(START)]
    ).double()
    correlation = torch.corrcoef(draws) - torch.eye(6, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(n)
    lagged = torch.corrcoef(torch.stack([draws[0, :-1], draws[0, 1:]]))[0, 1]
    assert abs(float(lagged)) < 4.5 / math.sqrt(n)
