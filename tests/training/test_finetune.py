"""Finetuning: a few captioned pictures, a tiny model in the official layout, whole or LoRA."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rounding import SHORT, assert_near
from torch import nn

from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.catalog import load_denoiser
from minidiffusion.checkpoints.convert import Content, single_file
from minidiffusion.checkpoints.parts import load_parts
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.cli.main import main
from minidiffusion.data import Folder, Tensors
from minidiffusion.diffusion import Uniform, VariancePreserving
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    CLIPText,
    UNet,
    UNetConfig,
)
from minidiffusion.shapes import Cond
from minidiffusion.text import Text
from minidiffusion.training import latents
from minidiffusion.training.loop import Trainer, train
from minidiffusion.training.objectives import Objective, drawn
from minidiffusion.training.optimizers import AdamW, Schedule
from minidiffusion.training.parallel import World
from minidiffusion.training.recipe import Finetune, Recipe, Run, load_recipe
from minidiffusion.typed import ConfigError

CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
SIZES: dict[str, Any] = {
    "multipliers": (1,), "blocks": 1, "attention": (1,), "context_width": 64,
    "in_channels": 4, "out_channels": 4,
}  # fmt: skip
UNETS = {
    "sd1": UNetConfig(**SIZES, channels=32, heads=8),
    "sd2": UNetConfig(**SIZES, channels=64, head_width=64, linear_projections=True),
}


def random(network: nn.Module, std: float = 0.1) -> nn.Module:
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=std)
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(p)
    return network


def official(path: Path, family: str) -> Path:
    """A single file as Stability's: denoiser, autoencoder, text encoder."""
    torch.manual_seed(0)
    vae = AutoencoderConfig(channels=32, multipliers=(1, 1), blocks=1)
    words = CLIPConfig(
        width=64, layers=1, heads=1, feed_forward=64,
        activation="quick_gelu" if family == "sd1" else "gelu",
    )  # fmt: skip
    unet = random(UNet(UNETS[family]), 0.05)
    if family == "sd2":  # by this bias a file says that it predicts v
        unet.up[-1].attention.blocks[0].norm1.bias.data.normal_(std=0.5)
    parts: Any = {
        "denoiser": Content(UNETS[family], unet.state_dict()),
        "autoencoder": Content(vae, random(Autoencoder(vae)).state_dict()),
        "text encoder": Content(words, random(CLIPText(words)).state_dict()),
    }
    single_file(parts, family, path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: official(folder / f"{family}.safetensors", family) for family in UNETS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} wall")
    return folder


@pytest.fixture
def recipe(models, pictures, tmp_path):
    def made(how: str = "full", family: str = "sd1", **run: Any) -> Recipe:
        rank = {"lora": 4, "alpha": 8.0} if how == "lora" else {}
        usual = Run(steps=6, batch_size=4, precision="fp32", device="cpu", keep=100)
        return Recipe(
            data=Folder(str(pictures), size=8), finetune=Finetune(str(models[family]), **rank),
            objective=Objective(density=Uniform()), optimizer=AdamW(lr=3e-3),
            schedule=Schedule(warmup=0, decay="constant"), run=replace(usual, **run),
            out=str(tmp_path / "run"),
        )  # fmt: skip

    return made


def outputs(network: nn.Module) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(5)
    x, tokens = (torch.randn(2, *shape, generator=numbers) for shape in ((4, 4, 4), (77, 64)))
    with torch.no_grad():
        return network(x, torch.tensor([10.0, 900.0]), Cond(tokens=tokens))


# --- it learns ------------------------------------------------------------------------------------


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("how", "family"),
    [
        ("full", "sd1"), ("lora", "sd2"),
        pytest.param("full", "sd2", marks=LONG), pytest.param("lora", "sd1", marks=LONG),
    ],
)  # fmt: skip
def test_the_loss_falls(how, family, recipe, trainer_of) -> None:
    """By a quarter on six pictures, for eps (1.x) and v (2.x), of which the file says itself."""
    lr = {"full": 3e-3, "lora": 1e-2}[how]
    recipe = replace(recipe(how, family, steps=60), optimizer=AdamW(lr=lr), out=None)
    if how == "lora":
        targets = ("attention", "feed_forward", "convolution")
        recipe = replace(recipe, finetune=replace(recipe.finetune, targets=targets))
    reports = list(train(recipe))
    followed = trainer_of(reports[-1]).recipe
    assert followed.objective.target == {"sd1": "eps", "sd2": "v"}[family]
    assert followed.path == VariancePreserving() and followed.sampling.guidance == 7.5
    first, last = (sum(r.loss for r in part) / 10 for part in (reports[:10], reports[-10:]))
    assert last < 0.75 * first


