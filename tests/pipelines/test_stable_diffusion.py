"""Whole pictures of tiny Stable Diffusion models, beside diffusers with the same weights."""

from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import official
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import minidiffusion
from minidiffusion.diffusion.noise import START, keyed
from minidiffusion.pipelines.pipeline import Pipeline

SCHEDULERS: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "clip_sample": False}, None),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}, None),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, None),
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}, "trailing"
    ),
}  # fmt: skip
"""A sampler's peer as Stable Diffusion's users set it up, and our ladder if not the usual one."""
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1
}  # fmt: skip
OTHERS = ("safety_checker", "feature_extractor", "depth_estimator")
STEPS, SIDE = 20, 64
GUIDANCE = 3.0
"""Latents of a random network are ten times as large as a picture's already; at 7.5 and with Euler
diffusers itself is 1.1e-4 away from float64, and we 6.6e-5."""
PROMPT, NEGATIVE = "a photo of an astronaut, riding a horse", "blurry"


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    for family in ("sd1", "sd2", "sd1-inpaint", "sd2-depth"):
        official.make(root / f"{family}.safetensors", family)
        official.make(root / family, family, dialect="diffusers")
    return root


@cache
def ours(shelf: Path, family: str = "sd1") -> Pipeline:
    return minidiffusion.load(shelf / f"{family}.safetensors", dtype=torch.float32)


@cache
def components(folder: Path) -> dict[str, Any]:
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    }


