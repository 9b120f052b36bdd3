"""`minidiffusion evaluate` of models that draw emoji from words."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import emoji_pack
import numpy as np
import pytest
import torch
from rounding import assert_near
from torch import Tensor

from minidiffusion.checkpoints.catalog import MODEL_FILE, Row, Sampling, save_denoiser
from minidiffusion.cli import evaluate as verb
from minidiffusion.cli import prompted
from minidiffusion.cli.main import main
from minidiffusion.data.emoji import Emoji
from minidiffusion.data.pictures import to_pil
from minidiffusion.diffusion import RectifiedFlow
from minidiffusion.evaluation.features import Extractor
from minidiffusion.evaluation.matching import EmojiJudge
from minidiffusion.evaluation.prompted import Eyes, real
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    CLIPText,
    MMDiT,
    MMDiTConfig,
    create,
)
from minidiffusion.models.matcher import Matcher
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.text import Text

QUICK: dict[str, Any] = {"num_steps": 1, "guidance_scale": 2.0}
SAMPLING = Sampling("ddim", 1)


@pytest.fixture(scope="module", autouse=True)
def pack() -> Iterator[None]:
    with emoji_pack.thinned_pack():
        yield


@pytest.fixture(scope="module")
def judge() -> EmojiJudge:
    torch.manual_seed(0)
    network = Matcher().eval().requires_grad_(False)
    return EmojiJudge(network, Extractor("untrained", 128, network.features))


def made(config: MMDiTConfig, **facts: Any) -> tuple[MMDiT, Row]:
    torch.manual_seed(0)
    network = create(config)
    assert isinstance(network, MMDiT)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    usual: dict[str, Any] = {"data": "emoji", "sampling": SAMPLING}
    return network, Row(config, RectifiedFlow(), "flow", **{**usual, **facts})


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """Words, latents and pictures: all three parts, of random weights."""
    config = MMDiTConfig(4, width=16, depth=1, heads=2, grid=4, context_width=8, pooled_width=8)
    network, row = made(config, shape=(4, 8, 8))
    encoder = CLIPText(CLIPConfig(width=8, layers=1, heads=2, feed_forward=8))
    sizes = AutoencoderConfig(channels=4, multipliers=(1, 1, 1, 1), blocks=1, groups=4)
    autoencoder = Autoencoder(sizes).eval()
    where = torch.device("cpu")
    return Pipeline(network.eval(), row, where, Text(encoder.eval()), autoencoder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pixels whose prompts are hashed."""
    config = MMDiTConfig(
        3, width=16, depth=1, heads=2, patch=16, grid=4, context_width=8, pooled_width=8
    )
    network, row = made(config, shape=(3, 64, 64), words=16)
    folder = tmp_path_factory.mktemp("emoji")
    save_denoiser(network.state_dict(), row, folder / MODEL_FILE)
    return folder


def test_a_picture_of_a_caption_is_that_of_generate_in_every_batch(pipe: Pipeline) -> None:
    captions = ["red apple, 3d style", "dog, flat style", "flag: India, noto style"]
    together = prompted.draw(pipe, captions, 8, seed=5, given=QUICK)
    assert together.shape == (3, 3, 64, 64)
    apart = prompted.draw(pipe, captions, 2, seed=5, given=QUICK)
    assert_near(apart, together, 256, scale=2)  # of all steps and the decoder, in other batches
    for picture, x in zip(pipe.generate(captions, seed=5, **QUICK), to_pil(together), strict=True):
        away = np.asarray(picture).astype(int) - np.asarray(x).astype(int)
        assert abs(away).max() <= 1
    other = prompted.draw(pipe, captions[::-1], 8, seed=5, given=QUICK)
    assert (other[0] - together[0]).abs().max() > 1e-4


def test_the_figures_of_all_three_parts(pipe: Pipeline, judge: EmojiJudge) -> None:
    eyes = Eyes(judge, judge.extractor)
    scores = prompted.judged(pipe, eyes, count=6, batch=4, seed=0, given=QUICK)
    assert [one.count for one in scores.splits] == [6, 6, 6]
    assert all(one.frechet is None and one.nearest_ratio > 0 for one in scores.splits)


@cache
def known() -> tuple[dict[str, int], Tensor]:
    captions = [pair.captions()[0] for pair in Emoji(split="all").pairs()]
    return {caption: i for i, caption in enumerate(captions)}, real("all")


class Oracle(Pipeline):
    """Draws the real pictures."""

    def condition(self, prompt: Any = None, count: int = 1) -> Any:
        places, pictures = known()
        return pictures[[places[caption] for caption in prompt]]

    def sample(self, cond: Any, count: int = 1, **options: Any) -> Tensor:
        return cond

    def decode(self, x: Tensor) -> Tensor:
        return x


class Grey(Oracle):
    """Draws the same grey for every caption."""

    def sample(self, cond: Any, count: int = 1, **options: Any) -> Tensor:
        return torch.full_like(cond, 0.2)


@pytest.mark.parametrize("kind", [Oracle, Grey])
def test_an_oracle_reaches_the_ceiling_and_grey_is_chance(
    kind: type[Oracle], pipe: Pipeline, judge: EmojiJudge
) -> None:
    made = kind(pipe.network, pipe.row, pipe.device, pipe.text, pipe.autoencoder)
    prompted.check(made)
    eyes = Eyes(judge, judge.extractor)
    scores = prompted.judged(made, eyes, count=130, batch=50, seed=0, given={})
    for one in scores.splits:
        assert one.frechet is not None and one.frechet_floor is not None
        if kind is Oracle:
            assert one.shown == one.real and one.frechet < 1e-3 * one.frechet_floor
        else:
            assert one.shown.retrieval.share < 0.05 and one.shown.concept.share < 0.02
            assert one.frechet > one.frechet_floor


def test_evaluate(
    run: Path, judge: EmojiJudge, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(verb, "emoji_judge", lambda: judge)
    words = ["--count", "4", "--guidance", "1", "--guidance", "3", "--steps", "1"]
    assert main(["evaluate", str(run), *words]) == 0
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"guidance 1", "guidance 3"}
    splits = {"train", "combination", "concept"}
    for figures in report.values():
        assert splits < set(figures)
        assert all(figures[split]["count"] == 4 for split in splits)
    assert report["guidance 1"] != report["guidance 3"]
    assert (run / "report.md").read_text().count("```") == 4
    assert "unseen combinations" in capsys.readouterr().out


def test_what_cannot_be_judged_is_said_first(
    pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(pipe, row=replace(pipe.row, shape=(4, 4, 4)))
    cases = {"takes no words": replace(pipe, text=None), "this model's pictures (3, 32, 32)": small}
    for line, wrong in cases.items():
        with pytest.raises(SystemExit) as end:
            prompted.check(wrong)
        assert end.value.code == 2 and line in capsys.readouterr().err
