"""The user's verbs on tiny networks: one seed is one picture, and known pixels stay."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_near
from torch import Tensor

import minidiffusion
from minidiffusion.checkpoints.catalog import MODEL_FILE, Denoiser
from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.data.pictures import save_png
from minidiffusion.diffusion import SAMPLERS, SPACINGS
from minidiffusion.diffusion.noise import START, keyed
from minidiffusion.pipelines.load import load
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Cond

STEP = 2 / 255
"""One level of a picture's bytes."""


def png(pipe: Pipeline, path: Path, **options: Any) -> bytes:
    save_png(pipe.generate(**options)[0], path)
    return path.read_bytes()


def test_noise_of_a_picture_is_its_own() -> None:
    together = keyed(range(7, 12), (1, 8, 8))
    for step in (START, 0, 3):
        for i in range(5):
            assert torch.equal(keyed([7 + i], (1, 8, 8))(step)[0], together(step)[i])


def test_alone_or_in_a_batch(any_pipe: Pipeline) -> None:
    """Picture i has seed + i; a batch of another shape may round the last bits otherwise."""
    labels = [0, 2, 1, 1, 0]
    together = any_pipe.sample(any_pipe.condition(labels), seed=40, guidance_scale=2.0)
    assert together.std() > 0.1
    for i, label in enumerate(labels):
        alone = any_pipe.sample(any_pipe.condition([label]), seed=40 + i, guidance_scale=2.0)
        assert (alone[0].clamp(-1, 1) - together[i].clamp(-1, 1)).abs().max() < STEP


def test_the_same_call_gives_the_same_bytes(pipe: Pipeline, tmp_path: Path) -> None:
    first, again, other = (
        png(pipe, tmp_path / f"{i}.png", labels=["bag"], seed=seed, sampler="ddpm")
        for i, seed in enumerate((3, 3, 4))
    )
    assert first == again != other


def test_neighbours_do_not_matter(pipe: Pipeline) -> None:
    """At an equal batch shape not one bit of a picture depends on the others."""
    one = pipe.sample(pipe.condition(["bag", "shoe", "shoe"]), seed=5, sampler="ddpm")
    two = pipe.sample(pipe.condition(["bag", "coat", "bag"]), seed=5, sampler="ddpm")
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_end_to_end(any_pipe: Pipeline, sampler: str) -> None:
    pictures = any_pipe.generate(["bag", 0], sampler=sampler, num_steps=3, guidance_scale=3.0)
    assert [(p.mode, p.size) for p in pictures] == [("L", (8, 8))] * 2


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_end_to_end(any_pipe: Pipeline, spacing: str) -> None:
    steps = list(any_pipe.stream([1], spacing=spacing, num_steps=3))
    assert len(steps) == 3 and all(step.x.isfinite().all() for step in steps)


def test_points_have_no_pictures(runs: dict[str, Path]) -> None:
    pipe = load(runs["points"])
    assert pipe.sample(pipe.condition(count=5), 5).shape == (5, 2)
    with pytest.raises(ValueError, match="makes points, not pictures"):
        pipe.generate(num_images=2)


def test_the_stream_ends_where_sample_does_and_can_be_left(pipe: Pipeline) -> None:
    walk = pipe.stream(["coat"], seed=9)
    assert next(walk).index == 0
    walk.close()
    steps = list(pipe.stream(["coat"], seed=9))
    assert torch.equal(steps[-1].x, pipe.sample(pipe.condition(["coat"]), seed=9))


