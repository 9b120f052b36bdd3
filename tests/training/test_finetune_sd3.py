"""Finetuning of Stable Diffusion 3: a few captioned pictures, tiny models in official layouts."""

import gc
import hashlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import official
import pytest
import torch
import torchrun
from PIL import Image
from rounding import SHORT, assert_near

from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.catalog import load_denoiser
from minidiffusion.checkpoints.parts import load_autoencoder, load_parts
from minidiffusion.checkpoints.text_encoders import load_text_encoders
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.data import Folder
from minidiffusion.diffusion import LogitNormal, RectifiedFlow
from minidiffusion.models import Autoencoder, CLIPText, MMDiT, T5Encoder
from minidiffusion.shapes import Cond
from minidiffusion.text.triple import TripleText
from minidiffusion.text.unigram import t5_tokenizer
from minidiffusion.training import denoising, latents, start
from minidiffusion.training.loop import Trainer, train
from minidiffusion.training.objectives import drawn
from minidiffusion.training.optimizers import AdamW, Schedule
from minidiffusion.training.parallel import World
from minidiffusion.training.recipe import Finetune, Recipe, Run
from minidiffusion.typed import plain

SCRIPT = Path(__file__).with_name("rank_sd3.py")
spec = importlib.util.spec_from_file_location("rank_sd3", SCRIPT)
assert spec is not None and spec.loader is not None
rank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rank)
CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
RED = "a red wall"
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """alone: as Stability's 3.5, its encoders in a folder; bundled: 3 with its encoders inside."""
    root = tmp_path_factory.mktemp("place")
    official.make(root / "alone.safetensors", "sd3.5-medium", alone=True)
    official.make(root / "encoders", "sd3.5-medium", dialect="parts")
    official.make(root / "bundled.safetensors", "sd3")
    (root / "pictures").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 32), colour).save(root / "pictures" / f"{colour}.png")
        (root / "pictures" / f"{colour}.txt").write_text(f"a {colour} wall")
    return root


@pytest.fixture
def recipe(place, tmp_path):
    def made(how: str = "lora", model: str = "alone", **run: Any) -> Recipe:
        rank = {"lora": 4, "alpha": 8.0} if how == "lora" else {}
        usual = Run(steps=4, batch_size=4, precision="fp32", device="cpu", keep=100)
        tuned = Finetune(
            str(place / f"{model}.safetensors"), t5_length=77, **rank,
            text_encoders=str(place / "encoders") if model == "alone" else None,
        )  # fmt: skip
        return Recipe(
            data=Folder(str(place / "pictures"), size=32), finetune=tuned,
            optimizer=AdamW(lr=1e-3), schedule=Schedule(warmup=0, decay="constant"),
            run=replace(usual, **run), out=str(tmp_path / "run"),
        )  # fmt: skip

    return made


def of(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, finetune=replace(recipe.finetune, **changes))


def trainer(recipe: Recipe) -> Trainer:
    return Trainer(recipe, recipe.data.open(), CPU, World())


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@torch.no_grad()
def outputs(network: MMDiT) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(5)
    x, tokens = (torch.randn(2, *n, generator=numbers) for n in ((16, 4, 4), (154, 96)))
    pooled = torch.randn(2, 96, generator=numbers)
    return network(x, torch.tensor([10.0, 900.0]), Cond(tokens=tokens, pooled=pooled))


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "model"), [("lora", "alone"), pytest.param("full", "bundled", marks=LONG)]
)
def test_the_loss_falls(how, model, recipe, trainer_of, monkeypatch) -> None:
    """By a fifth on six pictures; what the recipe leaves at its default is the file's own."""
    # The deviations of this random autoencoder are far larger than what pictures differ by.
    means = lambda moments, noise: (moments.chunk(2, dim=1)[0], noise.chunk(2, dim=1)[1])  # noqa: E731
    monkeypatch.setattr(denoising, "sampled", means)
    lr = {"full": 5e-3, "lora": 3e-2}[how]
    asked = replace(recipe(how, model, steps=40), optimizer=AdamW(lr=lr), out=None)
    if how == "lora":
        asked = of(asked, targets=("attention", "feed_forward"))
    reports = list(train(asked))
    followed = trainer_of(reports[-1]).recipe
    assert followed.path == RectifiedFlow(3.0) and followed.sampling.guidance == 5.0
    assert followed.objective.target == "flow" and followed.objective.density == LogitNormal()
    first, last = (sum(r.loss for r in part) / 10 for part in (reports[:10], reports[-10:]))
    assert last < 0.8 * first


