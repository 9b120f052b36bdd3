"""Whole pictures of tiny Stable Diffusion 3 models, beside diffusers with the same weights."""

import math
import shutil
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import official
import pytest
import torch
from PIL import Image
from rounding import assert_near, assert_parity, in_float64
from torch import Tensor

import minidiffusion
from minidiffusion.checkpoints.official import Stored
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.diffusion.noise import START, keyed
from minidiffusion.pipelines.inputs import Given, whole_patches
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.text.triple import TripleText

FAMILIES = ("sd3", "sd3.5-medium", "sd3.5-large")
STEPS, GUIDANCE = 20, 5.0
WIDTH, HEIGHT = 96, 64
PROMPT, NEGATIVE = "a photo of a red panda, reading", "blurry"
SHORT = torch.float32
FLOW = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flow")
    for family in FAMILIES:
        official.make(root / f"{family}.safetensors", family)
        official.make(root / family, family, dialect="diffusers")
    official.make(root / "alone.safetensors", "sd3.5-large", alone=True)
    official.make(root / "encoders", "sd3.5-large", dialect="parts")
    return root


@cache
def loaded(file: Path, dtype: torch.dtype) -> Pipeline:
    return minidiffusion.load(file, dtype=dtype)


def ours(shelf: Path, family: str = "sd3.5-medium") -> Pipeline:
    return loaded(shelf / f"{family}.safetensors", torch.get_default_dtype())


@cache
def components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """diffusers reads its files in float32 alone; a run in float32 comes first."""
    if dtype == torch.float64:
        return {name: in_float64(part) for name, part in components(folder, SHORT).items()}
    return {
        "transformer": diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
    }