class Counted(torch.nn.Module):
    """The network, and how many samples each call of it had."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.sizes = network, list[int]()

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.sizes.append(len(x))
        return self.network(x, t, cond)


def counted(pipe: Pipeline) -> tuple[Pipeline, Counted]:
    network = Counted(pipe.network)
    made = object.__new__(Pipeline)
    made.__dict__.update(pipe.__dict__, network=network)
    return made, network


@pytest.mark.parametrize(
    ("labels", "scale", "rows"),
    [([0, 1, 2], 1.0, 3), ([0, 1, 2], 2.0, 6), ([0, 1, 2], 0.0, 6), (None, 2.0, 3)],
    ids=["condition alone", "guided", "no condition", "no class to guide to"],
)
def test_guidance_is_one_batch(
    pipe: Pipeline, labels: list[int] | None, scale: float, rows: int
) -> None:
    watched, network = counted(pipe)
    cond = watched.condition(labels, 3)
    watched.sample(cond, guidance_scale=scale, sampler="ddim", num_steps=4)
    assert network.sizes == [rows] * 4


def test_the_scale_is_stable_diffusions(pipe: Pipeline) -> None:
    """0 is no class, 1 the class alone, 2 as far again: in one step x0 is linear in the scale."""

    def one(labels: list[int] | None, scale: float) -> Tensor:
        cond = pipe.condition(labels)
        return pipe.sample(cond, guidance_scale=scale, sampler="ddim", num_steps=1)

    nothing, alone = one(None, 1.0), one([1], 1.0)
    # A batch of two rounds otherwise than a batch of one.
    assert_near(one([1], 0.0), nothing, 16)
    assert_near(one([1], 2.0), 2 * alone - nothing, 32)
    assert (alone - nothing).abs().max() > 1e-3


def test_rescaling_and_an_interval(pipe: Pipeline) -> None:
    cond = pipe.condition([1])
    usual = {"guidance_scale": 5.0, "sampler": "ddim"}
    plain = pipe.sample(cond, **usual)
    assert not torch.equal(pipe.sample(cond, rescale=0.7, **usual), plain)
    everywhere = pipe.sample(cond, guidance_interval=(-1.0, 1000.0), **usual)
    assert torch.equal(everywhere, plain)
    nowhere = pipe.sample(cond, guidance_interval=(0.0, 0.0), **usual)
    alone = pipe.sample(cond, guidance_scale=1.0, sampler="ddim")
    assert_near(nowhere, alone, 16)


def test_the_interval_of_the_recipe_is_the_default(pipe: Pipeline) -> None:
    cond, usual = pipe.condition([1]), {"guidance_scale": 5.0, "sampler": "ddim"}
    sampling = replace(pipe.row.sampling, guidance_interval=(0.0, 0.0))
    never = replace(pipe, row=replace(pipe.row, sampling=sampling))
    alone = pipe.sample(cond, guidance_scale=1.0, sampler="ddim")
    assert torch.equal(never.sample(cond, **usual), alone)
    everywhere = never.sample(cond, guidance_interval=(0.0, 1000.0), **usual)
    assert torch.equal(everywhere, pipe.sample(cond, **usual))


@pytest.fixture
def known() -> Tensor:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_from_a_picture(any_pipe: Pipeline, known: Tensor) -> None:
    cond = any_pipe.condition(["bag", "coat"])

    def drawn(strength: float, init: Tensor | None = known) -> Tensor:
        return any_pipe.sample(cond, init=init, strength=strength, sampler="ddim", num_steps=8)

    assert torch.equal(drawn(0.0), known)
    near, far = ((drawn(s) - known).abs().mean() for s in (0.125, 1.0))
    assert 0 < near < far
    steps = list(any_pipe.steps(cond, init=known, strength=0.5, num_steps=8))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert torch.equal(drawn(0.5, known[:1])[0], drawn(0.5)[0])  # one picture serves for all


def test_strength_one_on_a_flow_forgets_the_picture(pipe: Pipeline, known: Tensor) -> None:
    cond = pipe.condition(["bag", "coat"])
    assert torch.equal(pipe.sample(cond, init=known, strength=1.0), pipe.sample(cond))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_painting_keeps_what_is_known(any_pipe: Pipeline, known: Tensor, sampler: str) -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    found = any_pipe.sample(
        any_pipe.condition([0, 1]), init=known, mask=mask, sampler=sampler, num_steps=5
    )
    # Multistep corrections end in a slope, a rounding of x / alpha away; PNG bytes are the same.
    noisiest = any_pipe.row.path.level(1.0)
    size = max(1.0, noisiest.sigma / noisiest.alpha if noisiest.alpha else 1.0)
    assert_near(found[..., :4], known[..., :4], 16, scale=size)
    assert (found[..., 4:] - known[..., 4:]).abs().mean() > 0.1
    for one in (mask[:1], mask[0], mask.bool()):  # a mask for all; of any number type
        again = any_pipe.sample(
            any_pipe.condition([0, 1]), init=known, mask=one, sampler=sampler, num_steps=5
        )
        assert torch.equal(again, found)


def test_latents_are_the_noise_of_the_seed(any_pipe: Pipeline) -> None:
    """What a seed draws, given by hand, is the same picture; each picture has its own."""
    z = keyed(range(5, 8), (1, 8, 8))(START)
    options: dict[str, Any] = {"sampler": "euler", "guidance_scale": 2.0, "num_images": 3}
    usual = any_pipe.generate([1], seed=5, **options)
    for more in ({}, {"batch_size": 2}, {"exact": True}):
        found = any_pipe.generate([1], latents=z, **options, **more)
        same = any_pipe.generate([1], seed=5, **options, **more)
        assert [one.tobytes() for one in found] == [one.tobytes() for one in same]
    assert [one.tobytes() for one in any_pipe.generate([1], latents=z.flip(0), **options)] == [
        one.tobytes() for one in usual[::-1]
    ]


def exact_cases(pipe: Pipeline, count: int, seed: int) -> int:
    """Pictures of random batches that differ, exactly drawn, from those drawn alone."""
    draw, different = random.Random(seed), 0
    while count > 0:
        labels = [draw.randrange(3) for _ in range(min(count, draw.randint(1, 9)))]
        first, size = draw.randrange(2**63), draw.choice([None, 1, 2, 4])
        options: dict[str, Any] = {
            "sampler": draw.choice([*SAMPLERS]), "num_steps": draw.randint(1, 4),
            "guidance_scale": draw.choice([1.0, 2.0, 7.5]),
        }  # fmt: skip
        together = pipe.generate(labels, seed=first, batch_size=size, exact=True, **options)
        for place in draw.sample(range(len(labels)), len(labels)):
            alone = pipe.generate([labels[place]], seed=first + place, **options)[0]
            different += together[place].tobytes() != alone.tobytes()
        count -= len(labels)
    return different


def test_exact_pictures_are_those_drawn_alone(any_pipe: Pipeline) -> None:
    assert exact_cases(any_pipe, 17, seed=0) == 0


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_a_thousand_exact_pictures(any_pipe: Pipeline, threads: int) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert exact_cases(any_pipe, 334, seed=threads) == 0
    finally:
        torch.set_num_threads(usual)


X = torch.zeros(1, 1, 8, 8)
MISTAKES: dict[str, tuple[Callable[[Pipeline], Any], str]] = {
    "sampler": (
        lambda p: p.generate([0], sampler="huen"),
        "sampler: unknown 'huen' (did you mean heun?); allowed: ddim, ddpm, ",
    ),
    "spacing": (
        lambda p: p.generate([0], spacing="even"),
        "spacing: unknown 'even'; allowed: leading, ",
    ),
    "label": (
        lambda p: p.generate(["shoes"]),
        "label: unknown 'shoes' (did you mean shoe?); allowed: shoe, bag, coat",
    ),
    "empty label": (lambda p: p.generate([""]), "label: unknown ''; allowed: shoe, bag, coat"),
    "odd digit": (lambda p: p.generate(["²"]), "label: unknown '²'; allowed: shoe, bag, coat"),
    "number": (lambda p: p.generate([3]), "label: must be 0..2, got 3"),
    "text number": (lambda p: p.generate(["7"]), "label: must be 0..2, got 7"),
    "negative": (lambda p: p.generate([0, -1]), "label: must be 0..2, got -1"),
    "tensor": (lambda p: p.condition(torch.tensor([9])), "label: must be 0..2, got 9"),
    "none": (lambda p: p.generate([]), "count: must be at least 1, got 0"),
    "count 0": (lambda p: p.generate(num_images=0), "count: must be at least 1, got 0"),
    "count -5": (lambda p: p.generate(num_images=-5), "count: must be at least 1, got -5"),
    "nan": (
        lambda p: p.generate([0], guidance_scale=float("nan")),
        "guidance: must be 0 or more, got nan",
    ),
    "infinite": (
        lambda p: p.generate([0], guidance_scale=float("inf")),
        "guidance: must be 0 or more, got inf",
    ),
    "below 0": (
        lambda p: p.generate([0], guidance_scale=-1.0),
        "guidance: must be 0 or more, got -1.0",
    ),
    "rescale": (
        lambda p: p.generate([0], rescale=1.5),
        "rescale: must be in [0, 1], got 1.5",
    ),
    "falling interval": (
        lambda p: p.generate([0], guidance_interval=(3.0, 2.0)),
        "guidance_interval: must not fall, got 3.0 to 2.0",
    ),
    "no steps": (lambda p: p.generate([0], num_steps=0), "steps: must be 1..1000, got 0"),
    "steps -1": (lambda p: p.generate([0], num_steps=-1), "steps: must be 1..1000, got -1"),
    "too many": (lambda p: p.generate([0], num_steps=1001), "steps: must be 1..1000, got 1001"),
    "strength": (
        lambda p: p.sample(p.condition([0]), init=X, strength=1.5),
        "strength: must be in [0, 1], got 1.5",
    ),
    "nan strength": (
        lambda p: p.sample(p.condition([0]), init=X, strength=float("nan")),
        "strength: must be in [0, 1], got nan",
    ),
    "strength of nothing": (
        lambda p: p.sample(p.condition([0]), strength=0.5),
        "mask and strength: only with init, the picture to start from",
    ),
    "mask of nothing": (
        lambda p: p.sample(p.condition([0]), mask=X),
        "mask and strength: only with init, the picture to start from",
    ),
    "init of another size": (
        lambda p: p.sample(p.condition([0]), init=torch.zeros(1, 1, 9, 8)),
        "init: expected the shape (1, 1, 8, 8), got (1, 1, 9, 8)",
    ),
    "three for two": (
        lambda p: p.sample(p.condition([0, 1]), init=X.repeat(3, 1, 1, 1)),
        "init: expected the shape (2, 1, 8, 8), got (3, 1, 8, 8)",
    ),
    "latents of whole numbers": (
        lambda p: p.sample(p.condition([0]), latents=torch.zeros(1, 1, 8, 8, dtype=torch.int64)),
        "latents: expected a dense tensor of floating-point numbers",
    ),
    "latents without numbers": (
        lambda p: p.sample(p.condition([0]), latents=torch.zeros(1, 1, 8, 8, device="meta")),
        "latents: expected a dense tensor of floating-point numbers",
    ),
    "a seed below 0": (lambda p: p.generate([0], seed=-1), "seed: must be 0..18446744073709551615"),
    "a second seed beyond the last": (
        lambda p: p.generate([0, 1], seed=2**64 - 1),
        "seed: must be 0..18446744073709551615",
    ),
    "latents of another size": (
        lambda p: p.sample(p.condition([0]), latents=torch.zeros(1, 1, 9, 8)),
        "latents: expected the shape (1, 1, 8, 8), got (1, 1, 9, 8)",
    ),
    "latents for one of two": (
        lambda p: p.generate([0, 1], batch_size=1, latents=X),
        "latents: expected the shape (2, 1, 8, 8), got (1, 1, 8, 8)",
    ),
    "latents of a number": (
        lambda p: list(p.stream([0], latents=torch.tensor(1.0))),
        "latents: expected the shape (1, 1, 8, 8), got ()",
    ),
    "latents that are not finite": (
        lambda p: p.generate([0], latents=X / 0),
        "latents: numbers that are not finite",
    ),
    "mask of another size": (
        lambda p: p.sample(p.condition([0]), init=X, mask=torch.zeros(4, 4)),
        "mask: expected the shape (1, 1, 8, 8), got (4, 4)",
    ),
}


@pytest.mark.parametrize(("act", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_gets_one_line(
    pipe: Pipeline, act: Callable[[Pipeline], Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        act(pipe)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_labels_where_there_are_none(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"^labels: this network was trained without classes$"):
        load(runs["points"]).condition([0])


def test_a_folder_or_its_file(runs: dict[str, Path], pipe: Pipeline) -> None:
    for place in (runs["flow"] / MODEL_FILE, str(runs["flow"])):
        found = minidiffusion.load(place)
        assert found.row == pipe.row and not found.network.training
        cond = found.condition(["bag"])
        assert torch.equal(found.sample(cond), pipe.sample(cond))


def test_a_damaged_row_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / MODEL_FILE
    write_safetensors(read_safetensors(runs["flow"] / MODEL_FILE), file, {"row": "{"})
    with pytest.raises(ValueError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: its metadata's row is no JSON: ")


def test_a_longer_header_changes_no_bit(
    pipe: Pipeline, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Weights mapped from a file begin anywhere, and MKL's rounding depends on where."""
    file, usual = runs["flow"] / MODEL_FILE, pipe.sample(pipe.condition([1]), guidance_scale=1.0)
    weights, facts = read_safetensors(file), read_metadata(file)
    for length in range(0, 64, 8):
        write_safetensors(weights, tmp_path / MODEL_FILE, {**facts, "note": length * "x"})
        other = load(tmp_path)
        assert torch.equal(other.sample(other.condition([1]), guidance_scale=1.0), usual)