# --- captions and latents -------------------------------------------------------------------------


def text_of(place: Path, length: int = 77, t5: bool = True) -> TripleText:
    encoders = load_text_encoders(place / "encoders", t5=t5)
    return TripleText(*encoders, t5_tokenizer=t5_tokenizer(), t5_length=length, width=96)


@pytest.mark.parametrize("t5", [True, False])
def test_the_words_are_the_text_encoders(t5, recipe, place) -> None:
    found = trainer(of(recipe(), no_t5=not t5, t5_length=100)).dataset
    assert set(found.words) == {"", *(f"a {c} wall" for c in COLOURS)}
    text = text_of(place, 100, t5)
    for caption in (RED, ""):
        own, want = found.words[caption], text.encode(caption)
        assert torch.equal(own.tokens, want.tokens) and torch.equal(own.pooled, want.pooled)
        assert own.tokens[0, 77:].any() == t5 and len(want.tokens[0]) == 177


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_captions_are_dropped(drop, recipe) -> None:
    """Tokens and pooled vector together become the empty prompt's."""
    asked = recipe()
    found = trainer(replace(asked, objective=replace(asked.objective, label_drop=drop)))
    batch = found.dataset.batch(list(range(6)) * 50)
    cond = found.task.inputs(0, 0, batch)[3]
    words = found.dataset.words
    empty = (cond.tokens == words[""].tokens).all(dim=(1, 2))
    assert torch.equal(empty, (cond.pooled == words[""].pooled).all(dim=1))
    own = torch.cat([words[caption].pooled for caption in batch.captions])
    assert torch.equal(cond.pooled[~empty], own[~empty])
    assert abs(float(empty.float().mean()) - drop) < 0.1  # 3.5 standard errors of 300
    assert drop not in (0, 1) or float(empty.float().mean()) == drop


def test_latents_are_shifted_and_scaled(recipe, place) -> None:
    """16 channels, (z - 0.0609) * 1.5305, drawn with one half of the noise."""
    found = trainer(recipe())
    batch = found.dataset.batch([1, 4])
    x0, level, eps, _ = found.task.inputs(0, 7, batch)
    _, noise = drawn(found.recipe.seed, 0, 7, batch.x.shape)
    assert torch.equal(eps, noise[:, :16]) and found.dataset.shape == (16, 4, 4)
    assert_near(level.t, 1000 * level.sigma, 4)
    autoencoder = load_autoencoder(place / "alone.safetensors")
    picture = Folder(found.recipe.data.path, size=32).open().batch([1, 4]).x
    mean, log_variance = autoencoder.posterior(picture)
    want = mean + torch.exp(0.5 * log_variance) * noise[:, 16:]
    assert_near(x0, (want - 0.0609) * 1.5305, 32)


def test_the_cache(recipe, place, monkeypatch) -> None:
    """A file a picture and a caption; what decides a caption's embedding makes it anew."""
    first = trainer(recipe())
    cache = sorted(Path(str(recipe().out), latents.FOLDER).iterdir())
    whole = {path: path.read_bytes() for path in cache}
    assert len(cache) == 13
    cache[0].write_bytes(whole[cache[0]][:-1] + b"?")
    cache[1].unlink()
    calls = []
    make = latents.write_safetensors
    monkeypatch.setattr(latents, "write_safetensors", lambda *a: calls.append(make(*a)))
    again = trainer(recipe())
    assert len(calls) == 2 and {path: path.read_bytes() for path in cache} == whole
    assert first.dataset.fingerprint() == again.dataset.fingerprint()
    for changes in (
        {"t5_length": 78}, {"no_t5": True}, {"text_encoders": str(place / "bundled.safetensors")},
        {"vae": str(place / "bundled.safetensors")},
    ):  # fmt: skip
        calls.clear()
        other = trainer(of(recipe(), **changes))
        same = changes.keys() & {"text_encoders", "vae"}  # the same weights, elsewhere
        assert len(calls) == (0 if same else 7), changes
        same_data = other.dataset.fingerprint() == first.dataset.fingerprint()
        assert same_data == bool(same)


