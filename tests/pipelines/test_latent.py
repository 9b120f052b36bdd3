"""What a pipeline of latents promises beyond its numbers: seeds, sizes, masks, memory, mistakes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import official
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import minidiffusion
from minidiffusion import device as devices
from minidiffusion.layers.storage import StoredLinear
from minidiffusion.models import Autoencoder
from minidiffusion.pipelines.load import pipeline
from minidiffusion.pipelines.memory import TILE, at_work
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.text import Text

QUICK: dict[str, Any] = {"num_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.make(tmp_path_factory.mktemp("latent") / "sd1.safetensors", "sd1")


@pytest.fixture(scope="module")
def pipe(file: Path) -> Pipeline:
    return minidiffusion.load(file, dtype=torch.float32)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = official.make(tmp_path_factory.mktemp("painter") / "model.ckpt", "sd1-inpaint")
    return minidiffusion.load(path, dtype=torch.float32)


def photo(width: int = 72, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hole(width: int = 72, height: int = 64) -> Image.Image:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[16:40, 24:56] = 255
    return Image.fromarray(pixels)


def bytes_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe: Pipeline) -> None:
    prompts = ["a cat", "a dog in the rain"]
    together = pipe.generate(prompts, num_images=2, seed=7, **QUICK)
    assert len(together) == 4 and len({picture.tobytes() for picture in together}) == 4
    in_twos = pipe.generate(prompts, num_images=2, seed=7, batch_size=2, **QUICK)
    for i, (one, two) in enumerate(zip(together, in_twos, strict=True)):
        alone = pipe.generate(prompts[i // 2], seed=7 + i, **QUICK)[0]
        assert abs(bytes_of(one) - bytes_of(two)).max() <= 1
        assert abs(bytes_of(one) - bytes_of(alone)).max() <= 1


def test_words_matter_and_so_does_what_to_avoid(pipe: Pipeline) -> None:
    kinds = [
        pipe.generate("a cat", **QUICK), pipe.generate("a dog", **QUICK),
        pipe.generate("a cat", "a dog", **QUICK),
        pipe.generate("a cat", guidance_scale=1.0, **QUICK),
        pipe.generate("a cat", "a dog", guidance_scale=1.0, **QUICK),
        pipe.generate(**QUICK),
    ]  # fmt: skip
    found = [made[0].tobytes() for made in kinds]
    assert found[3] == found[4]  # one pass at guidance 1: there is nothing to avoid
    assert len(set(found)) == 5


def test_the_three_parts_by_hand_are_generate(pipe: Pipeline) -> None:
    cond = pipe.condition("a cat")
    assert cond.tokens is not None and cond.tokens.shape == (1, 77, 64)
    x = pipe.sample(cond, num_steps=2, guidance_scale=7.5, seed=3, size=(8, 8))
    assert x.shape == (1, 4, 8, 8)
    image = pipe.decode(x)
    assert image.shape == (1, 3, 64, 64)
    made = pipe.generate("a cat", seed=3, guidance_scale=7.5, **QUICK)
    assert pipe.pictures(x)[0].tobytes() == made[0].tobytes()
    steps = list(pipe.stream("a cat", seed=3, guidance_scale=7.5, **QUICK))
    assert torch.equal(steps[-1].x, x) and steps[0].x0.shape == x.shape


@pytest.mark.parametrize("size", [(8, 8), (40, 64), (72, 56), (136, 8)])
def test_any_multiple_of_eight(pipe: Pipeline, size: tuple[int, int]) -> None:
    made = pipe.generate("a cat", num_steps=1, width=size[0], height=size[1])
    assert made[0].size == size


def test_a_picture_brings_its_size(pipe: Pipeline) -> None:
    assert pipe.img2img(photo(71, 65), "a cat", num_steps=2)[0].size == (64, 64)
    inputs = pipe.prepare(init_image=photo(1600, 1200))
    assert inputs.latent_size == (880 // 8, 1176 // 8)  # a megapixel, in multiples of 8
    wide = pipe.img2img(photo(), "a cat", num_steps=2, width=40, height=48, fit="pad")[0]
    assert wide.size == (40, 48)


def test_strength(pipe: Pipeline) -> None:
    """0 gives what the autoencoder makes of the picture; more strength goes further away."""
    inputs = pipe.prepare(init_image=photo())
    assert inputs.init is not None
    back = pipe.pictures(inputs.init)[0]
    found = [pipe.img2img(photo(), "a cat", strength=s, num_steps=8)[0] for s in (0.0, 0.25, 1.0)]
    assert found[0].tobytes() == back.tobytes()
    near, far = (abs(bytes_of(one) - bytes_of(back)).mean() for one in found[1:])
    assert 0 < near < far


@pytest.mark.parametrize("made_for_it", [False, True])
def test_what_is_not_painted_over_stays_to_the_pixel(
    pipe: Pipeline, painter: Pipeline, made_for_it: bool
) -> None:
    one = painter if made_for_it else pipe
    for strength in (1.0, 0.5):
        found = one.inpaint(photo(), hole(), "a cat", num_steps=3, strength=strength)[0]
        same = (bytes_of(found) == bytes_of(photo())).all(axis=2)
        assert same[bytes_of(hole()) == 0].all()
        assert not same[bytes_of(hole()) == 255].all()


def test_a_painter_without_a_mask_paints_everything(painter: Pipeline) -> None:
    inputs = painter.prepare(width=64, height=64)
    assert inputs.concat is not None and torch.equal(inputs.concat[:, :1], torch.ones(1, 1, 8, 8))
    assert painter.generate("a cat", **QUICK)[0].size == (64, 64)


def test_tiles_are_close_to_the_whole(pipe: Pipeline) -> None:
    autoencoder = pipe.autoencoder
    assert autoencoder is not None
    x = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, tiled = autoencoder.decode(x), autoencoder.decode(x, tile=16)
        assert torch.equal(autoencoder.decode(x, tile=24), whole)
    assert tiled.shape == whole.shape
    # Norms and attention see a tile alone: near, with no seam that stands out of the rest.
    assert 0 < (tiled - whole).abs().mean() < 0.3 * whole.std()
    with pytest.raises(ValueError, match="tile: must be at least 8"):
        autoencoder.decode(x, tile=4)


class Recorded(nn.Module):
    """A part that notes where it was sent, on a machine with one device."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def to(self, *args: Any, **_: Any) -> "Recorded":
        self.sent.append(str(args[0]))
        return self