def test_what_the_recipe_says_wins(recipe, trainer_of) -> None:
    path = VariancePreserving(zero_terminal_snr=True)
    asked = replace(recipe(steps=1), path=path, objective=Objective("v", weighting="min_snr"))
    trainer = trainer_of(next(train(replace(asked, out=None))))
    row = trainer.task.begun.row
    assert row.path == trainer.recipe.path == path and row.target == "v"


# --- what it leaves -------------------------------------------------------------------------------


def test_a_lora_is_the_trained_network(recipe, models, tmp_path) -> None:
    """Read by our own reader and merged into the base: the averaged network."""
    *_, last = train(recipe("lora"))
    trained = last.average().network
    base = load_denoiser(models["sd1"]).network
    assert trained.state_dict().keys() == base.state_dict().keys()
    before = outputs(base)
    file = tmp_path / "run" / "lora.safetensors"
    assert lora.apply([(file, 1.0)], base) == 24
    assert (outputs(base) - before).abs().max() > 0.001
    assert_near(outputs(base), outputs(trained), 64)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    weights = open_weights(file)
    assert len(weights) == 2 * 32 and len(weights.metadata["base"]) == 64
    said = json.loads(weights.metadata["recipe"])
    assert said["finetune.lora"] == 4 and said["objective.target"] == "eps"
    assert not [value for value in said.values() if str(tmp_path.parent) in str(value)]


def test_a_model_is_whole(recipe, models, tmp_path) -> None:
    """Stability's layout again: the trained denoiser, the autoencoder and encoder as they were."""
    *_, last = train(recipe("full", "sd2"))
    base, found = load_parts(models["sd2"]), load_parts(tmp_path / "run" / "model.safetensors")
    assert torch.equal(outputs(found.denoiser.network), outputs(last.average().network))
    assert (outputs(found.denoiser.network) - outputs(base.denoiser.network)).abs().max() > 0.01
    assert found.denoiser.row == base.denoiser.row and found.denoiser.row.target == "v"
    for mine, other in ((found.autoencoder, base.autoencoder), (found.text, base.text)):
        assert latents.hash_of(mine) == latents.hash_of(other)


def test_only_adapters_are_trained_and_kept(recipe, models, tmp_path, trainer_of) -> None:
    report = next(train(recipe("lora", save_every=1)))
    trainer = trainer_of(report)
    base = load_denoiser(models["sd1"]).network
    for name, weight in base.state_dict().items():
        assert torch.equal(trainer.network.state_dict()[name], weight), name
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    for part in ("weights", "average", "optimizer"):
        names = list(open_weights(folder / f"{part}.safetensors"))
        assert names and all(".lora." in name for name in names)


def test_a_run_of_our_own_goes_on(models, tiny, tmp_path) -> None:
    """A network of pixels and classes needs no encoders; its classes must be the data's."""
    config = UNetConfig(channels=8, multipliers=(1,), attention=(0,), blocks=1, groups=4, heads=2)
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, 8, 8, generator=numbers)
    data = Tensors(x, torch.randint(0, 3, (24,), generator=numbers), ("a", "b", "c"))
    list(train(tiny(config, tmp_path / "first"), dataset=data))
    again = tiny(UNetConfig(), tmp_path / "second", steps=2)
    again = replace(again, finetune=Finetune(str(tmp_path / "first")))
    *_, last = train(again, dataset=data)
    found = load_denoiser(tmp_path / "second")
    assert found.row == load_denoiser(tmp_path / "first").row == last.average().row
    with pytest.raises(ConfigError, match="3 classes, these pictures have .* and 0"):
        next(train(replace(again, out=None), dataset=Tensors(x)))
    adapted = replace(again, out=None, finetune=Finetune(str(tmp_path / "first"), lora=2))
    with pytest.raises(ConfigError, match=r"finetune.lora: .* own"):
        next(train(adapted, dataset=data))


