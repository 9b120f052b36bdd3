"""The notebook and the examples of the Stable Diffusion chapters run, on tiny random models."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
import nbformat
import official
import pytest
import torch
from rounding import assert_near

from minidiffusion.cli.main import parser
from minidiffusion.layers.attention import Attention
from minidiffusion.models import Autoencoder, CLIPText, UNet, hollow
from minidiffusion.shapes import Cond

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "notebooks" / "three_parts.py"
CHAPTERS = sorted((DOCS / "stable-diffusion").glob("*.md"))
FIGURES = ["attention", "denoising", "embeddings", "guidance", "latent", "schedule", "strength"]
README = DOCS.parent / "README.md"
FILE = "v1-5-pruned-emaonly.safetensors"
MODELS = {
    FILE: "sd1",
    "sd-v1-5-inpainting.ckpt": "sd1-inpaint",
    "512-depth-ema.safetensors": "sd2-depth",
    "sd3.5_medium.safetensors": "sd3.5-medium",
}
FLAGS = re.MULTILINE | re.DOTALL
PYTHON = re.compile(r"^```python\n(?!# minidiffusion/)(.*?)^```$", FLAGS)


def cells(kind: str) -> list[str]:
    return [cell.source for cell in jupytext.read(NOTEBOOK).cells if cell.cell_type == kind]


def test_it_converts_to_a_valid_notebook_and_back() -> None:
    notebook = jupytext.read(NOTEBOOK)
    nbformat.validate(notebook)
    again = jupytext.reads(jupytext.writes(notebook, "ipynb"), "ipynb")
    assert [c.source for c in again.cells] == [c.source for c in notebook.cells]
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and set(kinds) == {"markdown", "code"}


def test_its_cells_open_the_parts_in_the_order_of_the_data() -> None:
    heads = re.findall(r"^## (\d)\. (.+)$", "\n".join(cells("markdown")), re.MULTILINE)
    assert [int(number) for number, _ in heads] == list(range(1, 9))
    names = " ".join(name for _, name in heads).lower()
    order = ["tokens", "embeddings", "noise", "latent", "denoising", "word", "guidance", "picture"]
    places = [names.rindex(word) if word == "picture" else names.index(word) for word in order]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What every cell has left behind, run one after another."""
    folder = tmp_path_factory.mktemp("notebook")
    model = official.make(folder / "sd1", dialect="diffusers")
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL", str(model))
        patch.setenv("FIGURES", str(folder))
        for number, code in enumerate(cells("code")):
            exec(compile(code, f"cell {number} of {NOTEBOOK.name}", "exec"), names)
    yield names
    matplotlib.use(backend)


def test_every_cell_runs_and_draws(ran: dict[str, Any]) -> None:
    found = sorted(Path(ran["FIGURES"]).glob("*.png"))
    assert [path.stem for path in found] == FIGURES
    assert all(path.stat().st_size > 10_000 for path in found)
    assert torch.is_grad_enabled()


def test_the_maps_share_out_every_place(ran: dict[str, Any]) -> None:
    places = sorted(place for group in ran["GROUPS"].values() for place in group)
    assert places == list(range(77))
    assert list(ran["GROUPS"])[1:-1] == ran["PROMPT"].split()
    assert_near(ran["mean"].sum(dim=0), torch.ones(()), 77)  # a sum of 77 shares
    assert ran["mean"].std() > 1e-4, "a map that is flat says nothing"


