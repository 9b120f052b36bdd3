"""`generate` and `regenerate`, run as a user runs them, on a tiny model in the official layout."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any
from unittest.mock import Mock

import numpy as np
import official
import pytest
import torch
from emoji_like import write_model
from PIL import Image

import minidiffusion
from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints import official as official_files
from minidiffusion.checkpoints.reader import read_metadata as read_file_metadata
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.cli import generate as verb
from minidiffusion.cli import prompts
from minidiffusion.cli.generate import save_numbered
from minidiffusion.cli.main import main
from minidiffusion.cli.progress import Progress
from minidiffusion.data.parameters import read_parameters
from minidiffusion.data.pictures import read_metadata
from minidiffusion.layers.lora import adapt
from minidiffusion.models import Autoencoder, UNet
from minidiffusion.pipelines.settings import KEY, Settings, read_settings

QUICK = ("--steps", "2", "--width", "64", "--height", "48")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pictures and what people mistake for them."""
    root = tmp_path_factory.mktemp("place")
    official.make(root / "sd1.safetensors", "sd1")
    official.make(root / "painter.safetensors", "sd1-inpaint")
    official.make(root / "parts", "sd1", dialect="parts")
    official.make(root / "sd3.safetensors", "sd3.5-medium", alone=True)
    official.make(root / "encoders", "sd3.5-medium", dialect="parts")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / "room.png")
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[8:32, 8:40] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(mask[:24]).save(root / "small.png")
    (root / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    (root / "cut.safetensors").write_bytes((root / "sd1.safetensors").read_bytes()[:-1000])
    (root / "empty.safetensors").touch()
    (root / "prompts.txt").write_text("a cat\n\n  a dog \n", "utf-8")
    (root / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "blank.txt").write_text("\n \n")
    (root / "file").write_text("mine")
    os.mkfifo(root / "pipe")
    (root / "clips").mkdir()
    for name in ("clip_l.safetensors", "clip_g.safetensors"):
        (root / "clips" / name).symlink_to(root / "encoders" / name)
    return root


def generate(place: Path, out: Path, *words: object, model: str = "sd1.safetensors") -> list[Path]:
    there = set(out.glob("*.png"))
    call = ["generate", *words, "--model", place / model, "--out", out, *QUICK]
    assert main([str(word) for word in call]) == 0
    return sorted(set(out.glob("*.png")) - there)


def test_a_prompt_becomes_a_picture_with_its_recipe(place: Path, tmp_path: Path) -> None:
    (made,) = generate(place, tmp_path, "a cat, in the rain", "--seed", 7, "--negative", "blurry")
    facts = read_parameters(read_metadata(made)["parameters"])
    assert (facts.prompt, facts.negative_prompt) == ("a cat, in the rain", "blurry")
    assert (facts.steps, facts.sampler, facts.spacing) == (2, "dpmpp_2m", "karras")
    assert (facts.seed, facts.width, facts.height, facts.guidance_scale) == (7, 64, 48, 7.5)
    digest = hashlib.sha256((place / "sd1.safetensors").read_bytes()).hexdigest()
    assert (facts.model, facts.model_hash) == ("sd1", digest[:10])
    assert facts.version == f"minidiffusion {minidiffusion.__version__}"
    with Image.open(made) as picture:
        assert picture.size == (64, 48)


def test_python_draws_the_same_pixels(place: Path, tmp_path: Path) -> None:
    (made,) = generate(place, tmp_path, "a cat", "--seed", 3)
    pipe = minidiffusion.load(place / "sd1.safetensors")
    again = pipe.generate("a cat", seed=3, num_steps=2, width=64, height=48)[0]
    with Image.open(made) as picture:
        assert again.tobytes() == picture.tobytes()


WAYS: dict[str, list[object]] = {
    "words": ["a cat", "--sampler", "euler_ancestral", "--guidance", 3, "--rescale", 0.5],
    "a batch": ["a cat", "--num-images", 3, "--batch-size", 2, "--guidance-interval", 100, 900],
    "long words": ["cat " * 90, "--long-prompts", "chunks", "--weighting", "a1111"],
    "a picture": ["a cat", "--init-image", "room.png", "--sampler", "ddim"],
    "a mask": ["a cat", "--init-image", "room.png", "--mask", "mask.png", "--tile", 8],
    "fp32": ["a cat", "--precision", "fp32", "--offload"],
}


@pytest.mark.parametrize("words", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("model", ["sd1.safetensors", "painter.safetensors"])
def test_a_picture_comes_again_to_the_byte(
    place: Path, tmp_path: Path, words: list[object], model: str
) -> None:
    words = [place / str(word) if str(word).endswith(".png") else word for word in words]
    for number, made in enumerate(generate(place, tmp_path, *words, model=model)):
        again = tmp_path / f"again{number}.png"
        assert main(["regenerate", str(made), "--out", str(again)]) == 0
        assert again.read_bytes() == made.read_bytes()


def test_a_slow_precision_is_said_and_comes_again(
    place: Path, tmp_path: Path, slow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (made,) = generate(place, tmp_path, "a cat", "--precision", "bf16", "--device", "cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["minidiffusion: warning: bf16: slow on this cpu; weights stay so, each layer "
                     "computes in fp32"]  # fmt: skip
    assert read_settings(read_metadata(made), str(made)).precision == "bf16"
    again = tmp_path / "again.png"
    assert main(["regenerate", str(made), "--out", str(again)]) == 0
    assert again.read_bytes() == made.read_bytes()
    capsys.readouterr()
    generate(place, tmp_path, "a cat", "--device", "cpu")
    assert "slow" not in capsys.readouterr().err


FLOWS: dict[str, list[object]] = {
    "words": ["a red panda", "--guidance", 4.5, "--slg", "--slg-layers", 0],
    "four steps": ["a cat", "--steps", 4, "--guidance", 1, "--sampler", "euler", "--no-t5",
                   "--quantize", "int8", "--offload"],
    "a long ladder": ["a cat", "--cfg-zero", "--shift", 2, "--dynamic-shift", "--t5-length", 77],
    "a frozen ladder": ["a cat", "--freeze-ladder", "--num-images", 2, "--batch-size", 2],
    "a mask": ["a cat", "--init-image", "room.png", "--mask", "mask.png"],
}  # fmt: skip


@pytest.mark.parametrize("words", FLOWS.values(), ids=list(FLOWS))
def test_stable_diffusion_3_draws_and_comes_again(
    place: Path, tmp_path: Path, words: list[object]
) -> None:
    words = [place / str(word) if str(word).endswith(".png") else word for word in words]
    words += ["--text-encoders", place / "encoders"]
    made = generate(place, tmp_path, *words, model="sd3.safetensors")
    facts = read_parameters(read_metadata(made[0])["parameters"])
    assert (facts.model, facts.width, facts.height) == ("sd3", 64, 48)
    for number, one in enumerate(made):
        again = tmp_path / f"again{number}.png"
        assert main(["regenerate", str(one), "--out", str(again)]) == 0
        assert again.read_bytes() == one.read_bytes()


def test_a_moved_model_is_named(place: Path, tmp_path: Path, refused: Any) -> None:
    (made,) = generate(place, tmp_path, "a cat")
    other = official.make(tmp_path / "moved.safetensors", "sd1")
    assert main(["regenerate", str(made), "--model", str(other)]) == 0
    assert made.with_name("0001-again.png").read_bytes() == made.read_bytes()
    line = refused("regenerate", made, "--model", other)
    assert line.startswith(f"{tmp_path}/0001-again.png: exists already")
    line = refused("regenerate", made, "--model", place / "painter.safetensors", "--force")
    assert "its hash is" in line and "--model names another file" in line


def test_a_changed_picture_is_not_taken_for_the_old_one(
    place: Path, tmp_path: Path, refused: Any
) -> None:
    room = tmp_path / "room.png"
    room.write_bytes((place / "room.png").read_bytes())
    (made,) = generate(place, tmp_path / "out", "a cat", "--init-image", room)
    room.write_bytes((place / "mask.png").read_bytes())
    assert f"not the pictures that {made} was drawn from" in refused("regenerate", made)


def test_prompts_from_a_file(place: Path, tmp_path: Path) -> None:
    words = ("--from-file", place / "prompts.txt", "--num-images", 2, "--batch-size", 3)
    made = generate(place, tmp_path, *words)
    settings = [json.loads(read_metadata(path)[KEY]) for path in made]
    assert [(one["prompt"], one["seed"]) for one in settings] == [
        ("a cat", 0), ("a cat", 1), ("a dog", 2), ("a dog", 3)
    ]  # fmt: skip
    assert [(one["row"], one["rows"]) for one in settings] == [(0, 3), (1, 3), (2, 3), (0, 1)]


def picture_of(path: Path) -> Settings:
    return read_settings(read_metadata(path), str(path))


def test_the_first_of_a_million_prompts_does_not_wait_for_the_last(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is done for a prompt before its turn comes, however many there are."""
    listing = tmp_path / "prompts.txt"
    listing.write_text("".join(f"a cat number {n}\n" for n in range(100_000)))
    made: list[int] = []
    init = Settings.__post_init__
    monkeypatch.setattr(Settings, "__post_init__", lambda s: (made.append(1), init(s))[1])
    save, saved = verb.save_numbered, []

    def stop_after_three(*words: Any) -> Path:
        saved.append(save(*words))
        if len(saved) == 3:
            raise KeyboardInterrupt
        return saved[-1]

    monkeypatch.setattr(verb, "save_numbered", stop_after_three)
    call = ["generate", "--from-file", listing, "--model", place / "sd1.safetensors", "--out",
            tmp_path / "out", "--batch-size", 2, "--long-prompts", "chunks", *QUICK]  # fmt: skip
    assert main([str(word) for word in call]) == 130
    assert [picture_of(path).prompt for path in saved] == [f"a cat number {n}" for n in range(3)]
    assert len(made) < 50


def test_a_file_of_prompts_is_read_once_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces, the prompts are the lines of the whole, in their order."""
    text = "\ufeffa cat\r\n\n  a \u2028dog\x0bb \r\n\u00e9t\u00e9 \U0001f600\nlast"
    listing = tmp_path / "prompts.txt"
    listing.write_bytes(text.encode())
    expected = ["a cat", "a \u2028dog\x0bb", "\u00e9t\u00e9 \U0001f600", "last"]  # a file's lines
    for size in (1, 2, 3, 5, 7, 1000):
        monkeypatch.setattr(prompts, "PIECE", size)
        found = prompts.PromptFile(listing, Settings("emoji"))
        listing.unlink()  # it may change or go: the prompts are those that were read
        assert len(found) == len(expected) and [*found] == [*found] == expected
        listing.write_bytes(text.encode())


BAD_LINES = {
    "not UTF-8": (b"caf\xe9", "not UTF-8 text: line 30001"),
    "NUL": (b"a\0cat", "line 30001: metadata 'parameters': holds the character NUL"),
    "long": (b"cat " * 1_000_000, "line 30001: metadata: "),
    "longer": (b"cat " * 3_000_000, "line 30001: more than 8000000 bytes"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_deep_in_a_file_is_found_before_anything_is_drawn(
    tmp_path: Path, line: bytes, message: str, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "opened", None)
    listing = tmp_path / "prompts.txt"
    listing.write_bytes(b"a cat\r\n" * 30_000 + line + b"\na dog\n")
    said = refused("generate", "--from-file", listing, "--out", tmp_path / "out")
    assert said.startswith(f"{listing}: {message}")
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 10_000)
    said = refused("generate", "--from-file", listing, "--out", tmp_path / "out")
    assert said == f"{listing}: more than 10000 bytes of prompts"


def test_the_progress_ends_where_it_should(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other lengths are drawn apart: the total is of pictures, not of batches."""
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(Progress, "_show", lambda p, done: shown.append((done, p.total)))
    (tmp_path / "prompts.txt").write_text("a cat\n" + "cat " * 90 + "\na dog\na bird\n")
    words = ("--from-file", tmp_path / "prompts.txt", "--batch-size", 2, "--num-images", 2)
    assert len(generate(place, tmp_path, *words, "--long-prompts", "chunks")) == 8
    assert [total for _, total in shown] == [16] * len(shown)
    done = [done for done, _ in shown]
    assert done == sorted(done) and done[-1] == 16


EXACT_WAYS: dict[str, list[object]] = {
    "words": ["--sampler", "euler_ancestral", "--guidance", 3],
    "a mask": ["--init-image", "room.png", "--mask", "mask.png"],
}


@pytest.mark.parametrize("words", EXACT_WAYS.values(), ids=list(EXACT_WAYS))
def test_exact_pictures_are_those_drawn_alone(
    place: Path, tmp_path: Path, words: list[object]
) -> None:
    """To the byte of the file, what it says of itself included."""
    words = [place / str(word) if str(word).endswith(".png") else word for word in words]
    many = ("--from-file", place / "prompts.txt", "--num-images", 2, "--batch-size", 4, "--seed", 5)
    together = generate(place, tmp_path / "together", *many, "--exact", *words)
    for number, (made, prompt) in enumerate(
        zip(together, ["a cat", "a cat", "a dog", "a dog"], strict=True)
    ):
        (alone,) = generate(place, tmp_path / "alone", prompt, "--seed", 5 + number, *words)
        assert alone.read_bytes() == made.read_bytes()
        assert (picture_of(made).row, picture_of(made).rows) == (0, 1)


def test_a_picture_with_a_lora_comes_again_to_the_byte(place: Path, tmp_path: Path) -> None:
    pipe = minidiffusion.load(place / "sd1.safetensors", dtype=torch.float32)
    adapters = adapt(pipe.network, 2, 2.0)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.up, std=0.3)
    file = tmp_path / "style.safetensors"
    lora.save(adapters, pipe.network, file)
    words = ["a cat", "--init-image", place / "room.png", "--mask", place / "mask.png"]
    (plain,) = generate(place, tmp_path, *words)
    (made,) = generate(place, tmp_path, *words, "--lora", f"{file}:0.7")
    assert Image.open(plain).tobytes() != Image.open(made).tobytes()
    assert main(["regenerate", str(made), "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("call", ["forward", "decode"])
def test_memory_that_runs_out_costs_no_picture(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The command's loop is the pipeline's: the parts take turns, the batch begins again."""
    words = ["a cat", "--num-images", 3, "--batch-size", 2]
    usual = generate(place, tmp_path / "usual", *words)
    kind, calls = (UNet, "forward") if call == "forward" else (Autoencoder, "decode"), []
    real = getattr(*kind)

    def short(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) in ((1,) if call == "forward" else (1, 2)):
            raise RuntimeError("CUDA out of memory")
        return real(self, *given)

    monkeypatch.setattr(*kind, short)
    shown: list[int] = []
    monkeypatch.setattr(Progress, "_show", lambda p, done: shown.append(done))
    made = generate(place, tmp_path / "short", *words)
    assert [one.read_bytes() for one in made] == [one.read_bytes() for one in usual]
    assert capsys.readouterr().err.count("the parts take turns on the device") == 1
    assert shown == sorted(shown) and shown[-1] == 6
    calls.clear()
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "one.png"
    assert main(["regenerate", str(made[0]), "--out", str(again)]) == 0
    assert again.read_bytes() == usual[0].read_bytes()


def test_pictures_are_numbered_on(place: Path, tmp_path: Path) -> None:
    (tmp_path / "0007.png").write_text("mine")
    made = generate(place, tmp_path, "a cat", "--num-images", 2)
    assert [path.name for path in made] == ["0008.png", "0009.png"]
    assert (tmp_path / "0007.png").read_text() == "mine"


def test_numbers_are_taken_once(tmp_path: Path) -> None:
    """Programs that draw into one folder at the same time lose nothing to each other."""

    def save(i: int) -> Path:
        return save_numbered(Image.new("RGB", (8, 8)), tmp_path, {"i": str(i)})

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(save, range(64)))
    assert sorted(path.name for path in made) == [f"{i:04d}.png" for i in range(1, 65)]
    assert [read_metadata(path)["i"] for path in made] == [str(i) for i in range(64)]


def test_a_picture_that_cannot_be_written_leaves_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="NUL"):
        save_numbered(Image.new("RGB", (8, 8)), tmp_path, {"a": "\0"})
    full = OSError(ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "hardlink_to", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left on device: .*0001.png"):
        save_numbered(Image.new("RGB", (8, 8)), tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_run_of_our_own_draws_its_classes(shelf: Path, tmp_path: Path) -> None:
    call = ["generate", "bag", "--model", str(shelf / "pictures"), "--out", str(tmp_path)]
    assert main(call) == 0
    again = tmp_path / "again.png"
    assert main(["regenerate", str(tmp_path / "0001.png"), "--out", str(again)]) == 0
    assert again.read_bytes() == (tmp_path / "0001.png").read_bytes()


def test_the_only_model_there_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    """Without one it is that which ships, see test_demo."""
    monkeypatch.chdir(tmp_path)
    official.make(tmp_path / "models" / "v1-5-pruned-emaonly.safetensors", "sd1")
    assert main(["generate", "a cat", *QUICK]) == 0
    assert main(["generate", "a cat", "--model", "sd1.5", *QUICK]) == 0
    assert main(["regenerate", "out/0002.png"]) == 0
    line = refused("generate", "a cat", "--model", "sd1.4")
    assert line == "models/sd-v1-4.ckpt: not there yet: minidiffusion download sd1.4"


MISTAKES: dict[str, tuple[str, str]] = {
    "nothing to draw": ("", "generate: give a prompt, or --from-file"),
    "two prompts": ("cat --from-file prompts.txt", "generate: give a prompt, or --from-file"),
    "not UTF-8": ("--from-file latin.txt", "latin.txt: not UTF-8 text"),
    "no prompts": ("--from-file blank.txt", "blank.txt: holds no prompts"),
    "no file": ("--from-file none.txt", "none.txt: No such file"),
    "no model": ("cat --model none.safetensors", "none.safetensors: no such file"),
    "a page": ("cat --model page.safetensors", "this is a web page, not a model"),
    "cut short": ("cat --model cut.safetensors", "cut short"),
    "empty": ("cat --model empty.safetensors", "the file is empty"),
    "a picture": ("cat --model room.png", "room.png: "),
    "parts": ("cat --model parts/unet.safetensors", "holds no autoencoder: name one with --vae"),
    "no words": (
        "cat --model parts/unet.safetensors --vae sd1.safetensors",
        "holds no text encoder: name one with --text-encoder",
    ),
    "vae for unet": ("cat --model parts/vae.safetensors", "an autoencoder, not a denoiser"),
    "unet for vae": ("cat --vae parts/unet.safetensors", "a denoiser, not an autoencoder"),
    "lora": ("cat --lora sd1.safetensors", "sd1.safetensors"),
    "no lora": ("cat --lora none.safetensors:0.5", "none.safetensors: no such file"),
    "width": ("cat --width 0", "width: must be at least 8, got 0"),
    "wide": ("cat --width 65536", "width: must be at most 4096, got 65536"),
    "odd": ("cat --height 65", "height: must be a multiple of 8 in 8..4096, got 65"),
    "steps": ("cat --steps 1001", "steps: must be at most 1000, got 1001"),
    "guidance": ("cat --guidance nan", "guidance: expected a number, got nan"),
    "sampler": ("cat --sampler huen", "sampler: unknown 'huen' (did you mean heun?)"),
    "spacing": ("cat --spacing karas", "spacing: unknown 'karas' (did you mean karras?)"),
    "strength": ("cat --init-image room.png --strength 1.5", "strength: must be at most 1"),
    "nothing to change": ("cat --strength 0.5", "strength: only with init_image"),
    "nothing to paint": ("cat --mask mask.png", "mask: only with init_image"),
    "small mask": ("cat --init-image room.png --mask small.png", "mask: 64 x 24, but the picture"),
    "no picture": ("cat --init-image none.png", "none.png: No such file"),
    "no picture at all": ("cat --init-image file", "file: none of PNG"),
    "depth": ("cat --depth mask.png", "depth: not for this model"),
    "fit": ("cat --init-image room.png --fit stretch", "fit: unknown 'stretch'"),
    "prediction": ("cat --prediction w", "prediction: unknown 'w'; allowed: eps, v"),
    "ema": ("cat --ema", "holds no averaged weights"),
    "precision": ("cat --precision fp16", "precision: unknown 'fp16'"),
    "device": ("cat --device tpu", "device: 'tpu' is not on this machine"),
    "images": ("cat --num-images 0", "--num-images: must be 1..100000, got 0"),
    "more": (
        "cat --num-images 1000000000000",
        "must be 1..100000, got 1000000000000",
    ),
    "batch": ("cat --batch-size 0", "--batch-size: must be 1..100000, got 0"),
    "endless": ("--from-file /dev/zero", "/dev/zero: line 1: more than 8000000 bytes"),
    "a device": ("cat --init-image /dev/zero", "/dev/zero: a device or a pipe, not a file"),
    "a pipe": ("cat --init-image room.png --mask pipe", "pipe: a device or a pipe, not a file"),
    "nowhere": ("cat --out /proc/x", "/proc: cannot be written to"),
    "beyond": ("cat --guidance 1e308 --width 8 --height 8 --steps 1", "not finite"),
    "option": ("cat --step 3", "unknown argument: --step (did you mean --steps?)"),
    "a file as out": ("cat --out file", "file: not a folder"),
    "tile": ("cat --tile 4", "tile: must be at least 8, got 4"),
    "encoders": ("cat --model sd3.safetensors", "holds no CLIP text encoders"),
    "no T5": ("cat --model sd3.safetensors --text-encoders clips", "go on with --no-t5"),
    "a wrong encoder": (
        "cat --model sd3.safetensors --text-encoders encoders/t5xxl_fp16.safetensors",
        "holds no CLIP text encoders",
    ),
    "sixteen": (
        "cat --model sd3.safetensors --text-encoders encoders --width 72",
        "width: must be a multiple of 16 in 16..256, got 72",
    ),
    "three": (
        "cat --model sd3.safetensors --text-encoder encoders",
        "three: --text-encoders FOLDER",
    ),
    "not here": ("cat --slg", "slg: only for Stable Diffusion 3"),
    "no layer": (
        "cat --model sd3.safetensors --text-encoders encoders --slg 2 --slg-layers 2",
        "slg_layers: 2: this network has the layers 0..1",
    ),
    "layers alone": ("cat --slg-layers 0", "--slg-layers: only with --slg"),
    "another target": (
        "cat --model sd3.safetensors --text-encoders encoders --prediction v",
        "prediction: Stable Diffusion 3 predicts flow",
    ),
    "no weights for words": (
        "cat --model sd3.safetensors --text-encoders encoders --weighting a1111",
        "weighting: not for Stable Diffusion 3",
    ),
    "no ladder to freeze": ("cat --freeze-ladder", "freeze_ladder: only for Stable Diffusion 3"),
    "no flow": ("cat --dynamic-shift", "shift: only for rectified flows"),
    "a falling interval": ("cat --guidance-interval 9 8", "guidance_interval: must not fall"),
    "another's lora": ("cat --lora sd3.safetensors", "sd3.safetensors: not a LoRA"),
    "bits": ("cat --quantize int4", "quantize: unknown 'int4'"),
    "much T5": ("cat --t5-length 9", "t5_length: must be at least 77, got 9"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_gets_one_line_and_writes_nothing(
    place: Path, words: str, message: str, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    if message != "not finite":  # all else is said before a weight is read
        monkeypatch.setattr(official_files, "joined", None)
    call = words.split()
    if "--model" not in call:
        call += ["--model", "sd1.safetensors"]
    assert message in refused("generate", *call)
    assert sorted(place.rglob("*")) == before


def test_a_damaged_model_leaves_no_picture(shelf: Path, tmp_path: Path, refused: Any) -> None:
    bad = tmp_path / "bad.safetensors"
    ours = write_model(tmp_path / "model.safetensors")
    for source, words in (
        (ours, ("generate", "a cat", "--model", bad)),
        (shelf / "pictures" / "model.safetensors", ("sample", bad)),
    ):
        weights = {name: one.clone() for name, one in read_safetensors(source).items()}
        weights["leave.bias"][...] = np.nan
        write_safetensors(weights, bad, read_file_metadata(source))
        line = refused(*words, "--out", tmp_path / "out.png", "--device", "cpu")
        assert line.startswith("network.leave.bias: numbers that are not finite at step 1 of ")
        assert not (tmp_path / "out.png").exists()


def test_an_error_does_not_wait_for_the_hash(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    hashed = Event()
    monkeypatch.setattr(verb, "model_hash", lambda model: str(hashed.wait(30)))
    words = "--guidance", "1e308", "--steps", "1", "--width", "8", "--height", "8"
    call = "generate", "cat", "--model", place / "sd1.safetensors", "--out", tmp_path, *words
    began = monotonic()
    assert "not finite" in refused(*call)
    assert monotonic() - began < 25
    hashed.set()


HOSTILE = {"surrogate": "a \ud800 cat", "a million letters": "cat " * 250_000, "nul": "a\0cat"}


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_prompts(
    place: Path, tmp_path: Path, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn, or refused in one line; a drawn one stands in its picture to the letter."""
    out = tmp_path / "out"
    call = ["generate", prompt, "--model", str(place / "sd1.safetensors"), "--out", str(out)]
    try:
        main([*call, *QUICK])
    except SystemExit as end:
        err = capsys.readouterr().err
        assert end.code == 2 and err.count("\n") == 1 and len(err) < 2100
        assert not list(tmp_path.iterdir())  # no folder either: it is refused before any work
    else:
        err = capsys.readouterr().err
        assert ("cut off" in err) == (len(prompt) > 1000) and err.count("\n") == bool(err)
        found = read_metadata(out / "0001.png")
        assert json.loads(found[KEY])["prompt"] == prompt
        assert read_parameters(found["parameters"]).prompt == prompt


DAMAGED = {
    "no settings": ({}, "holds no settings of minidiffusion"),
    "no JSON": ({KEY: "{"}, "its settings are no JSON"),
    "a list": ({KEY: "[]"}, "its settings are no block of keys"),
    "unknown": ({KEY: '{"model": "x", "seeds": 3}'}, "seeds: unknown key (did you mean seed?)"),
    "rows": ({KEY: '{"model": "x", "row": 3}'}, "row: must be below rows = 1"),
    "deep": ({KEY: "[" * 100_000}, "its settings are no JSON"),
    "endless": (
        {KEY: '{"model": "x", "init_image": "/dev/zero"}'},
        "/dev/zero: a device or a pipe, not a file",
    ),
}


@pytest.mark.parametrize(("texts", "message"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_recipe(
    tmp_path: Path, texts: dict[str, str], message: str, refused: Any
) -> None:
    from minidiffusion.data.pictures import save_png

    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", texts)
    assert message in refused("regenerate", tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_verbs_for_runs_say_which_verb_draws_from_words(
    place: Path, verb: str, refused: Any
) -> None:
    line = refused(verb, place / "sd1.safetensors")
    assert line.endswith("no run but a Stable Diffusion model: generate draws from it")