# --- exactly --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "precision"), [("full", "fp32"), ("lora", "fp32"), ("lora", "bf16")]
)
def test_a_resumed_run_is_the_same(how, precision, recipe, digest, tmp_path, monkeypatch) -> None:
    asked = recipe(how, save_every=1, precision=precision, checkpointing=how == "lora")
    whole = [digest(report) for report in train(asked)]
    ends = [hashlib.sha256(file.read_bytes()).digest() for file in files(tmp_path / "run")]
    assert len(set(whole)) == 6 and len(ends) == 1
    for path in (*files(tmp_path / "run"), *(tmp_path / "run" / "checkpoints").glob("*[456]")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(Autoencoder, "posterior", None)  # nothing is encoded again
    monkeypatch.setattr(CLIPText, "forward", None)
    assert [digest(report) for report in train(asked, asked.out)] == whole[3:]
    assert [hashlib.sha256(f.read_bytes()).digest() for f in files(tmp_path / "run")] == ends


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_accumulation(recipe) -> None:
    """Four pictures at once or two and two: the same losses, but for the order of sums."""
    one, two = (
        [report.loss for report in train(replace(recipe(how, micro_batch=n), out=None))]
        for how, n in (("lora", 4), ("lora", 2))
    )
    assert_near(one, two, 64, eps=SHORT)


def test_recomputing_changes_nothing(recipe) -> None:
    one, two = (
        [report.loss for report in train(replace(recipe(checkpointing=way), out=None))]
        for way in (False, True)
    )
    assert one == two


def test_a_run_goes_on_with_its_own_base(recipe, models, tmp_path) -> None:
    """A moved file is the same base; other weights are not."""
    list(train(recipe(), until=2))
    moved = tmp_path / "moved.safetensors"
    shutil.copy(models["sd1"], moved)
    asked = recipe()
    asked = replace(asked, finetune=replace(asked.finetune, model=str(moved)))
    assert len(list(train(asked, asked.out, until=3))) == 1
    weights = dict(open_weights(moved))
    key = "model.diffusion_model.out.2.bias"
    write_safetensors({**weights, key: weights[key] + 1}, moved)
    with pytest.raises(ConfigError, match="base was .* not the same run"):
        next(train(asked, asked.out))


# --- captions and latents -------------------------------------------------------------------------


def trainer(recipe: Recipe) -> Trainer:
    return Trainer(recipe, recipe.data.open(), CPU, World())


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_captions_are_dropped(drop, recipe) -> None:
    asked = recipe()
    found = trainer(replace(asked, objective=replace(asked.objective, label_drop=drop)))
    words = found.dataset.words
    assert set(words) == {"", *(f"a {colour} wall" for colour in COLOURS)}
    batch = found.dataset.batch(list(range(6)) * 50)
    tokens = found.task.inputs(0, 0, batch)[3].tokens
    own = torch.cat([words[caption].tokens for caption in batch.captions])
    empty = (tokens == words[""].tokens).all(dim=(1, 2))
    assert torch.equal(tokens[~empty], own[~empty])
    assert abs(float(empty.float().mean()) - drop) < 0.1  # 3.5 standard errors of 300
    assert drop not in (0, 1) or float(empty.float().mean()) == drop


def test_the_words_are_the_text_encoder_s(recipe, models) -> None:
    parts = load_parts(models["sd2"])
    text = Text(parts.text, pad=0)
    words = trainer(recipe("full", "sd2")).dataset.words
    assert torch.equal(words["a red wall"].tokens, text.encode("a red wall").tokens)
    assert torch.equal(words[""].tokens, text.encode("").tokens)


def test_latents_are_drawn_from_their_gaussians(recipe, models) -> None:
    """With noise of the sample's and the step's own; the network's noise is another half."""
    found = trainer(recipe())
    autoencoder = load_parts(models["sd1"]).autoencoder
    batch = found.dataset.batch([1, 4])
    x0, _, eps, _ = found.task.inputs(0, 7, batch)
    _, noise = drawn(found.recipe.seed, 0, 7, batch.x.shape)
    assert torch.equal(eps, noise[:, :4]) and found.dataset.shape == (4, 4, 4)
    picture = Folder(found.recipe.data.path, size=8).open().batch([1, 4]).x
    mean, log_variance = autoencoder.posterior(picture)
    want = mean + torch.exp(0.5 * log_variance) * noise[:, 4:]
    assert_near(x0, 0.18215 * want, 32)
    assert (x0 - autoencoder.encode(picture)).abs().max() > 0.01 * x0.abs().max()


def test_the_cache(recipe, models, tmp_path, monkeypatch) -> None:
    """A file for each of six pictures and seven captions; a damaged one is made again."""
    first = trainer(recipe())
    cache = sorted((tmp_path / "run" / latents.FOLDER).iterdir())
    assert len(cache) == 13
    whole = {path: path.read_bytes() for path in cache}
    data = bytearray(whole[cache[0]])
    data[-1] ^= 1
    cache[0].write_bytes(data)
    cache[1].write_bytes(whole[cache[1]][:100])
    cache[2].write_bytes(b"")
    cache[3].unlink()
    calls = []
    make = latents.write_safetensors
    monkeypatch.setattr(latents, "write_safetensors", lambda *a: calls.append(make(*a)))
    again = trainer(recipe())
    assert len(calls) == 4 and {path: path.read_bytes() for path in cache} == whole
    assert torch.equal(first.dataset.moments, again.dataset.moments)
    assert first.dataset.fingerprint() == again.dataset.fingerprint()
    asked = recipe()
    asked = replace(asked, finetune=replace(asked.finetune, vae=str(models["sd2"])))
    calls.clear()
    other = trainer(asked)  # other weights: of the autoencoder, not of the text encoder
    assert len(calls) == 6 and not torch.equal(first.dataset.moments, other.dataset.moments)
    assert other.dataset.fingerprint() != first.dataset.fingerprint()
    assert torch.equal(trainer(replace(recipe(), out=None)).dataset.moments, first.dataset.moments)
    trainer(replace(recipe(), data=replace(recipe().data, size=16)))
    assert len(calls) == 12  # the captions are as they were


def test_auto_batch_size(recipe, monkeypatch) -> None:
    asked = replace(recipe("lora", batch_size="auto"), out=None)
    assert trainer(asked).batch == 4  # of six pictures


# --- mistakes -------------------------------------------------------------------------------------


def refused(recipe: Recipe, pattern: str) -> None:
    with pytest.raises((ValueError, OSError), match=pattern) as error:
        next(train(recipe))
    assert "\n" not in str(error.value)
    assert recipe.out is None or not Path(recipe.out).exists()


def test_mistakes_of_data(recipe, tmp_path) -> None:
    asked = recipe()
    bare = tmp_path / "bare"
    bare.mkdir()
    refused(replace(asked, data=Folder(str(bare))), "no pictures here")
    Image.new("RGB", (8, 8), "red").save(bare / "a.png")
    refused(
        replace(asked, data=Folder(str(bare), size=8)), "no captions: finetuning wants NAME.txt"
    )
    refused(
        replace(asked, data=replace(asked.data, channels=1)), "data.channels: .* takes 3, got 1"
    )
    refused(replace(asked, data=replace(asked.data, size=9)), "data.size: must be a multiple of 2")


def test_mistakes_of_the_model(recipe, models, tmp_path) -> None:
    asked = recipe()

    def of(**changes: Any) -> Recipe:
        return replace(asked, finetune=replace(asked.finetune, **changes))

    refused(of(model=str(tmp_path / "none.safetensors")), "none.safetensors: no such file")
    adapters = tmp_path / "a.safetensors"
    write_safetensors({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, adapters)
    refused(of(model=str(adapters)), "this is a LoRA")
    refused(of(vae=str(adapters)), "this is a LoRA")
    denoiser = tmp_path / "unet.safetensors"
    weights = open_weights(models["sd1"])
    prefix = "model.diffusion_model."
    write_safetensors({n: w for n, w in weights.items() if n.startswith(prefix)}, denoiser)
    refused(of(model=str(denoiser)), "finetune.vae: .* holds none; name a file that does")
    refused(of(model=str(denoiser), vae=str(models["sd1"])), "finetune.text_encoder: .* none")
    refused(replace(asked, model=UNetConfig(channels=96)), "model: is that of finetune.model")
    refused(replace(asked, run=replace(asked.run, sample_every=5)), "run.sample_every: finetuning")
    everything = of(model=str(denoiser), vae=str(models["sd1"]), text_encoder=str(models["sd1"]))
    assert next(train(replace(everything, out=None))).step == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora": 0}, "finetune.lora: must be at least 1, got 0"),
        ({"lora": 4, "alpha": 0}, "finetune.alpha: must be above 0"),
        ({"alpha": 4}, "finetune: alpha: only with lora"),
        ({"lora": 4, "targets": []}, "finetune: targets: name at least one"),
        ({"lora": 4, "targets": ["atention"]}, r"finetune.targets\[0\]: unknown 'atention'"),
        ({"rank": 4}, "finetune.rank: unknown key"),
    ],
)
def test_mistakes_of_the_block(values, words, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"finetune": {"model": "x", **values}}))
    with pytest.raises(ConfigError, match=words):
        load_recipe(file)


# --- as a user runs it ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "left"), [("sd_lora", "lora"), ("sd_finetune", "model")])
def test_the_command(name, left, models, pictures, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    words = ["train", f"configs/{name}.yaml", "--finetune.model", str(models["sd1"])]
    words += ["--data.path", str(pictures), "--data.size", "8", "--steps", "2", "--out", str(out)]
    words += ["--device", "cpu", "--batch-size", "2", "--run.micro_batch", "2"]
    assert main(words) == 0
    assert (out / f"{left}.safetensors").exists() and (out / "loss.png").exists()
    said = capsys.readouterr().out
    assert "minidiffusion generate" in said and str(out) in said
    assert main(["train", "--resume", str(out)]) == 0
    with pytest.raises(SystemExit):
        main(words)
    assert "holds a run already" in capsys.readouterr().err
