"""The KL autoencoder against diffusers, from the files that it writes; and its tiles."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from minidiffusion.checkpoints.parts import load_autoencoder
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.models import Autoencoder, AutoencoderConfig

CLOSE = 2e-5
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


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parity_with_diffusers(kind: str, tmp_path: Path) -> None:
    reference = made(kind)
    reference.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    image = torch.rand(2, 3, 24, 40) * 2 - 1
    theirs = reference.encode(image).latent_dist
    posterior = ours.posterior(image)
    assert 0.3 < posterior.mean.std() < 3
    assert (posterior.mean - theirs.mean).abs().max() < CLOSE
    assert (posterior.log_variance - theirs.logvar).abs().max() < CLOSE
    c = reference.config
    shift, scale = c.shift_factor or 0.0, c.scaling_factor
    z = ours.encode(image)
    assert (z - (theirs.mean - shift) * scale).abs().max() < CLOSE
    noise = torch.randn(z.shape)
    sample = (theirs.mean + theirs.std * noise - shift) * scale
    assert (ours.encode(image, noise) - sample).abs().max() < CLOSE
    decoded = reference.decode(z / scale + shift).sample
    assert 0.3 < decoded.std() < 3
    assert (ours.decode(z) - decoded).abs().max() < CLOSE
    assert torch.allclose(posterior.kl(), theirs.kl(), rtol=1e-5)


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
