"""The discriminator's patches, its losses, and who gets which gradient."""

import pytest
import torch
from rounding import assert_near
from torch import Tensor, nn

from minidiffusion.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adversarial,
    hinge_discriminator,
    hinge_generator,
)

SMALL = DiscriminatorConfig(channels=8, groups=4)


def pictures(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    real, fake = torch.rand(2, count, 3, size, size, generator=draw) * 2 - 1
    return real, fake


@pytest.fixture
def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(SMALL)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_this_size(layers: int, patch: int) -> None:
    """By the reach of its gradient; the norms see the whole picture and are left out."""
    config = DiscriminatorConfig(channels=4, layers=layers, groups=4)
    stages = [s for s in Discriminator(config).stages if not isinstance(s, nn.GroupNorm)]
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = nn.Sequential(*stages)(x)
    side = 128 // 2**layers - 2
    assert logits.shape == (1, 1, side, side) == Discriminator(config)(x).shape
    logits[0, 0, side // 2, side // 2].backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(0).nonzero()
    spans = (reached.max(0).values - reached.min(0).values + 1).tolist()
    assert spans == [patch, patch] and config.patch == patch


def test_widths_double_up_to_eight_times() -> None:
    assert DiscriminatorConfig(channels=8, layers=5).widths == [8, 16, 32, 64, 64, 64]
    convs = [s for s in Discriminator(SMALL).stages if isinstance(s, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [8, 16, 32, 1]
    slopes = {s.negative_slope for s in Discriminator(SMALL).stages if isinstance(s, nn.LeakyReLU)}
    assert slopes == {0.2}
    with pytest.raises(ValueError, match="channels: 12 is no multiple of groups = 8"):
        DiscriminatorConfig(channels=12)


def test_the_smallest_picture_has_one_logit(discriminator: Discriminator) -> None:
    assert SMALL.least == 12
    assert discriminator(torch.zeros(2, 3, 12, 12)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"at least 12 pixels a side .* got \(12, 11\)"):
        discriminator(torch.zeros(2, 3, 12, 11))


def test_the_hinge() -> None:
    real, fake = (torch.tensor(v).view(1, 1, 1, 3) for v in ([2.0, 0.5, -1.0], [-3.0, -0.5, 1.0]))
    assert_near(hinge_discriminator(real, fake), 0.5 * (2.5 / 3 + 2.5 / 3), 4)
    assert hinge_discriminator(real * 0, fake * 0).item() == 1
    assert hinge_discriminator(real * 0 + 1, fake * 0 - 1).item() == 0
    assert_near(hinge_generator(fake), 2.5 / 3, 4)


def test_one_backward_gives_the_gradients_of_two_passes(discriminator: Discriminator) -> None:
    """In float64, where the order of a sum leaves no trace."""
    discriminator.double()
    with torch.no_grad():  # bold enough that some patches are past the hinge
        discriminator.stages[-1].weight.mul_(20)  # type: ignore[operator]
    decoder = nn.Conv2d(3, 3, 3, padding=1).double()
    real, z = (each.double() for each in pictures(3))
    real.requires_grad_()

    # Two passes: the generator's turn, its discriminator frozen; then the discriminator's.
    discriminator.requires_grad_(False)
    loss_g = hinge_generator(discriminator(decoder(z)))
    (0.3 * loss_g).backward()
    wanted_g = [weight.grad for weight in decoder.parameters()]
    discriminator.requires_grad_(True)
    loss_d = hinge_discriminator(discriminator(real.detach()), discriminator(decoder(z).detach()))
    (0.7 * loss_d).backward()
    wanted_d = [weight.grad for weight in discriminator.parameters()]

    decoder.zero_grad()
    discriminator.zero_grad()
    ours_g, ours_d = adversarial(discriminator, real, decoder(z))
    (0.3 * ours_g + 0.7 * ours_d).backward()
    assert_near(torch.stack([ours_g, ours_d]), torch.stack([loss_g, loss_d]), 64)
    for net, wanted in ((decoder, wanted_g), (discriminator, wanted_d)):
        for weight, gradient in zip(net.parameters(), wanted, strict=True):
            assert_near(weight.grad, gradient, 1024)  # sums over up to 768 places
    assert loss_d > 1.01 and real.grad is None
    assert all(w.abs().max() > 1e-6 for w in wanted_d if w is not None)


def test_each_loss_reaches_its_own_side_alone(discriminator: Discriminator) -> None:
    real, fake = pictures(2)
    fake.requires_grad_()
    generator, judge = adversarial(discriminator, real, fake)
    generator.backward()
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert fake.grad is not None and (fake.grad != 0).any()
    fake.grad = None
    judge.backward()
    assert fake.grad is None
    assert all(weight.grad is not None for weight in discriminator.parameters())


def test_a_few_steps_tell_real_from_fake_and_autocast_agrees(discriminator: Discriminator) -> None:
    real, fake = pictures(8)
    fake = fake * 0.7
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.5, 0.9))
    first = hinge_discriminator(discriminator(real), discriminator(fake)).item()
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = adversarial(discriminator, real, fake)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 < 0.8 < first
    exact = adversarial(discriminator, real, fake)
    with torch.autocast("cpu", torch.bfloat16):
        for rough, loss in zip(adversarial(discriminator, real, fake), exact, strict=True):
            assert_near(rough, loss, 12, scale=1, eps=2**-8)
