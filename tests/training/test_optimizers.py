"""Muon by hand, AdamW as torch's, and the ends of the schedules."""

import math

import pytest
import torch
from rounding import assert_near
from torch import nn

from minidiffusion.models import MLPConfig, create
from minidiffusion.training.optimizers import AdamW, Muon, Schedule, set_rate
from minidiffusion.training.optimizers import orthogonal as orthogonal_stack


def orthogonal(matrix):
    return orthogonal_stack(matrix[None])[0]


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16), (64, 96), (1, 7), (128, 33)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_come_near_one(shape, scale) -> None:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=draw)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    spaced = u @ torch.diag(torch.linspace(0.05, 1, len(s))) @ v  # no value lost in the noise
    for one in (spaced, matrix if shape[0] != shape[1] else spaced):
        found = torch.linalg.svdvals(orthogonal(one * scale))
        assert found.min() >= 0.6 and found.max() <= 1.3


def test_orthogonal_keeps_the_singular_vectors() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    found = orthogonal(matrix)
    assert_near(found, torch.diag(found.diagonal()), 16)
    assert torch.equal(orthogonal(torch.zeros(3, 2)), torch.zeros(3, 2))
    assert_near(orthogonal(matrix[:, :2]), orthogonal(matrix[:, :2].T).T, 16)


def test_a_stack_is_its_matrices_one_by_one() -> None:
    stack = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    assert_near(orthogonal_stack(stack), torch.stack([orthogonal(m) for m in stack]), 64)


def test_orthogonal_stands_bf16() -> None:
    """Singular values stay near one, the direction stays within bf16's rounding."""
    matrix = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonal(matrix)
    assert found.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found.float())
    assert values.min() >= 0.6 and values.max() <= 1.3
    assert (found - orthogonal(matrix)).norm() < 0.02 * found.norm()


def test_which_parameters_are_whose(models) -> None:
    """Hidden matrices and kernels to Muon; vectors, tables and both ends to AdamW; none to both."""
    for config in (models["unet"], models["dit"], models["mlp"]):
        network = create(type(config)(**{**vars(config), "classes": 3}))
        names = {id(p): name for name, p in network.named_parameters()}
        muon, adamw = ([names[id(p)] for g in o.param_groups for p in g["params"]]
                       for o in Muon().build(network))  # fmt: skip
        assert sorted(muon + adamw) == sorted(names.values())
        parts = dict(network.named_parameters())
        assert all(parts[name].ndim >= 2 for name in muon)
        assert all(parts[name].ndim < 2 or name.startswith(("enter.", "leave.", "labels.table"))
                   for name in adamw)  # fmt: skip
        assert {"enter.weight", "leave.weight", "labels.table.weight"} <= set(adamw)
    kernels = [name for name in Muon().build(create(models["unet"]))[0].param_groups[0]["params"]
               if name.ndim == 4]  # fmt: skip
    assert kernels


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 2, 3, 3)])
def test_two_steps_of_muon_by_hand(shape) -> None:
    draw = torch.Generator().manual_seed(0)
    network = nn.Module()
    network.weight = nn.Parameter(torch.randn(shape, generator=draw))
    config = Muon(lr=0.1, momentum=0.8, weight_decay=0.5)
    network.bias = nn.Parameter(torch.zeros(2))
    muon, _ = config.build(network)
    weight, momentum = network.weight.detach().clone(), torch.zeros(shape)
    for _ in range(2):
        gradient = torch.randn(shape, generator=draw)
        network.weight.grad = gradient.clone()
        muon.step()
        momentum = 0.8 * momentum + 0.2 * gradient
        nesterov = (0.2 * gradient + 0.8 * momentum).reshape(shape[0], -1)
        size = 0.2 * math.sqrt(max(nesterov.shape))
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * size * orthogonal(nesterov).reshape(shape)
        assert_near(network.weight, weight, 16)


def test_an_update_of_muon_is_as_large_as_one_of_adamw() -> None:
    """Root mean square about 0.2, which is what AdamW's updates have in practice."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        update = 0.2 * math.sqrt(max(shape)) * orthogonal(torch.randn(shape))
        assert 0.1 < float(update.square().mean().sqrt()) < 0.25


def test_without_a_gradient_nothing_moves() -> None:
    network = create(MLPConfig(width=4, depth=1))
    before = [p.detach().clone() for p in network.parameters()]
    for optimizer in Muon().build(network):
        optimizer.step()
        assert not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_adamw_is_torchs() -> None:
    """Against the algorithm in float64, and against torch's own loop to the bit."""
    draw = torch.Generator().manual_seed(0)
    network = nn.Linear(5, 3)
    twin = nn.Linear(5, 3)
    twin.load_state_dict(network.state_dict())
    config = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    (ours,) = config.build(network)
    theirs = torch.optim.AdamW(
        twin.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1, foreach=False
    )
    exact = network.weight.detach().double()
    first, second = torch.zeros_like(exact), torch.zeros_like(exact)
    for step in range(1, 6):
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = p.grad.clone()
        gradient = network.weight.grad.double()
        ours.step()
        theirs.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        ratio = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-7)
        exact = exact * (1 - 0.01 * 0.1) - 0.01 * ratio
        assert torch.equal(network.weight, twin.weight)
        assert_near(network.weight, exact, 16)


@pytest.mark.parametrize("size", [3, 8, 24, 100, 1001])
def test_a_piece_is_trained_as_the_whole(size) -> None:
    """No number depends on its place in a tensor, or ranks that share one would drift apart."""
    draw = torch.Generator().manual_seed(size)
    start, gradients = torch.randn(size, generator=draw), torch.randn(20, size, generator=draw)

    def trained(part: slice) -> list[torch.Tensor]:
        network = nn.ParameterList([nn.Parameter(start[part].clone())])
        (optimizer,) = AdamW().build(network)
        for gradient in gradients:
            network[0].grad = gradient[part].clone()
            optimizer.step()
        state = optimizer.state[network[0]]
        return [network[0].detach(), state["exp_avg"], state["exp_avg_sq"]]

    middle = (size + 1) // 2
    halves = zip(trained(slice(0, middle)), trained(slice(middle, size)), strict=True)
    for whole, (left, right) in zip(trained(slice(0, size)), halves, strict=True):
        assert torch.equal(whole, torch.cat([left, right]))


def test_schedules_at_their_ends() -> None:
    for decay in ("constant", "linear", "cosine"):
        schedule = Schedule(warmup=4, decay=decay, end=0.1)
        assert [schedule.factor(k, 20) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
        last = 1.0 if decay == "constant" else 0.1
        assert_near(schedule.factor(20, 20), last, 4, scale=1)
        assert_near(schedule.factor(10**9, 20), last, 4, scale=1)  # never below its end
        rest = [schedule.factor(k, 20) for k in range(4, 21)]
        assert rest == sorted(rest, reverse=True)
    assert Schedule(0, "linear", 0.5).factor(0, 10) == 1.0
    assert Schedule(0, "linear", 0.5).factor(5, 10) == 0.75
    assert_near(Schedule(0, "cosine", 0.0).factor(5, 10), 0.5, 4)
    assert Schedule(0, "cosine", 0.0).factor(10, 10) == 0.0
    assert Schedule(100).factor(9, 10) == 0.1  # a run shorter than its warm-up
    assert Schedule(10).factor(10, 10) == 1.0  # nothing left: no division by zero


def test_the_rate_reaches_every_group() -> None:
    optimizers = Muon().build(create(MLPConfig(width=4, depth=1)))
    set_rate(optimizers, 0.125)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.125, 0.125]
