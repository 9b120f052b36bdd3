"""The KL autoencoder against diffusers, from the files that it writes; and its tiles."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from faults import assert_faults_are_found
from rounding import assert_parity
from torch import Tensor

from minidiffusion.checkpoints.parts import load_autoencoder
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.layers.convolution import channels_last, silu
from minidiffusion.models import Autoencoder, AutoencoderConfig
from minidiffusion.models.clip import CLIPConfig, PictureConfig
from minidiffusion.models.discriminator import DiscriminatorConfig
from minidiffusion.typed import build

KINDS = {
    "4 channels": {"latent_channels": 4, "scaling_factor": 0.18215},
    "16 channels": {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
FILE = "diffusion_pytorch_model.safetensors"
FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@torch.no_grad()
def made(kind: str) -> AutoencoderKL:
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        **KINDS[kind],
    ).eval()  # fmt: skip
    for name, p in network.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
        p.copy_(torch.randn(p.shape) * scale + (p.ndim == 1 and name.endswith("weight")))
    return network


def assert_same(folder: Path, reference: AutoencoderKL, check: Any = assert_parity) -> Any:
    c = reference.config
    shift, scale = c.shift_factor or 0.0, c.scaling_factor

    def run_ours(ours: Autoencoder, _: Any, image: Tensor, z: Tensor, noise: Tensor) -> Any:
        found = ours.posterior(image)
        latents = ours.encode(image), ours.encode(image, noise)
        return found.mean, found.log_variance, found.kl(), *latents, ours.decode(z)

    def run_theirs(_: Any, model: AutoencoderKL, image: Tensor, z: Tensor, noise: Tensor) -> Any:
        found = model.encode(image).latent_dist
        latents = ((x - shift) * scale for x in (found.mean, found.mean + found.std * noise))
        decoded = model.decode(z / scale + shift).sample
        return found.mean, found.logvar, found.kl(), *latents, decoded

    reference.save_pretrained(folder)
    ours, image = load_autoencoder(folder), torch.rand(2, 3, 24, 40) * 2 - 1
    z = ours.encode(image)
    return check(run_ours, run_theirs, ours, reference, image, z, torch.randn(z.shape))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parity_with_diffusers(kind: str, tmp_path: Path) -> None:
    mean, *_, decoded = assert_same(tmp_path, made(kind))
    assert 0.3 < mean.std() < 3 and 0.3 < decoded.std() < 3


def test_a_fault_of_one_part_in_10000_is_found(tmp_path: Path) -> None:
    assert_same(tmp_path, made("4 channels"), assert_faults_are_found)


@torch.no_grad()
def test_former_names_are_the_same_network(tmp_path: Path) -> None:
    made("4 channels").save_pretrained(tmp_path)
    tensors = read_safetensors(tmp_path / FILE)
    former = {}
    for name, tensor in tensors.items():
        for now, then in FORMER.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        former[name] = tensor.clone()
    write_safetensors(former, tmp_path / "f.safetensors")
    now = load_autoencoder(tmp_path / FILE).state_dict()
    then = load_autoencoder(tmp_path / "f.safetensors", groups=16).state_dict()
    assert all(torch.equal(then[name], tensor) for name, tensor in now.items())


@torch.no_grad()
def test_tiles_are_close_to_the_whole() -> None:
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderConfig(channels=8, multipliers=(1, 2), groups=4)).eval()
    z = torch.randn(1, 4, 20, 30)
    whole, tiled = network.decode(z), network.decode(z, tile=16)
    assert tiled.shape == whole.shape
    assert torch.equal(network.decode(z, tile=30), whole)
    assert (whole - tiled).abs().mean() < 0.1 * whole.std()
    image = torch.rand(1, 3, 40, 60) * 2 - 1
    assert network.encode(image, tile=16).shape == network.encode(image).shape
    with pytest.raises(ValueError, match="at least 8 latent pixels"):
        network.decode(z, tile=4)
    with pytest.raises(ValueError, match="multiples of 2"):
        network.encode(image[:, :, :-1])


# --- patches --------------------------------------------------------------------------------------

SMALL = AutoencoderConfig(channels=8, multipliers=(1, 2), groups=4, blocks=1)


@pytest.mark.parametrize(("patch", "levels"), [(1, 2), (2, 1), (2, 2), (4, 2), (3, 1)])
@torch.no_grad()
def test_patches_make_latents_smaller(patch: int, levels: int) -> None:
    config = replace(SMALL, patch=patch, multipliers=(1, 2)[:levels])
    factor = patch * 2 ** (levels - 1)
    assert config.factor == factor
    network = Autoencoder(config).eval()
    image = torch.rand(2, 3, 4 * factor, 6 * factor) * 2 - 1
    latent = network.encode(image)
    assert latent.shape == (2, 4, 4, 6)
    assert network.decode(latent).shape == image.shape
    noise = torch.randn(latent.shape)
    made, posterior = network(image, noise)
    assert made.shape == image.shape and posterior.mean.shape == latent.shape
    wide = AutoencoderConfig(channels=8, groups=4, multipliers=(1, 1), patch=patch)
    assert Autoencoder(wide).decode(torch.randn(1, 4, 9, 12), tile=8).shape == (
        1, 3, 18 * patch, 24 * patch
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"rows and columns must be multiples of {2 * patch}"):
        Autoencoder(wide).encode(torch.zeros(1, 3, 2 * patch, 2 * patch + 1))


@torch.no_grad()
def test_a_patch_is_a_square_of_its_picture() -> None:
    """What enters at a place are the pixels of its square, channel by channel; what leaves too."""
    torch.manual_seed(0)
    network = Autoencoder(replace(SMALL, patch=2, multipliers=(1,)))
    image, seen = torch.randn(1, 3, 8, 12), []
    hook = network.encoder.enter.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network.posterior(image)
    hook.remove()
    for y, x in ((0, 0), (3, 5), (1, 2)):
        square = image[0, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert torch.equal(seen[0][0, :, y, x], square.flatten())
    whole: list[torch.Tensor] = []
    network.decoder.leave.register_forward_hook(lambda _, __, out: whole.append(out))
    made = network.decoder(torch.randn(1, 4, 4, 6))
    assert torch.equal(made[0, :, 2:4, 4:6].flatten(), whole[0][0, :, 1, 2])


@torch.no_grad()
def test_a_patch_of_one_changes_nothing() -> None:
    """The same weights by name and shape, and the bits of the plain convolutions."""
    torch.manual_seed(0)
    network = Autoencoder(SMALL).eval()
    e, d = network.encoder, network.decoder
    assert e.enter.weight.shape == (8, 3, 3, 3) and d.leave.weight.shape == (3, 8, 3, 3)
    x = image = torch.rand(1, 3, 16, 16) * 2 - 1
    for stage in (e.enter, *e.down, e.middle, e.norm, silu, e.leave):
        x = stage(channels_last(x) if stage is e.enter else x)
    mean, log_variance = network.posterior(image)
    assert torch.equal(torch.cat([mean, log_variance], 1), network.quant(x).contiguous())
    y = z = torch.randn(1, 4, 8, 8)
    for stage in (d.enter, d.middle, *d.up, d.norm, silu, d.leave):
        y = stage(channels_last(y) if stage is d.enter else y)
    assert torch.equal(d(z), y)


@pytest.mark.parametrize(
    "kind", [AutoencoderConfig, CLIPConfig, PictureConfig, DiscriminatorConfig]
)
def test_sizes_that_no_machine_holds_are_refused_before_they_are_tried(kind: type) -> None:
    whole = [one.name for one in fields(kind) if one.name != "skip" and type(one.default) is int]
    assert len(whole) >= 4
    for name in whole:
        with pytest.raises(ValueError, match=f"{name}: must be at most [0-9]+, got 1000000000000"):
            build(kind, {name: 10**12})