def theirs(shelf: Path, family: str = "sd3.5-medium", kind: str = "") -> Any:
    """Without text encoders: it is given our embeddings (see tests/text for theirs)."""
    folder = shelf / family
    pipe = getattr(diffusers, f"StableDiffusion3{kind}Pipeline")(
        **components(folder, torch.get_default_dtype()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        **dict.fromkeys(
            ("text_encoder", "text_encoder_2", "text_encoder_3",
             "tokenizer", "tokenizer_2", "tokenizer_3")
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> Tensor:
    return keyed([5], (16, HEIGHT // 8, WIDTH // 8))(START)


def words(pipe: Pipeline) -> dict[str, Tensor | None]:
    assert pipe.text is not None
    cond, against = pipe.text.encode_pair(PROMPT, NEGATIVE)
    return {
        "prompt_embeds": cond.tokens, "pooled_prompt_embeds": cond.pooled,
        "negative_prompt_embeds": against.tokens, "negative_pooled_prompt_embeds": against.pooled,
        "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent",
    }  # fmt: skip


def drawn(pipe: Pipeline, inputs: Any = None, **options: Any) -> Tensor:
    options = {"guidance_scale": GUIDANCE, "num_steps": STEPS, "sampler": "euler", **options}
    if inputs is None:
        options |= {"width": WIDTH, "height": HEIGHT}
    return list(pipe.stream(PROMPT, NEGATIVE, seed=5, inputs=inputs, **options))[-1].x


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def hole() -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[HEIGHT // 4 : HEIGHT // 2, WIDTH // 8 :] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawing_from_words(shelf: Path, family: str) -> None:
    def run_theirs(z: Tensor) -> Tensor:
        call = {**words(ours(shelf, family)), "width": WIDTH, "height": HEIGHT}
        return theirs(shelf, family)(**call, latents=z).images

    def run_ours(z: Tensor) -> Tensor:
        return drawn(ours(shelf, family), latents=z)

    z = noise()
    assert assert_parity(lambda _: drawn(ours(shelf, family)), run_theirs, z).std() > 0.3
    assert_parity(run_ours, run_theirs, z.flip(1))


def test_guidance_by_skipped_layers(shelf: Path) -> None:

    def run_theirs() -> Tensor:
        call = {**words(ours(shelf)), "width": WIDTH, "height": HEIGHT, "latents": noise()}
        skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 2.8}
        return theirs(shelf)(**call, **skipping).images

    found = assert_parity(lambda: drawn(ours(shelf), slg=2.8, slg_layers=(0,)), run_theirs)
    assert (found - drawn(ours(shelf))).abs().max() > 0.01


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.33])
def test_drawing_from_a_picture(
    shelf: Path, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{FLOW}_img2img.randn_tensor", lambda *_, **__: noise())

    def run_ours() -> Tensor:
        pipe = ours(shelf)
        return drawn(pipe, pipe.prepare(init_image=picture()), strength=strength)

    def run_theirs() -> Tensor:
        pipe = ours(shelf)
        call = {**words(pipe), "width": WIDTH, "height": HEIGHT, "strength": strength}
        init = pipe.prepare(init_image=picture()).init
        return theirs(shelf, kind="Img2Img")(**call, image=init).images

    assert_parity(run_ours, run_theirs)


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.33])
def test_painting(shelf: Path, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{FLOW}_inpaint.randn_tensor", lambda *_, **__: noise())

    def prepared() -> Any:
        return ours(shelf).prepare(init_image=picture(), mask=hole())

    def run_theirs() -> Tensor:
        peer, init = theirs(shelf, kind="Inpaint"), prepared().init
        monkeypatch.setattr(peer, "_encode_vae_image", lambda **_: init)
        return peer(
            **words(ours(shelf)), image=picture(), mask_image=hole(), strength=strength,
            width=WIDTH, height=HEIGHT,
        ).images  # fmt: skip

    found = assert_parity(lambda: drawn(ours(shelf), prepared(), strength=strength), run_theirs)
    inputs = prepared()
    assert torch.equal((found - inputs.init).abs().amax(1) == 0, inputs.hole[:, 0] == 0)


def test_the_multistep_sampler_has_the_clock_of_stabilitys_code(shelf: Path) -> None:
    """k-diffusion's DPM++ 2M as their code runs it: t = -log(sigma), on the flow's own sigmas."""
    pipe = ours(shelf)
    steps = list(pipe.stream(
        PROMPT, NEGATIVE, seed=5, sampler="dpmpp_2m", num_steps=STEPS,
        guidance_scale=GUIDANCE, width=WIDTH, height=HEIGHT,
    ))  # fmt: skip
    sigmas = [float(level.sigma) for level in pipe.row.path.ladder(STEPS, "linspace")]
    x, before = noise(), None
    for k, step in enumerate(steps):
        here, there, x0 = sigmas[k], sigmas[k + 1], step.x0
        ahead = x0
        if before is not None and there > 0:
            last = math.log(sigmas[k - 1] / here)
            h = math.log(here / there)
            ahead = (1 + h / last / 2) * x0 - h / last / 2 * before
        x = there / here * x + (1 - there / here) * ahead
        assert_near(step.x, x, 16)
        x, before = step.x, x0


def test_the_ladder_and_its_shift(shelf: Path) -> None:
    pipe = ours(shelf)
    options: dict[str, Any] = {"num_steps": 6, "width": WIDTH, "height": HEIGHT}
    found = [float(s.level.sigma) for s in pipe.stream(PROMPT, **options)]
    published = [0.92334, 0.81892, 0.66833, 0.43223, 0.0089286, 0]
    assert_near(found, published, 0.5, scale=1, eps=1e-5)  # of 5 decimals
    plain = [float(s.level.sigma) for s in pipe.stream(PROMPT, shift=1.0, **options)]
    assert_near(plain, [*np.linspace(1, 0.001, 6)[1:].tolist(), 0], 4)
    sized = [float(s.level.sigma) for s in pipe.stream(PROMPT, dynamic_shift=True, **options)]
    assert sized[0] < found[0]  # smaller pictures than 32 x 32 latents want less


@pytest.mark.parametrize("t5", [True, False])
def test_encoders_of_their_own(shelf: Path, t5: bool) -> None:
    """A file without encoders, and a folder of them, draw what the file with all does."""
    place = shelf / "encoders"
    one = minidiffusion.load(
        shelf / "alone.safetensors", text_encoders=place, t5=t5, dtype=torch.float32
    )
    two = minidiffusion.load(shelf / "sd3.5-large.safetensors", t5=t5, dtype=torch.float32)
    three = minidiffusion.load(
        shelf / "sd3.5-large.safetensors", t5=t5, dtype=torch.float32, offload=True
    )
    found = [drawn(pipe, num_steps=2) for pipe in (one, two, three)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], drawn(ours(shelf, "sd3.5-large"), num_steps=2)) == t5


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"freeze_ladder": True}], ids=str)
def test_parts_take_turns_in_memory(
    shelf: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor a part lies in its file while it does not work: T5 first, then freed."""
    file = shelf / "sd3.5-medium.safetensors"
    pipe = minidiffusion.load(file, dtype=torch.float32, offload=True, **options)
    assert isinstance(pipe.text, TripleText)
    parts = {**pipe.text.encoders, "denoiser": pipe.network}
    names, read, order = {part: name for name, part in parts.items()}, Stored.read, []

    def there() -> list[str]:
        return [name for part, name in names.items() if not next(part.parameters()).is_meta]

    def counted(stored: Stored) -> dict[str, torch.Tensor]:
        assert there() == []
        order.extend(names[part] for part, one in pipe.shelf.items() if one is stored)
        return read(stored)

    monkeypatch.setattr(Stored, "read", counted)
    usual = minidiffusion.load(file, dtype=torch.float32, **options)
    order.clear()
    for _ in range(2):
        assert torch.equal(drawn(pipe, num_steps=2), drawn(usual, num_steps=2))
        assert there() == []
    assert order == ["t5", "clip_g", "clip_l", "denoiser", "denoiser"]


@pytest.mark.parametrize("offload", [False, True])
def test_a_frozen_ladder(shelf: Path, offload: bool) -> None:
    """A third of the weights stay in the file; the picture is the same to the bit."""
    pipe = minidiffusion.load(
        shelf / "sd3.5-medium.safetensors", dtype=torch.float32, freeze_ladder=True, offload=offload
    )
    empty = [name for name, p in pipe.network.named_parameters() if p.is_meta]
    assert empty and all("modulation" in name for name in empty) != offload
    whole = ours(shelf)
    assert torch.equal(drawn(pipe, num_steps=3), drawn(whole, num_steps=3))
    for options in ({"guidance_scale": 1.0}, {"sampler": "heun"}, {"shift": 1.5, "num_steps": 2}):
        assert torch.equal(drawn(pipe, **{"num_steps": 3, **options}),
                           drawn(whole, **{"num_steps": 3, **options}))  # fmt: skip
    inputs = [one.prepare(init_image=picture()) for one in (pipe, whole)]
    near = [drawn(one, given, num_steps=5, strength=0.4, slg=2.0, slg_layers=(1,))
            for one, given in zip((pipe, whole), inputs, strict=True)]  # fmt: skip
    assert_near(near[0], near[1], 64)  # 2 steps whose sums may have another order
    two = {"num_steps": 2, "width": 64, "height": 64}
    for one, other in zip(
        pipe.generate(["a cat", "a dog"], batch_size=1, **two),
        whole.generate(["a cat", "a dog"], batch_size=1, **two), strict=True,
    ):  # fmt: skip
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    "options",
    [{"offload": True}, {"freeze_ladder": True}, {"freeze_ladder": True, "offload": True}], ids=str,
)  # fmt: skip
def test_stored_weights_draw_the_same_however_they_are_held(
    shelf: Path, options: dict[str, Any], slow: None
) -> None:
    """Where 16 bits are slow: read for each prompt or worked off before, they are rounded."""
    file = shelf / "sd3.5-medium.safetensors"
    pipes = [minidiffusion.load(file, "cpu", dtype=torch.bfloat16, **o) for o in ({}, options)]
    found, wanted = (drawn(pipe, num_steps=2) for pipe in pipes)
    assert found.std() > 0.1 and torch.equal(found, wanted)
    assert torch.equal(drawn(pipes[1], num_steps=2), wanted)  # once more, with weights read again


@pytest.mark.parametrize("how", ["fp8", "int8-dynamic"])
def test_a_byte_a_weight_is_put_together_in_float32(
    shelf: Path, how: Any, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidiffusion.layers.quantized.NARROW", 32)
    monkeypatch.setattr(torch, "_int_mm", None)  # nothing may multiply so
    file = shelf / "sd3.5-medium.safetensors"
    pipe, near = (
        minidiffusion.load(file, "cpu", dtype=dtype, quantize=how)
        for dtype in (torch.bfloat16, torch.float32)
    )
    kinds = {x.dtype for x in pipe.network.state_dict().values()}
    assert kinds == {torch.float8_e4m3fn if how == "fp8" else torch.int8, torch.bfloat16,
                     torch.float32}  # fmt: skip
    found, wanted = (drawn(one, num_steps=2) for one in (pipe, near))
    assert 0 < (found - wanted).std() < 0.1 * wanted.std()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "alone.safetensors: holds no CLIP text encoders; Stable Diffusion 3 wants L and"),
    "one": ({"text_encoders": "encoders/clip_l.safetensors"}, "holds 1 CLIP text encoders"),
    "the old option": ({"text_encoder": "encoders"}, "three: --text-encoders FOLDER"),
    "no T5": ({"text_encoders": "clips"}, "holds no T5: name the encoders' folder"),
    "narrow": ({"text_encoders": "narrow"}, "the denoiser wants a pooled text of 96 numbers"),
    "not bigG": ({"text_encoders": "bare"}, "holds no projection (text_projection): not bigG"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_encoders_that_do_not_serve(
    shelf: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for name, second in (("clips", "clip_g"), ("narrow", "clip_l")):
        (tmp_path / name).mkdir()
        for file, source in (("clip_l", "clip_l"), ("clip_g", second), ("t5", "t5xxl_fp16")):
            if (name, file) != ("clips", "t5"):
                data = (shelf / "encoders" / f"{source}.safetensors").read_bytes()
                (tmp_path / name / f"{file}.safetensors").write_bytes(data)
    shutil.copytree(shelf / "encoders", tmp_path / "bare")
    large = read_safetensors(tmp_path / "bare" / "clip_g.safetensors")
    bare = {name: tensor.clone() for name, tensor in large.items() if "projection" not in name}
    write_safetensors(bare, tmp_path / "bare" / "clip_g.safetensors")
    there = {key: shelf / name if (shelf / name).exists() else tmp_path / name
             for key, name in options.items()}  # fmt: skip
    with pytest.raises(ValueError) as caught:
        minidiffusion.load(shelf / "alone.safetensors", **there)
    assert message in str(caught.value) and "\n" not in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"width": 72}, "width: must be a multiple of 16 in 16..256, got 72"),
    "large": ({"height": 272}, "height: must be a multiple of 16 in 16..256, got 272"),
    "layers": ({"slg": 2.5}, "slg_layers: 7, 8, 9: this network has the layers 0..1"),
    "slg": ({"slg": -1.0, "slg_layers": (0,)}, "slg: must be 0 or more, got -1.0"),
    "shift": ({"shift": 0.0}, "shift: must be above 0"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_a_mistake_gets_one_line(shelf: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ours(shelf).generate("a cat", num_steps=2, **{"width": 64, "height": 64, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "drawn"), [((400, 300), (256, 192)), ((256, 257), (256, 256)), ((12, 300), (16, 256))]
)
def test_a_picture_beyond_what_the_network_knows_is_made_smaller(
    shelf: Path, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    """In its proportions; asked for by number, such a size stays a mistake."""
    given = Given(init_image=Image.new("RGB", size))
    made = whole_patches(given, ours(shelf).row, 8)
    assert (made.width, made.height) == drawn


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("network.leave.bias", "network.leave.bias: numbers that are not finite at step 1 of 3"),
        ("text.t5.norm.weight", "text_encoder.t5.norm.weight: numbers that are not finite"),
        (
            "autoencoder.decoder.leave.bias",
            "autoencoder.decoder.leave.bias: numbers that are not finite",
        ),
    ],
)
def test_damaged_weights_are_told_by_the_part_that_has_them(
    shelf: Path, part: str, message: str
) -> None:
    pipe = minidiffusion.load(
        shelf / "alone.safetensors", dtype=torch.float32, text_encoders=shelf / "encoders"
    )
    weight = attrgetter(part)(pipe)
    weight.copy_(torch.full_like(weight, math.nan))
    steps = []
    with pytest.raises(ValueError) as caught:
        for step in pipe.stream("a cat", width=64, height=64, num_steps=3):
            steps.append(step)
        pipe.pictures(steps[-1].x)
    assert message in str(caught.value) and len(steps) in (0, 3)


def test_options_of_flows_are_refused_elsewhere(tmp_path: Path) -> None:
    pipe = minidiffusion.load(official.make(tmp_path / "sd1", "sd1"), dtype=torch.float32)
    size = {"width": 64, "height": 64, "num_steps": 1}
    for options, message in (
        ({"slg": 2.5}, "slg: only for Stable Diffusion 3"),
        ({"cfg_zero": True}, "cfg_zero: only for rectified flows"),
        ({"shift": 3.0}, "shift: only for rectified flows"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.generate("a cat", **size, **options)
    for key, value in (("t5", False), ("freeze_ladder", True), ("text_encoders", tmp_path)):
        with pytest.raises(ValueError, match="only for Stable Diffusion 3"):
            minidiffusion.load(tmp_path / "sd1", **{key: value})