def theirs(shelf: Path, kind: Any, sampler: str, family: str = "sd1") -> Any:
    cls, options, _ = SCHEDULERS[sampler]
    target = "v_prediction" if family == "sd2" else "epsilon"
    scheduler = cls(**BETAS, **options, prediction_type=target)
    none = {name: None for name in OTHERS if name in signature(kind).parameters}
    pipe = kind(**components(shelf / family), scheduler=scheduler, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int = 1, seed: int = 5) -> Tensor:
    return keyed(range(seed, seed + count), (4, SIDE // 8, SIDE // 8))(START)


def picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def hole(side: int = SIDE) -> Image.Image:
    pixels = np.zeros((side, side), dtype=np.uint8)
    pixels[side // 4 : side // 2, side // 8 :] = 255
    return Image.fromarray(pixels)


def drawn(pipe: Pipeline, sampler: str, inputs: Any = None, **options: Any) -> Tensor:
    options = {"guidance_scale": GUIDANCE, "num_steps": STEPS, **options}
    if inputs is None:
        options |= {"width": SIDE, "height": SIDE}
    spacing = SCHEDULERS[sampler][2]
    walk = pipe.stream(
        PROMPT, NEGATIVE, seed=5, sampler=sampler, spacing=spacing, inputs=inputs, **options
    )
    return list(walk)[-1].x


CALL = {
    "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS,
    "guidance_scale": GUIDANCE, "output_type": "latent",
}  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_drawing_from_words(shelf: Path, sampler: str, family: str) -> None:
    if (family, sampler) == ("sd2", "plms"):
        pytest.skip("diffusers averages v, whose meaning changes from step to step; we average eps")
    found = drawn(ours(shelf, family), sampler)
    peer = theirs(shelf, diffusers.StableDiffusionPipeline, sampler, family)
    wanted = peer(**CALL, width=SIDE, height=SIDE, latents=noise()).images
    assert wanted.std() > 0.3
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_are_those_of_diffusers(shelf: Path, sampler: str) -> None:
    """Noise of unit variance, which the sampler scales, whatever its dtype."""
    pipe, z = ours(shelf), noise(2, seed=77)
    peer = theirs(shelf, diffusers.StableDiffusionPipeline, sampler)
    wanted = peer(**CALL, num_images_per_prompt=2, width=SIDE, height=SIDE, latents=z).images
    found = drawn(pipe, sampler, latents=z.double(), num_images=2)
    assert (found - wanted).abs().max() < 1e-4
    assert torch.equal(found, drawn(pipe, sampler, latents=z, num_images=2))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_drawing_from_a_picture(shelf: Path, sampler: str) -> None:
    """PLMS in diffusers takes its first two steps for one where the ladder begins later."""
    pipe = ours(shelf)
    inputs = pipe.prepare(init_image=picture())
    assert inputs.init is not None
    peer = theirs(shelf, diffusers.StableDiffusionImg2ImgPipeline, sampler)
    for strength in (0.75, 1.0):
        found = drawn(pipe, sampler, inputs, strength=strength)
        with replaced_noise(noise()):
            wanted = peer(**CALL, image=inputs.init, strength=strength).images
        assert (found - wanted).abs().max() < 1e-4


def test_drawing_from_a_picture_with_plms(shelf: Path) -> None:
    """diffusers' scheduler, fed the times that a walk of PLMS has: the second one twice."""
    pipe = ours(shelf)
    inputs = pipe.prepare(init_image=picture())
    assert inputs.init is not None
    found = drawn(pipe, "plms", inputs, strength=0.75)
    peer = theirs(shelf, diffusers.StableDiffusionImg2ImgPipeline, "plms")
    tokens, against = pipe.text.encode_pair(PROMPT, NEGATIVE)
    scheduler = peer.scheduler
    scheduler.set_timesteps(STEPS)
    times = [t for k, t in enumerate(scheduler.timesteps.tolist()) if k != 1][5:]
    x = scheduler.add_noise(inputs.init, noise(), torch.tensor(times[:1]))
    for t in [times[0], times[1], *times[1:]]:
        both = torch.cat([against.tokens, tokens.tokens])
        with torch.no_grad():
            out = peer.unet(torch.cat([x, x]), t, both).sample
        nothing, words = out.chunk(2)
        x = scheduler.step(nothing + GUIDANCE * (words - nothing), t, x).prev_sample
    assert (found - x).abs().max() < 1e-4


class replaced_noise:  # noqa: N801
    """diffusers draws the noise that lies on a picture by itself; here it draws ours."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        for module in ("img2img", "inpaint", "depth2img"):
            place = f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{module}"
            self.patch.setattr(f"{place}.randn_tensor", lambda *_, **__: self.noise.clone())

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_painting_with_a_model_not_made_for_it(
    shelf: Path, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampler == "plms" and strength < 1:
        pytest.skip("see test_drawing_from_a_picture")
    pipe = ours(shelf)
    inputs = pipe.prepare(init_image=picture(), mask=hole())
    found = drawn(pipe, sampler, inputs, strength=strength)
    peer = theirs(shelf, diffusers.StableDiffusionInpaintPipeline, sampler)
    factor = peer.vae.config.scaling_factor
    monkeypatch.setattr(peer.vae, "encode", lambda image: Encoded(inputs.init / factor))
    with replaced_noise(noise()):
        wanted = peer(
            **CALL, image=picture(), mask_image=hole(), strength=strength, width=SIDE, height=SIDE
        ).images
    assert (found - wanted).abs().max() < 1e-4
    assert torch.equal((found - inputs.init).abs().amax(1) == 0, inputs.hole[:, 0] == 0)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_to_paint_with_are_those_of_diffusers(
    shelf: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full strength. Below it diffusers starts from the noise alone, we lay it on the picture,
    as both do with noise of their own."""
    pipe, z = ours(shelf), noise(seed=77)
    inputs = pipe.prepare(init_image=picture(), mask=hole())
    found = drawn(pipe, sampler, inputs, latents=z)
    peer = theirs(shelf, diffusers.StableDiffusionInpaintPipeline, sampler)
    factor = peer.vae.config.scaling_factor
    monkeypatch.setattr(peer.vae, "encode", lambda image: Encoded(inputs.init / factor))
    wanted = peer(
        **CALL, image=picture(), mask_image=hole(), strength=1.0, width=SIDE, height=SIDE, latents=z
    ).images
    assert (found - wanted).abs().max() < 1e-4
    own = drawn(pipe, sampler, inputs, strength=0.6)
    assert torch.equal(drawn(pipe, sampler, inputs, strength=0.6, latents=noise()), own)


class Encoded:
    """What an autoencoder of diffusers answers; its own sample would be of a posterior."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_painting_with_a_model_made_for_it(
    shelf: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ours(shelf, "sd1-inpaint")
    inputs = pipe.prepare(init_image=picture(), mask=hole())
    assert inputs.hole is None and inputs.concat is not None
    assert inputs.concat.shape == (1, 5, SIDE // 8, SIDE // 8)
    found = drawn(pipe, sampler, inputs)
    peer = theirs(shelf, diffusers.StableDiffusionInpaintPipeline, sampler, "sd1-inpaint")
    factor = peer.vae.config.scaling_factor
    monkeypatch.setattr(
        peer.vae, "encode", lambda image: Encoded(pipe.autoencoder.encode(image) / factor)
    )
    wanted = peer(
        **CALL, image=picture(), mask_image=hole(), width=SIDE, height=SIDE, latents=noise()
    ).images
    assert (found - wanted).abs().max() < 1e-4


def test_drawing_after_a_depth_map(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ours(shelf, "sd2-depth")
    depth = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE))
    inputs = pipe.prepare(init_image=picture(), depth=depth)
    found = drawn(pipe, "ddim", inputs, strength=0.8)
    deep = theirs(shelf, diffusers.StableDiffusionDepth2ImgPipeline, "ddim", "sd2-depth")
    plane = torch.from_numpy(np.asarray(depth).astype(np.float32))[None]
    factor = deep.vae.config.scaling_factor
    monkeypatch.setattr(deep.vae, "encode", lambda image: Encoded(inputs.init / factor))
    with replaced_noise(noise()):
        wanted = deep(**CALL, image=picture(), depth_map=plane, strength=0.8).images
    assert (found - wanted).abs().max() < 1e-4