def test_a_network_in_bf16(runs: dict[str, Path], pipe: Pipeline) -> None:
    rough = load(runs["flow"], dtype=torch.bfloat16)
    assert {p.dtype for p in rough.network.parameters()} == {torch.bfloat16}
    cond = pipe.condition(["bag"])
    found = rough.sample(cond, guidance_scale=1.0)
    assert found.dtype == torch.float32  # the sampler's arithmetic is not the network's
    assert (found - pipe.sample(cond, guidance_scale=1.0)).abs().max() < 0.2


def rewritten(run: Path, place: Path, facts: dict[str, Any] | None = None, **row: Any) -> Path:
    """The run's file with other metadata, all else as it was."""
    metadata = read_metadata(run / MODEL_FILE)
    if row:
        metadata["row"] = json.dumps({**json.loads(metadata["row"]), **row})
    write_safetensors(read_safetensors(run / MODEL_FILE), place, {**metadata, **(facts or {})})
    return place


def cut(run: Path, path: Path) -> Path:
    path.write_bytes((run / MODEL_FILE).read_bytes()[:-100])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def without(run: Path, path: Path) -> Path:
    weights = read_safetensors(run / MODEL_FILE)
    weights["stranger"] = weights.pop("leave.bias")
    write_safetensors(weights, path, read_metadata(run / MODEL_FILE))
    return path


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, buffer)
    return buffer.getvalue()


