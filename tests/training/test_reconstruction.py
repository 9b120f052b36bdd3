"""An autoencoder's loss against its formula, who gets which gradient, and what a run leaves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from rounding import assert_near, peak
from torch import Tensor

from minidiffusion.checkpoints.own import load_autoencoder
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.data import Tensors
from minidiffusion.models import Autoencoder, DiscriminatorConfig
from minidiffusion.models.autoencoder import Posterior
from minidiffusion.models.discriminator import hinge_discriminator, hinge_generator
from minidiffusion.models.lpips import LPIPS
from minidiffusion.training import reconstruction
from minidiffusion.training.loop import train
from minidiffusion.training.objectives import Reconstruction, drawn
from minidiffusion.training.parallel import World
from minidiffusion.training.parts import read
from minidiffusion.training.reconstruction import Reconstructing, fitted
from minidiffusion.typed import ConfigError

CPU = torch.device("cpu")


def task(data: Tensors | None = None, **objective: Any) -> Reconstructing:
    data = encoders.captioned() if data is None else data
    recipe = encoders.recipe("autoencoder")
    recipe = replace(recipe, objective=Reconstruction(**{"lpips": 0.0, **objective}))
    return Reconstructing(fitted(recipe, data), data, CPU, "fp32")


def number(x: Any) -> float:
    return float(x.detach())


def network(made: Reconstructing) -> reconstruction.Players:
    torch.manual_seed(0)
    players = made.network()
    with torch.no_grad():
        for p in players.parameters():
            p += 0.05 * torch.randn(p.shape)
    return players


def by_hand(made: Reconstructing, ae: Autoencoder, image: Tensor, step: int, first: int) -> Any:
    """The picture that comes back, and the KL of each number of the latent, picture by picture."""
    pictures, divergences = [], []
    for i, picture in enumerate(image):
        _, noise = drawn(made.recipe.seed, step, first + i, (1, 4, 4, 4))
        mean, log_variance = ae.quant(ae.encoder(picture[None])).chunk(2, dim=1)
        z = mean + log_variance.exp().sqrt() * noise
        pictures.append(ae.decoder(ae.post_quant(z)))
        variance = log_variance.exp()
        divergences.append(0.5 * (mean.square() + variance - 1 - variance.log()).mean())
    return torch.cat(pictures), torch.stack(divergences)


def test_the_loss_by_hand() -> None:
    made = task(l1=2.0, kl=0.1)
    players = network(made)
    batch = made.dataset.batch(range(6))
    loss, parts = made.loss(players, 3, 5, batch)
    back, kl = by_hand(made, players.autoencoder, batch.x, 3, 5)
    l1 = (back - batch.x).abs().mean()
    assert_near(loss, 2 * l1 + 0.1 * kl.mean(), 16)
    _, said = read(torch.zeros(()), parts, World())
    assert list(said) == ["l1", "kl"]
    assert_near(torch.tensor(said["l1"]), l1, 16)
    assert_near(torch.tensor(said["kl"]), kl.mean(), 16)
    assert kl.mean() > 0.01 and not any(part.requires_grad for part in parts.values())
    other, _ = made.loss(players, 4, 5, batch)
    assert other != loss  # other noise


def test_halves_of_a_batch_make_up_its_loss() -> None:
    made = task(kl=0.1)
    players, whole = network(made), made.dataset.batch(range(8))
    halves = [made.loss(players, 0, s, made.dataset.batch(range(s, s + 4)))[0] for s in (0, 4)]
    assert_near((halves[0] + halves[1]) / 2, made.loss(players, 0, 0, whole)[0], 16)


def test_the_divergence_of_a_known_gaussian() -> None:
    """Against torch's own, summed over each latent."""
    mean, log_variance = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    mine = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    theirs = torch.distributions.kl_divergence(mine, torch.distributions.Normal(0.0, 1.0))
    found = Posterior(mean, log_variance).kl()
    assert_near(found, theirs.sum(dim=(1, 2, 3)), 16)
    assert Posterior(torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 5, 5)).kl() == 0


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    write_safetensors(LPIPS().state_dict(), path, {"network": "alex"})
    return path


def test_how_pictures_look_is_part_of_it(lpips: Path) -> None:
    data = encoders.captioned(4, side=32)
    made = task(data, lpips=0.3, perceptual=str(lpips))
    players, batch = network(made), data.batch(range(4))
    plain, _ = task(data).loss(players, 0, 0, batch)
    loss, parts = made.loss(players, 0, 0, batch)
    assert made.lpips is not None
    _, noise = drawn(0, 0, 0, (4, 4, 8, 8))
    looks = made.lpips(players.autoencoder(batch.x, noise)[0], batch.x).mean()
    assert_near(loss, plain + 0.3 * looks, 16)
    assert_near(parts["lpips"][0] / parts["lpips"][1], looks, 16)
    loss.backward()
    assert all(p.grad is None for p in made.lpips.parameters())


