"""Whole pictures of tiny Stable Diffusion models, beside diffusers with the same weights."""

from dataclasses import replace
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
from faults import FAULT, faulty
from PIL import Image
from rounding import assert_parity, in_float64
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
SHORT = torch.float32
OTHERS = ("safety_checker", "feature_extractor", "depth_estimator")
SIDE, GUIDANCE = 64, 7.5
STEPS = {"ddim": 20, "plms": 20, "euler": 28, "dpmpp_2m": 20}
"""Between two training times diffusers interpolates sigma, we its logarithm: 28 are whole ones."""
FEW = {"ddim": 5, "plms": 5, "euler": 4, "dpmpp_2m": 5}
"""Where the start is what is compared, or the network's input, and not the way."""
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
def loaded(file: Path, dtype: torch.dtype) -> Pipeline:
    return minidiffusion.load(file, dtype=dtype)


def ours(shelf: Path, family: str = "sd1") -> Pipeline:
    return loaded(shelf / f"{family}.safetensors", torch.get_default_dtype())


@cache
def components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """diffusers reads its files in float32 alone; a run in float32 comes first."""
    if dtype == torch.float64:
        return {name: in_float64(part) for name, part in components(folder, SHORT).items()}
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
    parts = components(shelf / family, torch.get_default_dtype())
    pipe = kind(**parts, scheduler=scheduler, **none)
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
    options = {"guidance_scale": GUIDANCE, "num_steps": STEPS[sampler], **options}
    if inputs is None:
        options |= {"width": SIDE, "height": SIDE}
    spacing = SCHEDULERS[sampler][2]
    walk = pipe.stream(
        PROMPT, NEGATIVE, seed=5, sampler=sampler, spacing=spacing, inputs=inputs, **options
    )
    return list(walk)[-1].x


def call(sampler: str, **options: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS[sampler],
        "guidance_scale": GUIDANCE, "output_type": "latent", **options,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_drawing_from_words(shelf: Path, sampler: str, family: str) -> None:
    if (family, sampler) == ("sd2", "plms"):
        pytest.skip("diffusers averages v, whose meaning changes from step to step; we average eps")

    def run_theirs() -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionPipeline, sampler, family)
        return peer(**call(sampler, width=SIDE, height=SIDE, latents=noise())).images

    found = assert_parity(lambda: drawn(ours(shelf, family), sampler), run_theirs)
    assert found.std() > 0.3


@pytest.mark.parametrize("fault", ["guidance", "network"])
def test_a_fault_of_one_part_in_10000_is_found(shelf: Path, fault: str) -> None:
    def run_ours() -> Tensor:
        pipe, scale = ours(shelf), GUIDANCE
        if fault == "guidance":
            scale *= FAULT
        else:
            _, network = next(faulty(pipe.network))
            pipe = replace(pipe, network=network)
        return drawn(pipe, "ddim", num_steps=4, guidance_scale=scale)

    def run_theirs() -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionPipeline, "ddim")
        size = {"width": SIDE, "height": SIDE, "latents": noise()}
        return peer(**call("ddim", **size, num_inference_steps=4)).images

    with pytest.raises(AssertionError, match=r"rms .* allowed"):
        assert_parity(run_ours, run_theirs)
    assert_parity(lambda: drawn(ours(shelf), "ddim", num_steps=4), run_theirs)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_are_those_of_diffusers(shelf: Path, sampler: str) -> None:
    """Noise of unit variance, which the sampler scales, whatever its dtype."""

    def run_theirs(z: Tensor) -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionPipeline, sampler)
        size = {"width": SIDE, "height": SIDE, "num_images_per_prompt": 2}
        few = {"num_inference_steps": FEW[sampler]}
        return peer(**call(sampler, **size, latents=z) | few).images

    z, how = noise(2, seed=77), {"num_images": 2, "num_steps": FEW[sampler]}
    found = assert_parity(lambda z: drawn(ours(shelf), sampler, latents=z, **how), run_theirs, z)
    assert torch.equal(found, drawn(ours(shelf), sampler, latents=z.double(), **how))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_drawing_from_a_picture(shelf: Path, sampler: str) -> None:
    """PLMS in diffusers takes its first two steps for one where the ladder begins later."""

    def run_ours(strength: float) -> Tensor:
        pipe = ours(shelf)
        inputs = pipe.prepare(init_image=picture())
        return drawn(pipe, sampler, inputs, strength=strength)

    def run_theirs(strength: float) -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionImg2ImgPipeline, sampler)
        init = ours(shelf).prepare(init_image=picture()).init
        with replaced_noise(noise()):
            return peer(**call(sampler, image=init, strength=strength)).images

    for strength in (0.75, 1.0):
        assert_parity(run_ours, run_theirs, strength)


