"""`minidiffusion map`: two workers give what one gives, and what the pipeline gives alone; one that
is killed, and a driver that is, cost time and nothing else."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from emoji_like import write_model
from rounding import assert_near
from tars import by_webdataset, picture, shards

from minidiffusion.checkpoints.reader import read_safetensors
from minidiffusion.cli.main import MissingExtraError, main
from minidiffusion.data import Parts, Shards
from minidiffusion.data.folder import Quarantine
from minidiffusion.data.pictures import load_picture, read_metadata
from minidiffusion.pipelines.cluster import Cluster, over
from minidiffusion.pipelines.jobs import Cut, Drawing, Encoding
from minidiffusion.pipelines.load import load
from minidiffusion.pipelines.making import Done, Job, Maker, claim, listed
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.pipelines.settings import Settings, model_hash

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray has no wheel for this Python or machine"
)
QUIET = {
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32,  # or Ray leaves one in the home folder
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_worker_niceness": "0",
}  # fmt: skip
PROMPTS = [f"a red apple number {n}" for n in range(11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def settings(model: Path) -> Settings:
    return Settings(str(model), seed=5, threads=1, model_hash=model_hash(str(model)))


@pytest.fixture(scope="module", autouse=True)
def starting() -> Iterator[subprocess.Popen[str]]:
    """The cluster takes its seconds to start while the tests that need none are run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        script = Path(__file__).parents[1] / "ray_cluster.py"
        with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
            yield process


@pytest.fixture(scope="module")
def address(starting: subprocess.Popen[str]) -> str:
    assert starting.stdout is not None
    return starting.stdout.readline().strip()