def test_the_weights_are_those_that_the_layer_used(ran: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, kept = Attention(32, 1, 16), []
    x, context = torch.randn(1, 5, 32), torch.randn(1, 77, 16)
    hook = ran["listen"](layer, kept)
    out = layer(x, context)
    hook.remove()
    layer(x, context)
    assert len(kept) == 1
    values = layer.kv(context).chunk(2, dim=-1)[1]
    assert_near(layer.out(kept[0] @ values[0]), out[0], 16)


def test_the_layers_are_those_of_the_prompt_and_no_hook_stays(ran: dict[str, Any]) -> None:
    layers = [m for m in ran["pipe"].network.modules() if isinstance(m, Attention)]
    assert not any(layer._forward_hooks for layer in layers)
    x, level = ran["steps"][3].x, ran["steps"][3].level
    other = ran["attention"](x, level, ran["pipe"].condition("a loaf of bread"))
    assert (other - ran["maps"][2]).abs().max() > 1e-4


def test_guidance_by_hand_was_checked_against_the_pipeline(ran: dict[str, Any]) -> None:
    assert len(ran["log"]) == ran["STEPS"] == len(ran["walked"])
    assert torch.equal(ran["walked"][-1].x, ran["latent"])
    assert all(0 < ratio < 10 for ratio in ran["ratios"])
    assert ran["y"] > 0


def test_the_linear_preview_is_the_best_of_all(ran: dict[str, Any]) -> None:
    left_over = ran["channels"] @ ran["mixture"] - ran["colours"]
    # what is left is orthogonal to all channels, but for sums of this size
    size = ran["channels"].norm(dim=0)[:, None] * ran["colours"].norm(dim=0)
    assert_near(ran["channels"].T @ left_over, torch.zeros(()), 64, scale=size)
    assert ran["preview"](ran["latent"]).shape == (3, *ran["latent"].shape[2:])


@pytest.mark.long
def test_it_runs_as_a_script_with_a_model_that_predicts_v(tmp_path: Path) -> None:
    model = official.make(tmp_path / "sd2", "sd2", dialect="diffusers")
    given = {**os.environ, "MODEL": str(model), "FIGURES": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "error", str(NOTEBOOK)]
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "predicts v" in done.stdout and "the velocity v" in done.stdout
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == FIGURES


# --- the chapters --------------------------------------------------------------------------------


def test_the_examples_of_the_chapters_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names in the text lie tiny models, as folders that say how small; and pictures."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name, family in MODELS.items():
        official.make(tmp_path / name, family, dialect="diffusers")
    official.make(tmp_path / "encoders", "sd3.5-medium", dialect="parts")
    for name in ("sketch.png", "room.png", "mask.png", "map.png"):
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / name)
    assert CHAPTERS
    for page in (*CHAPTERS, README):
        found = [one for one in PYTHON.findall(page.read_text()) if page in CHAPTERS or FILE in one]
        assert found, f"{page.name}: no example"
        names: dict[str, Any] = {}
        for block in found:
            fewer = re.sub(r"num_steps=\d+", "num_steps=4", block)
            exec(compile(fewer, page.name, "exec"), names)


def test_the_commands_of_the_readme_are_understood() -> None:
    (lines,) = re.findall(
        r"^## Stable Diffusion\n.*?^```bash\n(.*?)^```$", README.read_text(), FLAGS
    )
    said = [shlex.split(line, comments=True)[1:] for line in lines.splitlines() if line]
    assert {"download", "generate", "regenerate", "inspect", "convert"} <= {one[0] for one in said}
    for words in said:
        parser(words).parse_args(words)


def test_the_shapes_in_the_text_are_those_of_the_full_size() -> None:
    text, network, autoencoder = (
        hollow(CLIPText, official.TEXT["sd1", "full"]), hollow(UNet, official.FULL["sd1"]),
        hollow(Autoencoder, official.VAE["full"]),
    )  # fmt: skip
    with torch.device("meta"), torch.no_grad():
        tokens = text(torch.zeros(1, 77, dtype=torch.int64)).tokens
        latent = network(torch.zeros(1, 4, 64, 64), torch.zeros(1), Cond(tokens=tokens))
        picture = autoencoder.decode(latent)
    page = CHAPTERS[0].read_text()
    for one in (tokens, latent, picture):
        assert re.search(rf"\({', '.join(map(str, one.shape[1:]))}\)", page), one.shape
    layers = [n for n, m in network.named_modules() if n.endswith("cross_attention")]
    assert len(layers) == 16
    for part in (text, network, autoencoder):
        millions = sum(weight.numel() for weight in part.parameters()) / 1e6
        assert f"{millions:.0f} million" in page, millions