def test_drawing_from_a_picture_with_plms(shelf: Path) -> None:
    """diffusers' scheduler, fed the times that a walk of PLMS has: the second one twice."""

    def run_ours() -> Tensor:
        pipe = ours(shelf)
        return drawn(pipe, "plms", pipe.prepare(init_image=picture()), strength=0.75)

    def run_theirs() -> Tensor:
        pipe, peer = ours(shelf), theirs(shelf, diffusers.StableDiffusionImg2ImgPipeline, "plms")
        tokens, against = pipe.text.encode_pair(PROMPT, NEGATIVE)
        scheduler = peer.scheduler
        scheduler.set_timesteps(STEPS["plms"])
        times = [t for k, t in enumerate(scheduler.timesteps.tolist()) if k != 1][5:]
        init = pipe.prepare(init_image=picture()).init
        x = scheduler.add_noise(init, noise(), torch.tensor(times[:1]))
        for t in [times[0], times[1], *times[1:]]:
            both = torch.cat([against.tokens, tokens.tokens])
            out = peer.unet(torch.cat([x, x]), t, both).sample
            nothing, words = out.chunk(2)
            x = scheduler.step(nothing + GUIDANCE * (words - nothing), t, x).prev_sample
        return x

    assert_parity(run_ours, run_theirs)


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

    def prepared() -> Any:
        return ours(shelf).prepare(init_image=picture(), mask=hole())

    def run_theirs() -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionInpaintPipeline, sampler)
        latents = prepared().init / peer.vae.config.scaling_factor
        monkeypatch.setattr(peer.vae, "encode", lambda image: Encoded(latents))
        painting = {"image": picture(), "mask_image": hole(), "width": SIDE, "height": SIDE}
        with replaced_noise(noise()):
            return peer(**call(sampler, strength=strength, **painting)).images

    found = assert_parity(
        lambda: drawn(ours(shelf), sampler, prepared(), strength=strength), run_theirs
    )
    inputs = prepared()
    assert torch.equal((found - inputs.init).abs().amax(1) == 0, inputs.hole[:, 0] == 0)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_to_paint_with_are_those_of_diffusers(
    shelf: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full strength. Below it diffusers starts from the noise alone, we lay it on the picture,
    as both do with noise of their own."""

    def prepared() -> Any:
        return ours(shelf).prepare(init_image=picture(), mask=hole())

    def run_theirs(z: Tensor) -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionInpaintPipeline, sampler)
        latents = prepared().init / peer.vae.config.scaling_factor
        monkeypatch.setattr(peer.vae, "encode", lambda image: Encoded(latents))
        painting = {"image": picture(), "mask_image": hole(), "width": SIDE, "height": SIDE}
        few = {"num_inference_steps": FEW[sampler]}
        return peer(**call(sampler, **painting, strength=1.0, latents=z) | few).images

    how = {"num_steps": FEW[sampler]}
    assert_parity(
        lambda z: drawn(ours(shelf), sampler, prepared(), latents=z, **how),
        run_theirs,
        noise(seed=77),
    )
    pipe, inputs = ours(shelf), prepared()
    own = drawn(pipe, sampler, inputs, strength=0.6, **how)
    assert torch.equal(drawn(pipe, sampler, inputs, strength=0.6, latents=noise(), **how), own)


class Encoded:
    """What an autoencoder of diffusers answers; its own sample would be of a posterior."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_painting_with_a_model_made_for_it(
    shelf: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def run_ours() -> Tensor:
        pipe = ours(shelf, "sd1-inpaint")
        inputs = pipe.prepare(init_image=picture(), mask=hole())
        assert inputs.hole is None and inputs.concat is not None
        assert inputs.concat.shape == (1, 5, SIDE // 8, SIDE // 8)
        return drawn(pipe, sampler, inputs, num_steps=FEW[sampler])

    def run_theirs() -> Tensor:
        encode = ours(shelf, "sd1-inpaint").autoencoder.encode
        peer = theirs(shelf, diffusers.StableDiffusionInpaintPipeline, sampler, "sd1-inpaint")
        factor = peer.vae.config.scaling_factor
        monkeypatch.setattr(peer.vae, "encode", lambda image: Encoded(encode(image) / factor))
        painting = {"image": picture(), "mask_image": hole(), "width": SIDE, "height": SIDE}
        few = {"num_inference_steps": FEW[sampler]}
        return peer(**call(sampler, latents=noise(), **painting) | few).images

    assert_parity(run_ours, run_theirs)


def test_drawing_after_a_depth_map(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depths = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)
    depths[-1, -1] = SIDE * SIDE  # divided by this power of two they are exact in float32
    depth = Image.fromarray(depths)

    def prepared() -> Any:
        return ours(shelf, "sd2-depth").prepare(init_image=picture(), depth=depth)

    def run_theirs() -> Tensor:
        peer = theirs(shelf, diffusers.StableDiffusionDepth2ImgPipeline, "ddim", "sd2-depth")
        plane = torch.from_numpy(np.asarray(depth).astype(np.float32))[None]
        latents = prepared().init / peer.vae.config.scaling_factor
        monkeypatch.setattr(peer.vae, "encode", lambda image: Encoded(latents))
        with replaced_noise(noise()):
            return peer(**call("ddim", image=picture(), depth_map=plane, strength=0.8)).images

    assert_parity(
        lambda: drawn(ours(shelf, "sd2-depth"), "ddim", prepared(), strength=0.8), run_theirs
    )