def test_encoders_are_gone_before_the_network_comes(recipe, monkeypatch) -> None:
    """T5 and the network are never held together."""
    there: list[list[str]] = []
    load, read = start.load_denoiser, start.load_autoencoder

    def there_now() -> list[torch.nn.Module]:
        gc.collect()
        kinds = (CLIPText, T5Encoder, Autoencoder, MMDiT)
        large = [m for m in gc.get_objects() if type(m) in kinds]
        return [m for m in large if not next(m.parameters()).is_meta]

    before = there_now()  # other tests' models

    def held() -> list[str]:
        return sorted(type(m).__name__ for m in there_now() if all(m is not one for one in before))

    for name, made in (("load_denoiser", load), ("load_autoencoder", read)):
        monkeypatch.setattr(start, name, lambda *a, f=made: (there.append(held()), f(*a))[1])
    assert trainer(recipe()).dataset is not None
    assert there == [[], []]


# --- what it leaves -------------------------------------------------------------------------------


def test_a_lora_is_the_trained_network(recipe, place, tmp_path) -> None:
    """Merged into the base by our own reader, and beside it by diffusers and peft."""
    from diffusers import SD3Transformer2DModel

    *_, last = train(recipe())
    trained = last.average().network
    base = load_denoiser(place / "alone.safetensors").network
    before = outputs(base)
    official.make(tmp_path / "folder", "sd3.5-medium", dialect="diffusers")
    peer = SD3Transformer2DModel.from_pretrained(tmp_path / "folder" / "transformer").eval()
    peer.load_lora_adapter(
        str(tmp_path / "run"), weight_name="lora.safetensors", prefix="transformer"
    )
    assert lora.apply([(tmp_path / "run" / "lora.safetensors", 1.0)], base) == 2 * 2 + 2 + 3
    assert (outputs(base) - before).abs().max() > 0.001
    # both of networks of float32 whose weights were added up in another order
    assert_near(outputs(base), outputs(trained), 64)
    assert_near(outputs(Peer(peer)), outputs(trained), 64)
    said = json.loads(open_weights(tmp_path / "run" / "lora.safetensors").metadata["recipe"])
    assert said["finetune.lora"] == 4 and said["objective.target"] == "flow"
    assert not [value for value in said.values() if str(place) in str(value)]


