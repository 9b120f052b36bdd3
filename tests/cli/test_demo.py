"""`demo`, and `generate` without a model's name, on a tiny text-to-image model that we ship."""

from dataclasses import replace
from pathlib import Path

import encoders
import pytest
from PIL import Image

from minidiffusion.checkpoints.catalog import Sampling
from minidiffusion.cli import demo
from minidiffusion.cli.generate import usual_model
from minidiffusion.cli.main import main
from minidiffusion.data.pictures import read_metadata
from minidiffusion.pipelines import load
from minidiffusion.training.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shipped")
    encoders.written(place)
    recipe = replace(encoders.through(place, place / "run", steps=2), sampling=Sampling(steps=3))
    list(train(recipe, dataset=encoders.captioned()))
    return place / "run" / "model.safetensors"


@pytest.fixture(autouse=True)
def shipped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.SHIPPED, "emoji", model)
    monkeypatch.chdir(tmp_path)


def test_four_pictures_and_their_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:3])
    assert main(["demo", "--out", "drawn", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    names = ("prompts", "strip", "img2img", "inpaint")
    assert {path.name for path in Path("drawn").iterdir()} == {f"{name}.png" for name in names}
    for name in names:
        assert f"drawn/{name}.png" in said
        with Image.open(f"drawn/{name}.png") as picture:
            assert picture.mode == "RGB" and min(picture.size) > 16
            assert len(picture.getcolors(10**6) or []) > 20
    assert said.count(" s  ") == 8 and "for 3 prompts at once" in said
    before = Path("drawn/prompts.png").read_bytes()
    assert main(["demo", "--out", "again", "--seed", "3"]) == 0
    assert Path("again/prompts.png").read_bytes() == before


def test_a_model_that_demo_cannot_show(shelf: Path, refused) -> None:
    said = refused("demo", "--model", shelf / "pictures", "--out", "drawn")
    assert said == f"{shelf / 'pictures'}: demo wants a model of words and latents"
    assert "none.safetensors" in refused("demo", "--model", "none.safetensors", "--out", "drawn")


def test_the_usual_model_is_the_one_that_ships(refused) -> None:
    """Where nothing was downloaded; one that was comes first, and of two none is usual."""
    assert usual_model() == "emoji"
    Path("models").mkdir()
    Path("models/.part").write_text("")
    assert usual_model() == "emoji"
    Path("models/a.safetensors").write_text("")
    assert usual_model() == "models/a.safetensors"
    Path("models/b.safetensors").write_text("")
    said = refused("generate", "a cat")
    assert said == "--model: which one? models/ holds 2; emoji is the one that ships"


def test_generate_without_a_model(model: Path) -> None:
    assert main(["generate", "bee 1", "--steps", "2", "--device", "cpu"]) == 0
    assert main(["generate", "bee 1", "--steps", "2", "--device", "cpu", "--model", "emoji"]) == 0
    files = [Path(f"out/000{number}.png") for number in (1, 2)]
    pixels = [Image.open(file).tobytes() for file in files]
    assert pixels[0] == pixels[1]
    facts = read_metadata(files[0])
    assert "emoji" in str(facts)
    assert main(["regenerate", str(files[0]), "--device", "cpu"]) == 0