def test_offloading_takes_a_part_back(pipe: Pipeline) -> None:
    part = Recorded()
    with at_work(part, torch.device("meta"), True):
        assert part.sent == ["meta"]
    with pytest.raises(ZeroDivisionError), at_work(part, torch.device("meta"), True):
        raise ZeroDivisionError
    with at_work(part, torch.device("meta"), False):
        pass
    assert part.sent == ["meta", "cpu", "meta", "cpu", "meta"]
    usual = pipe.generate("a cat", **QUICK)
    assert replace(pipe, offload=True).generate("a cat", **QUICK)[0].tobytes() == usual[0].tobytes()


def test_memory_that_runs_out_in_the_autoencoder(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, asked = Autoencoder.decode, []

    def small(self: Autoencoder, latent: Tensor, tile: int | None = None) -> Tensor:
        asked.append(tile)
        if tile is None:
            raise RuntimeError("not enough memory: you tried to allocate too much")
        return decode(self, latent, tile)

    monkeypatch.setattr(Autoencoder, "decode", small)
    with pytest.warns(UserWarning, match="works in tiles"):
        pipe.generate("a cat", **QUICK)
    assert asked == [None, TILE]


def test_memory_that_runs_out_in_the_network(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = pipe.generate("a cat", **QUICK), []
    forward = type(pipe.network).forward

    def once(self: Any, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory")
        return forward(self, *args)

    monkeypatch.setattr(type(pipe.network), "forward", once)
    with pytest.warns(UserWarning, match="take turns"):
        again = pipe.generate("a cat", **QUICK)
    assert again[0].tobytes() == usual[0].tobytes()
    monkeypatch.setattr(type(pipe.network), "forward", always_full)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="out of memory"):
        pipe.generate("a cat", **QUICK)


def always_full(*_: Any) -> Tensor:
    raise RuntimeError("CUDA out of memory")


def test_sixteen_bits_that_overflow_are_done_again(file: Path, fast: None) -> None:
    """Stable Diffusion XL's autoencoder overflows fp16: the part goes on in float32, said once."""
    pipe = minidiffusion.load(file, dtype=torch.float32, autoencoder_dtype=torch.bfloat16)
    assert pipe.autoencoder is not None
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = minidiffusion.load_autoencoder(file).decode(x)
    first = pipe.autoencoder.decoder.enter
    hook = first.register_forward_hook(
        lambda _, args, out: out * float("inf") if out.dtype == torch.bfloat16 else None
    )
    with pytest.warns(UserWarning, match="overflowed: it works in float32") as said:
        found = pipe.decode(x)
        pipe.decode(x)
    hook.remove()
    assert len(said) == 1 and found.isfinite().all()
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()  # its weights were rounded


def test_a_type_for_each_part(file: Path) -> None:
    pipe = minidiffusion.load(
        file, dtype=torch.bfloat16, text_dtype=torch.float32, autoencoder_dtype=torch.float32
    )
    types = [next(part.parameters()).dtype for part in (pipe.network, pipe.text.encoder)]
    assert types == [torch.bfloat16, torch.float32]
    exact = minidiffusion.load(file, precision="fp32")
    cond = exact.condition("a cat")
    one, two = (p.sample(cond, num_steps=2, size=(8, 8), guidance_scale=3.0) for p in (pipe, exact))
    assert one.dtype == torch.float32
    assert 0 < (one - two).abs().mean() < 0.05 * two.std()


def test_the_usual_type_is_the_fast_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "multiplies_fast", lambda dtype, where, there=there: there)
        assert next(minidiffusion.load(file).network.parameters()).dtype == wanted


def test_sixteen_bits_are_stored_where_they_are_slow(file: Path, slow: None) -> None:
    """Said in one line; the picture is that of float32 with the same rounded weights."""
    with pytest.warns(UserWarning, match="^bf16: slow on this cpu; weights stay so") as said:
        pipe = minidiffusion.load(file, "cpu", dtype=torch.bfloat16)
    assert len({str(one.message) for one in said}) == 1
    exact = minidiffusion.load(file, "cpu", dtype=torch.float32)
    for part in parts_of(exact):
        part.bfloat16().float()
    assert {x.dtype for part in parts_of(pipe) for x in part.parameters()} == {torch.bfloat16}
    found, wanted = (one.generate("a cat", init_image=photo(64, 64), **QUICK)
                     for one in (pipe, exact))  # fmt: skip
    assert found[0].tobytes() == wanted[0].tobytes()
    names = [part.state_dict().keys() for part in parts_of(pipe)]
    assert names == [part.state_dict().keys() for part in parts_of(exact)]


def parts_of(pipe: Pipeline) -> list[nn.Module]:
    assert isinstance(pipe.text, Text) and pipe.autoencoder is not None
    return [pipe.network, pipe.text.encoder, pipe.autoencoder]


def test_parts_alone_are_stored_so_as_well(file: Path, slow: None) -> None:
    dtype = torch.bfloat16
    with pytest.warns(UserWarning, match="^bf16: slow on this cpu"):
        parts = [
            minidiffusion.load_denoiser(file, dtype=dtype).network,
            minidiffusion.load_text_encoder(file, dtype=dtype),
            minidiffusion.load_autoencoder(file, dtype=dtype),
            pipeline(minidiffusion.load_denoiser(file), dtype=dtype).network,
        ]
    for part in parts:
        kinds = {type(layer) for layer in part.modules() if isinstance(layer, nn.Linear)}
        assert kinds == {StoredLinear}
    assert parts[2].decode(torch.zeros(1, 4, 8, 8)).isfinite().all()


def test_nothing_is_said_where_it_is_fast(
    file: Path, fast: None, recwarn: pytest.WarningsRecorder
) -> None:
    pipe = minidiffusion.load(file, "cpu", dtype=torch.bfloat16)
    assert not recwarn.list
    assert not [x for part in parts_of(pipe) for x in part.modules() if isinstance(x, StoredLinear)]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "odd width": ({"width": 65}, "width: must be a multiple of 8 in 8..4096, got 65"),
    "no height": ({"height": 0}, "height: must be a multiple of 8 in 8..4096, got 0"),
    "huge": ({"width": 65536}, "width: must be a multiple of 8 in 8..4096, got 65536"),
    "strength": ({"init_image": photo(), "strength": 1.5}, "strength: must be in [0, 1], got 1.5"),
    "sampler": ({"sampler": "dpm_2m"}, "sampler: unknown 'dpm_2m' (did you mean dpmpp_2m?)"),
    "a mask alone": ({"mask": hole()}, "mask: only with a picture to paint on"),
    "another mask": (
        {"mask": hole(64, 64), "init_image": photo()}, "mask: 64 x 64, but the picture is 72 x 64"
    ),
    "depth": ({"depth": hole()}, "depth: not for this model"),
    "no picture": ({"init_image": "nowhere.png"}, "nowhere.png"),
    "a number": ({"prompt": 3}, "prompt: expected text, got 3"),
    "surrogate": ({"prompt": "a \ud800 cat"}, "prompt"),
    "no images": ({"num_images": 0}, "count: must be at least 1, got 0"),
    "batch": ({"batch_size": 0}, "batch size: must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_gets_one_line(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        pipe.generate(**{"prompt": "a cat", "num_steps": 1, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_half_precision_stays_off_the_cpu(file: Path) -> None:
    with pytest.raises(ValueError, match="float16 crawls on a CPU"):
        minidiffusion.load(file, device="cpu", dtype=torch.float16)


def test_a_model_of_depth_wants_a_map(tmp_path: Path) -> None:
    path = official.make(tmp_path / "depth.safetensors", "sd2-depth")
    pipe = minidiffusion.load(path, dtype=torch.float32)
    with pytest.raises(ValueError, match="depth: this model draws after a depth map"):
        pipe.generate("a cat", num_steps=1)
    assert pipe.generate("a cat", depth=hole(), num_steps=1)[0].size == (72, 64)


@pytest.mark.parametrize("how", ["int8", "int8-dynamic", "fp8"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sd3"])
def test_weights_of_eight_bits(
    tmp_path: Path, family: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidiffusion.layers.quantized.NARROW", 32)
    path = official.make(tmp_path / "model.safetensors", family)
    pipe = minidiffusion.load(path, dtype=torch.float32)
    small = minidiffusion.load(path, dtype=torch.float32, quantize=how)
    cond = pipe.condition(["a cat", "a dog"])
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, pipe.row.shape[0], 8, 8, generator=draw), torch.tensor([9.0, 700.0])
    with torch.no_grad():
        exact, rough = pipe.network(x, t, cond), small.network(x, t, cond)
    assert 0 < (rough - exact).norm() < (0.06 if how == "fp8" else 0.03) * exact.norm()
    rough_cond = small.condition(["a cat", "a dog"])
    moved = (rough_cond.tokens - cond.tokens).norm() / cond.tokens.norm()
    assert 0 < moved < 0.15 if family == "sd3" else moved == 0
    assert small.generate("a cat", **QUICK)[0].size == (64, 64)
