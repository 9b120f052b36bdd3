"""Shards made in this process, without a cluster: what is wrong with a prompt costs that prompt."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emoji_like import write_model
from tars import by_webdataset

from minidiffusion.models import MMDiT
from minidiffusion.pipelines.jobs import Drawing
from minidiffusion.pipelines.making import Done, Maker, claim, listed
from minidiffusion.pipelines.settings import Settings, model_hash


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = write_model(tmp_path_factory.mktemp("model") / "model.safetensors")
    return Settings(str(model), seed=5, steps=2, threads=1, model_hash=model_hash(str(model)))


def made(job: Drawing, prompts: list[str], folder: Path) -> list[Done]:
    cut = job.cut(prompts, 4)
    make = Maker(job, folder, "cpu")
    done = [make(work) for work in claim(job, cut, folder)]
    listed(folder, cut)
    return done


def pictures(folder: Path) -> dict[str, bytes]:
    found = (one for path in sorted(folder.glob("*.tar")) for one in by_webdataset(path))
    return {one["__key__"]: one["png"] for one in found}


REFUSED = {"NUL": "a\0cat", "a surrogate": "a \ud800 cat", "an escaped byte": "a\udcff"}
DRAWN = {
    "a hundred kB": "cat " * 25_000, "one word": "c" * 100_000, "emoji": "\U0001f600" * 25_000,
    "control characters": "a\x01\x07\x1b[31m\x7f\x9b cat", "an end": "<|endoftext|>" * 100,
    "right to left": "\u202ea cat\u202c \u200f\u05d7\u05ea\u05d5\u05dc\u2066", "blank": "\u3000",
    "JSON": '{"seed": 1, "model": "/dev/zero"}\n"], [0, ["', "settings": "x\nSteps: 1, Seed: 2",
    "brackets": "(" * 1000 + "cat:1e999" + ")" * 1000, "zero width": "\u200d" * 5000,
    "marks": "a" + "\u0301" * 10_000, "a path": "../../etc/passwd", "a tag": "<script>alert(1)",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:prompt. ")
@pytest.mark.parametrize("batch", [1, 2])
def test_hostile_prompts_cost_their_own_pictures_at_most(
    settings: Settings, tmp_path: Path, batch: int
) -> None:
    plain = [f"a red apple number {n}" for n in range(2 * len(DRAWN | REFUSED))]
    hostile = [*plain]
    for number, prompt in enumerate((DRAWN | REFUSED).values()):
        hostile[2 * number] = prompt
    job = Drawing(settings, batch)
    assert not any(one.bad or one.error for one in made(job, plain, tmp_path / "plain"))
    done = made(job, hostile, tmp_path / "hostile")
    assert not any(one.error for one in done)
    lines = (tmp_path / "hostile" / "quarantined.txt").read_text().splitlines()
    first = 2 * len(DRAWN)
    assert [line.partition(":")[0] for line in lines] == [
        f"{first + 2 * n:09d}" for n in range(len(REFUSED))
    ]
    good, found = pictures(tmp_path / "plain"), pictures(tmp_path / "hostile")
    assert len(found) == len(hostile) - len(REFUSED)
    for number in range(1, len(plain), 2):
        assert found[f"{number:09d}"] == good[f"{number:09d}"]
    samples = [one for path in sorted((tmp_path / "hostile").glob("*.tar"))
               for one in by_webdataset(path)]  # fmt: skip
    for one in samples:
        prompt = hostile[int(one["__key__"])]
        assert one["txt"].decode() == prompt == json.loads(one["json"])["prompt"]


def test_memory_that_runs_out_costs_no_picture(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, job, calls = [f"a cat {n}" for n in range(4)], Drawing(settings, 2), []
    made(job, prompts, tmp_path / "usual")
    forward = MMDiT.forward

    def once(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return forward(self, *given)

    monkeypatch.setattr(MMDiT, "forward", once)
    (done,) = made(job, prompts, tmp_path / "short")
    assert done.said == ("memory ran out: the parts take turns on the device",)
    assert pictures(tmp_path / "short") == pictures(tmp_path / "usual")


def test_numbers_that_are_not_finite_are_reported_with_their_module(
    settings: Settings, tmp_path: Path
) -> None:
    job = Drawing(replace(settings, guidance=1e308), 2)
    (done,) = made(job, ["a cat", "a dog"], tmp_path)
    assert (done.made, done.bad) == (0, 2)
    text = (tmp_path / "quarantined.txt").read_text()
    assert text.count("samples that are not finite at step 2 of 2: is the guidance too high?") == 2