class Peer:
    """diffusers' transformer, called as ours."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        found: torch.Tensor = self.network(x, cond.tokens, cond.pooled, t).sample
        return found


@pytest.mark.parametrize("model", ["alone", "bundled"])
def test_a_model_holds_what_its_base_held(model, recipe, place, tmp_path) -> None:
    *_, last = train(recipe("full", model, steps=2))
    made, encoders = tmp_path / "run" / "model.safetensors", None
    if model == "alone":
        encoders = place / "encoders"
    base = load_parts(place / f"{model}.safetensors", text_encoders=encoders)
    found = load_parts(made, text_encoders=encoders)
    assert open_weights(made).shapes == open_weights(place / f"{model}.safetensors").shapes
    assert torch.equal(outputs(found.denoiser.network), outputs(last.average().network))
    assert (outputs(found.denoiser.network) - outputs(base.denoiser.network)).abs().max() > 0.01
    assert found.denoiser.row == base.denoiser.row
    assert latents.hash_of(found.autoencoder) == latents.hash_of(base.autoencoder)
    for mine, other in zip(found.text, base.text, strict=True):
        assert latents.hash_of(mine) == latents.hash_of(other)


# --- exactly --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "precision"),
    [("full", "fp32"), ("lora", "bf16"), pytest.param("full", "bf16", marks=LONG)],
)
def test_a_resumed_run_is_the_same(how, precision, recipe, digest, tmp_path, monkeypatch) -> None:
    asked = recipe(how, save_every=1, precision=precision, checkpointing=how == "lora")
    whole = [digest(report) for report in train(asked)]
    ends = [hashlib.sha256(file.read_bytes()).digest() for file in files(tmp_path / "run")]
    assert len(set(whole)) == 4 and len(ends) == 1
    for path in (*files(tmp_path / "run"), *(tmp_path / "run" / "checkpoints").glob("*[34]")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(Autoencoder, "posterior", None)  # nothing is encoded again
    monkeypatch.setattr(CLIPText, "forward", None)
    monkeypatch.setattr(T5Encoder, "forward", None)
    assert [digest(report) for report in train(asked, asked.out)] == whole[2:]
    assert [hashlib.sha256(f.read_bytes()).digest() for f in files(tmp_path / "run")] == ends


def test_masters_are_in_fp32(recipe, trainer_of) -> None:
    """In bf16 the products are, and what the encoders said; weights and their average are not."""
    report = next(train(replace(recipe("full", precision="bf16"), out=None)))
    found = trainer_of(report)
    assert {p.dtype for p in found.network.parameters()} == {torch.float32}
    assert {a.dtype for a in found.state.average} == {torch.float32}
    assert found.dataset.words[RED].tokens.dtype == torch.bfloat16
    assert found.dataset.moments.dtype == torch.float32


def test_recomputing_and_accumulating(recipe) -> None:
    """Checkpointing changes not a bit; two and two at once nothing but the order of sums."""
    one, two, three = (
        [report.loss for report in train(replace(recipe(**how), out=None))]
        for how in ({}, {"checkpointing": True}, {"micro_batch": 2})
    )
    assert one == two
    assert_near(one, three, 64, eps=SHORT)


def test_auto_batch_size(recipe) -> None:
    assert trainer(replace(recipe(batch_size="auto"), out=None)).batch == 4  # of six pictures


def test_two_ranks_are_one_process(recipe, tmp_path, one_thread) -> None:
    """FSDP2 on gloo, whole and LoRA, against two halves that one process accumulates."""
    cases, alone = {}, {}
    for how in ("full", "lora"):
        one = replace(recipe(how, micro_batch=2, clip=0.05, steps=3), out=str(tmp_path / how))
        alone[how] = rank.run(plain(one))
        ranks = replace(one, run=replace(one.run, micro_batch=None, strategy="fsdp"))
        cases[how] = plain(replace(ranks, out=str(tmp_path / f"{how}_fsdp")))
    code, found, error = torchrun.launch(SCRIPT, tmp_path, cases)
    assert code == 0, error
    assert found == alone


# --- mistakes -------------------------------------------------------------------------------------


def refused(recipe: Recipe, pattern: str) -> None:
    with pytest.raises((ValueError, OSError), match=pattern) as error:
        next(train(recipe))
    assert "\n" not in str(error.value)
    assert recipe.out is None or not Path(recipe.out).exists()


def test_mistakes(recipe, place, tmp_path) -> None:
    asked = recipe()
    refused(of(asked, text_encoders=None), "finetune.text_encoders: .* holds none; name a place")
    refused(of(asked, text_encoder=asked.finetune.model), "text_encoder: Stable Diffusion 3 has th")
    refused(
        replace(asked, data=replace(asked.data, size=40)), "data.size: must be a multiple of 16"
    )
    refused(replace(asked, data=replace(asked.data, size=512)), "data.size: .* at most 256 pixels")
    bare = tmp_path / "encoders"
    bare.mkdir()
    for name in ("clip_l", "clip_g"):
        shutil.copy(place / "encoders" / f"{name}.safetensors", bare)
    refused(of(asked, text_encoders=str(bare)), "holds no T5: .* --no-t5")
    everything = of(asked, text_encoders=str(bare), no_t5=True)
    assert next(train(replace(everything, out=None))).step == 1


def test_mistakes_of_another_family(recipe, place, tmp_path) -> None:
    official.make(tmp_path / "sd1.safetensors", "sd1")
    other = of(recipe(), model=str(tmp_path / "sd1.safetensors"), t5_length=256)
    refused(other, "text_encoders: only for Stable Diffusion 3")
    refused(of(other, text_encoders=None, no_t5=True), "no_t5: only for Stable Diffusion 3")
    refused(of(other, text_encoders=None, t5_length=77), "finetune.t5_length: only for Stable Diff")