def alone(job: Job, cut: Cut, folder: Path) -> list[Done]:
    """The shards by this process, without Ray."""
    make = Maker(job, folder, "cpu")
    done = [make(work) for work in claim(job, cut, folder)]
    listed(folder, cut)
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_shard_holds_the_pictures_that_generate_draws(settings: Settings, tmp_path: Path) -> None:
    listing = tmp_path / "prompts.txt"
    listing.write_text("\n".join(PROMPTS))
    plain = ["generate", "--from-file", listing, "--model", settings.model, "--seed", 5,
             "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "plain"]  # fmt: skip
    assert main([str(word) for word in plain]) == 0
    job = Drawing(settings, 2)
    done = alone(job, job.cut(PROMPTS, 4), tmp_path / "out")
    assert [(one.name, one.made, one.bad) for one in done] == [
        ("part-000000.tar", 4, 0), ("part-000001.tar", 4, 0), ("part-000002.tar", 3, 0)
    ]  # fmt: skip
    found = [one for n in range(3) for one in by_webdataset(tmp_path / f"out/part-{n:06d}.tar")]
    assert [one["__key__"] for one in found] == [f"{n:09d}" for n in range(11)]
    for number, (prompt, one) in enumerate(zip(PROMPTS, found, strict=True), start=1):
        path = tmp_path / "plain" / f"{number:04d}.png"
        assert one["png"] == path.read_bytes() and one["txt"].decode() == prompt
        assert json.loads(one["json"]) == json.loads(read_metadata(path)["minidiffusion"])
    back = Shards(str(tmp_path / "out"), size=16).open().batch([10])
    assert back.captions == (PROMPTS[10],)


def test_a_bad_prompt_costs_itself_alone(settings: Settings, tmp_path: Path) -> None:
    job = Drawing(replace(settings, long_prompts="chunks"), 2)
    bad = [*PROMPTS]
    bad[2], bad[5] = "a\udcff", "word " * 2000
    alone(job, job.cut(PROMPTS, 4), tmp_path / "good")
    done = alone(job, job.cut(bad, 4), tmp_path / "bad")
    assert [(one.made, one.bad) for one in done] == [(3, 1), (3, 1), (3, 0)]
    lines = (tmp_path / "bad" / "quarantined.txt").read_text().splitlines()
    assert lines[0] == "000000002: not UTF-8" and lines[1].startswith("000000005: prompt: ")
    assert not (tmp_path / "good" / "quarantined.txt").exists()
    good, rest = ({one["__key__"]: one["png"] for n in range(3)
                   for one in by_webdataset(tmp_path / name / f"part-{n:06d}.tar")}
                  for name in ("good", "bad"))  # fmt: skip
    assert good.keys() - rest.keys() == {"000000002", "000000005"}
    assert rest.items() <= good.items()


def test_samples_that_are_not_finite_cost_themselves_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, real = Drawing(settings, 2), Pipeline.stream
    alone(job, job.cut(PROMPTS[:4], 4), tmp_path / "good")

    def stream(pipe: Pipeline, prompts: list[str], *rest: object, **options: object):
        for step in real(pipe, prompts, *rest, **options):
            for row, prompt in enumerate(prompts):
                if prompt == PROMPTS[1]:
                    step.x[row] = torch.nan
            yield step

    monkeypatch.setattr(Pipeline, "stream", stream)
    (done,) = alone(job, job.cut(PROMPTS[:4], 4), tmp_path / "bad")
    assert (done.made, done.bad) == (3, 1)
    good, bad = (by_webdataset(tmp_path / name / "part-000000.tar") for name in ("good", "bad"))
    assert [one["png"] for one in bad] == [good[n]["png"] for n in (0, 2, 3)]


def test_a_prompt_that_is_too_long_is_a_warning(settings: Settings, tmp_path: Path) -> None:
    job = Drawing(settings)
    (done,) = alone(job, job.cut(["word " * 100], 4), tmp_path)
    assert done.made == 1 and not done.bad and len(done.said) == 1


def test_what_is_encoded(settings: Settings, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    shards(tars, 5, 3)
    job, pipe = Encoding(settings, 2), load(settings.model, "cpu")
    done = alone(job, job.cut(str(tars), 100), tmp_path / "out")
    assert [(one.made, one.bad) for one in done] == [(3, 0), (2, 0)]
    found = [one for n in range(2) for one in by_webdataset(tmp_path / f"out/part-{n:06d}.tar")]
    assert [one["__key__"] for one in found] == [f"{n:06d}" for n in range(5)]
    for number, one in enumerate(found):
        (tmp_path / "one.safetensors").write_bytes(one["safetensors"])
        tensors = read_safetensors(tmp_path / "one.safetensors")
        caption = f"grey {number}"
        image = load_picture(io.BytesIO(picture(number)), channels=3, size=16)[None]
        assert pipe.autoencoder is not None
        latent = pipe.autoencoder.encode(image)
        assert_near(tensors["mean"][None], latent, 32)
        noise = torch.ones_like(latent)
        drawn = pipe.autoencoder.encode(image, noise)
        assert_near((tensors["mean"] + tensors["deviation"])[None], drawn, 32)
        cond = pipe.condition(caption)
        assert tensors["tokens"].equal(cond.tokens[0]) and tensors["pooled"].equal(cond.pooled[0])
        assert one["txt"].decode() == caption
        assert json.loads(one["json"])["size"] == [16, 16]


def test_a_shard_of_bad_pictures(settings: Settings, tmp_path: Path) -> None:
    (path,) = shards(tmp_path / "tars", 3)
    data = path.read_bytes().replace(picture(1), bytes(len(picture(1))))
    path.write_bytes(data[:6700])  # in the third sample's picture
    job = Encoding(settings)
    (done,) = alone(job, job.cut(str(path), 1), tmp_path / "out")
    lines = (tmp_path / "out" / "quarantined.txt").read_text().splitlines()
    assert (done.made, done.bad) == (1, 3)
    assert lines[0].startswith(f"{path.name}: 000001: none of PNG")
    assert lines[1] == f"{path.name}: 000002: cut short: the archive ends in it"
    assert lines[2].startswith(f"{path.name}: cut short in 000002.png")


def test_another_job_is_refused(settings: Settings, tmp_path: Path) -> None:
    job = Drawing(settings, 2)
    cut = job.cut(PROMPTS, 4)
    assert claim(job, cut, tmp_path) == cut.works == claim(job, cut, tmp_path)
    with pytest.raises(ValueError, match="begun with seed 5, now 6: name another folder"):
        claim(replace(job, settings=replace(settings, seed=6)), cut, tmp_path)
    with pytest.raises(ValueError, match="begun with of"):
        claim(job, job.cut(PROMPTS[::-1], 4), tmp_path)
    with pytest.raises(ValueError, match="begun with shards 3, now 6|begun with of"):
        claim(job, job.cut(PROMPTS, 2), tmp_path)
    (tmp_path / "job.json").write_text("[")
    with pytest.raises(ValueError, match="damaged"):
        claim(job, cut, tmp_path)
    (tmp_path / "job.json").unlink()
    (tmp_path / "part-000000.tar").touch()
    with pytest.raises(ValueError, match="is here already"):
        claim(job, cut, tmp_path)


def test_a_worker_says_what_it_cannot_do(settings: Settings, tmp_path: Path) -> None:
    cut = Drawing(settings).cut(PROMPTS, 20)

    def error(**changes: object) -> str:
        return Maker(Drawing(replace(settings, **changes)), tmp_path, "cpu")(cut.works[0]).error

    assert "its hash on this machine is" in error(model_hash="0123456789")
    assert "the job wants 0.0" in error(version="0.0")
    assert "gone: no such file" in error(model="gone")
    assert "guidance_interval" in error(guidance_interval=(2.0, 1.0))
    assert "No such file" in Maker(Drawing(settings), tmp_path / "gone", "cpu")(cut.works[0]).error


def test_mistakes(model: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "prompts.txt"
    listing.write_text("one\n\ntwo\n")
    draw = ["map", "generate", "--prompts", listing, "--model", model, "--out", tmp_path / "out"]
    assert "multiple of the batch size, 3" in refused(*draw, "--batch-size", 3, "--per-shard", 10)
    assert "at least 1" in refused(*draw, "--batch-size", 0)
    assert "workers: must be at least 1" in refused(*draw, "--workers", 0)
    assert "gpus: must be at least 0" in refused(*draw, "--gpus", -1)
    assert "expected HOST:PORT" in refused(*draw, "--address", "nowhere")
    assert "no Ray cluster answers" in refused(*draw, "--address", "127.0.0.1:1")
    assert "steps" in refused(*draw, "--steps", 0)
    assert "JOB" in refused("map")
    assert "unknown argument: --init-image" in refused(*draw, "--init-image", "x.png")
    listing.write_text(" \n")
    assert refused(*draw) == f"{listing}: holds no prompts"
    assert "gone" in refused("map", "generate", "--prompts", tmp_path / "gone", "--out", "x")
    code = ["map", "encode", "--model", model, "--out", tmp_path / "out", "--data"]
    assert "no such shard" in refused(*code, tmp_path / "gone")
    assert "no pictures here" in refused(*code, tmp_path)
    for size in (0, -8, 10**9):
        assert "size: must be 1 to 16384 pixels" in refused(*code, tmp_path, "--size", size)
    endless = refused("map", "generate", "--prompts", "/dev/zero", "--out", tmp_path / "out")
    assert endless == "/dev/zero: line 1: more than 8000000 bytes"
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(*draw) == "map needs Ray: pip install 'minidiffusion[ray]'"
    assert issubclass(MissingExtraError, Exception)


THEIRS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)
"""Ray warns of its own ways."""


@dataclass(frozen=True)
class Deadly(Drawing):
    """Kills its worker once, in the middle of a shard, with a sample on the disk."""

    marker: str = ""

    def samples(self, pipe: Pipeline, what: str, bad: Quarantine) -> Iterator[Parts]:
        for number, one in enumerate(Drawing.samples(self, pipe, what, bad)):
            yield one
            if number == 1 and not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)


@THEIRS
def test_two_workers_and_one_that_is_killed(
    settings: Settings, address: str, tmp_path: Path
) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know tests
    job = Deadly(settings, 2, str(tmp_path / "marker"))
    same = Drawing(settings, 2)
    cut = job.cut([*PROMPTS, "a\udcff"], 2)
    out = tmp_path / "out"
    done = list(over(Cluster(address, workers=2), job, claim(same, cut, out), out))
    assert (tmp_path / "marker").exists() and not any(one.error for one in done)
    assert sorted(one.name for one in done) == [work.name for work in cut.works]
    assert list(out.glob(".tmp-*-part-*"))  # what the killed one left
    assert listed(out, cut) == 1 and not list(out.glob(".tmp-*-part-*"))
    alone(same, cut, tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


@THEIRS
def test_a_driver_that_is_killed(
    model: Path, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for n in range(16):
        (pictures / f"{n:02d}.png").write_bytes(picture(10 * n))
        (pictures / f"{n:02d}.txt").write_text(f"grey {n}")
    (pictures / "07.png").write_bytes(b"text")
    words = ["map", "encode", "--data", pictures, "--model", model, "--out", out, "--per-shard", 2,
             "--batch-size", 2, "--size", 448, "--address", address]  # fmt: skip
    command = [sys.executable, "-m", "minidiffusion", *map(str, words), "--workers", "1"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None and not (out / "part-000000.tar").exists():
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    time.sleep(0.5)  # its worker hears of it
    there = {path: path.stat().st_ino for path in out.glob("part-*.tar")}
    assert 0 < len(there) < 8
    assert main([str(word) for word in (*words, "--workers", 2)]) == 0
    said = capsys.readouterr().out
    assert f"{len(there)} of 8 shards are there" in said
    assert f"{8 - len(there)} of them made now" in said
    assert all(path.stat().st_ino == inode for path, inode in there.items())
    assert (out / "quarantined.txt").read_text().startswith("07.png: none of PNG")
    job = Encoding(Settings(str(model), threads=1, model_hash=model_hash(str(model))), 2, 448)
    alone(job, job.cut(str(pictures), 2), tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")