def test_without_its_weights_one_line_names_the_script(tmp_path: Path) -> None:
    recipe = encoders.recipe("autoencoder", tmp_path / "run")
    there = str(tmp_path / "none.safetensors")
    recipe = replace(recipe, objective=Reconstruction(lpips=0.1, perceptual=there))
    with pytest.raises(ConfigError) as error:
        next(train(recipe, dataset=encoders.captioned()))
    said = str(error.value)
    assert said.startswith(f"objective.perceptual: {there}: ") and "\n" not in said
    assert "scripts/build_lpips.py" in said and said.endswith("or objective.lpips: 0")


def test_without_lpips_no_file_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_lpips", lambda path: pytest.fail("read"))
    report = next(train(encoders.recipe("autoencoder"), dataset=encoders.captioned()))
    assert set(report.parts) == {"l1", "kl"}


# --- the game -------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def sized(**given: Any) -> DiscriminatorConfig:
        return DiscriminatorConfig(channels=8, **given)

    monkeypatch.setattr(reconstruction, "DiscriminatorConfig", sized)
    yield


def test_each_side_has_its_own_gradient(small: None) -> None:
    """The autoencoder's is that of its losses without the discriminator's; that one's is of its
    own loss alone, and no factor changes it."""
    made = task(kl=0.1, adversarial=0.5)
    players, batch = network(made), made.dataset.batch(range(4))
    rival = players.discriminator
    assert rival is not None
    loss, parts = made.loss(players, 0, 0, batch)
    loss.backward()
    found = {name: p.grad for name, p in players.named_parameters()}
    back, kl = by_hand(made, players.autoencoder, batch.x, 0, 0)
    own = (back - batch.x).abs().mean() + 0.1 * kl.mean() + 0.5 * hinge_generator(rival(back))
    other = hinge_discriminator(rival(batch.x), rival(back.detach()))
    assert_near(loss, own + other, 16)
    said = {name: number(part[0] / part[1]) for name, part in parts.items()}
    assert list(said) == ["l1", "kl", "adversarial", "discriminator"]
    assert_near(torch.tensor(said["discriminator"]), other, 16)
    for side, total in ((players.autoencoder, own), (rival, other)):
        named = dict(side.named_parameters())
        wanted = torch.autograd.grad(total, list(named.values()), retain_graph=True)
        prefix = "autoencoder" if side is players.autoencoder else "discriminator"
        for name, gradient in zip(named, wanted, strict=True):
            mine = found[f"{prefix}.{name}"]
            assert mine is not None
            assert_near(mine, gradient, 256, scale=max(map(peak, wanted)))


def test_the_discriminator_stands_by_at_first(small: None) -> None:
    made = task(adversarial=0.5, adversarial_from=2)
    players, batch = network(made), made.dataset.batch(range(4))
    assert players.idle and not network(task(adversarial=0.5)).idle and not network(task()).idle
    for step, plays in ((0, False), (1, False), (2, True)):
        players.zero_grad()
        loss, parts = made.loss(players, step, 0, batch)
        loss.backward()
        assert ("discriminator" in parts) == plays
        assert players.discriminator is not None
        assert all((p.grad is not None) == plays for p in players.discriminator.parameters())
    assert task().network().discriminator is None


# --- what is left ---------------------------------------------------------------------------------


def test_latents_of_the_saved_file_have_unit_variance_and_no_mean(
    small: None, tmp_path: Path
) -> None:
    data = encoders.captioned()
    recipe = encoders.recipe("autoencoder", tmp_path)
    recipe = replace(recipe, objective=Reconstruction(lpips=0.0, adversarial=0.5))
    *_, last = train(recipe, dataset=data)
    made = last.average()
    assert isinstance(made, Autoencoder) and not made.training
    x = data.batch(range(len(data))).x
    latents = made.encode(x)
    assert_near(latents.mean(), 0, 16, scale=1)
    assert_near(latents.std(), 1, 16)
    weights = open_weights(tmp_path / "model.safetensors")
    assert all(name.startswith("autoencoder.") for name in weights)  # no discriminator
    read = load_autoencoder(weights)
    assert read.config == made.config
    assert torch.equal(read.encode(x), latents)
    assert torch.equal(read.decode(latents), made.decode(latents))


def test_so_many_pictures_are_measured_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 every third: the mean is that of these alone."""
    monkeypatch.setattr(reconstruction, "MEASURED", 8)
    made = task()
    players = network(made)
    result = made.result({n: p.detach() for n, p in players.named_parameters()})
    latents = result.encode(made.dataset.batch(range(0, 24, 3)).x)
    assert_near(latents.mean(), 0, 16, scale=1)
    assert_near(latents.std(), 1, 16)


def test_sizes() -> None:
    grey = Tensors(torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
    assert fitted(encoders.recipe("autoencoder"), grey).model.picture_channels == 1
    for shape in ((4, 3, 16, 17), (4, 3, 3, 16), (4, 2)):
        odd = Tensors(torch.zeros(shape, dtype=torch.uint8))
        with pytest.raises(ConfigError, match="data: the autoencoder wants sides of multiples"):
            fitted(encoders.recipe("autoencoder"), odd)