UNET = {"name": "unet", "channels": 16, "groups": 4, "blocks": 1, "heads": 2, "classes": 3}
DAMAGE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda run, p: p, "no such file"),
    "empty folder": (lambda run, p: p.parent, "holds no model.safetensors: not a finished run"),
    "empty": (lambda run, p: written(p, b""), "the file is empty"),
    "cut short": (cut, "cut short"),
    "a web page": (lambda run, p: written(p, b"<!DOCTYPE html><html>"), "this is a web page"),
    "a pickle": (lambda run, p: written(p, pickled()), "no network that is known here: 1 tensor"),
    "another's": (lambda run, p: rewritten(run, p, {"row": "{}"}), "model: missing"),
    "no JSON": (lambda run, p: rewritten(run, p, {"row": "{"}), "Expecting property name"),
    "other keys": (without, "missing keys: ['leave.bias']; unknown keys: ['stranger']"),
    "another model": (lambda run, p: rewritten(run, p, model=UNET), "shape"),
    "an impossible one": (
        lambda run, p: rewritten(run, p, model={**UNET, "heads": 7}),
        "cannot be split into 7 equal heads",
    ),
    "an unknown path": (
        lambda run, p: rewritten(run, p, path={"name": "bridge"}),
        "path.name: unknown 'bridge'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_files_that_cannot_be_loaded(
    runs: dict[str, Path],
    tmp_path: Path,
    damage: Callable[[Path, Path], Path],
    message: str,
) -> None:
    place = damage(runs["flow"], tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(place)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_safetensors_file_of_others(tmp_path: Path) -> None:
    write_safetensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"a\.safetensors: no network that is known here: 1 tensor, a$"
    ):
        load(tmp_path / "a.safetensors")


def test_a_network_in_memory(pipe: Pipeline) -> None:
    again = minidiffusion.pipeline(Denoiser(pipe.network, pipe.row))
    assert again.device == pipe.device and again.row is pipe.row
