"""Disks that are full or read-only, processes that are killed: one line, and nothing is lost."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import official
import pytest
from PIL import Image

from minidiffusion.cli.main import main


@pytest.fixture(scope="module")
def things(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verbs read."""
    root = tmp_path_factory.mktemp("things")
    official.make(root / "sd1.safetensors", "sd1")
    words = ["--run.averages", "[0.05, 0.1]", "--run.average_every", "1"]
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(root / "run"), *words]) == 0
    call = ["generate", "bag", "--model", str(shelf / "pictures"), "--steps", "1"]
    assert main([*call, "--out", str(root)]) == 0
    (root / "in").mkdir()
    for n in range(8):
        Image.new("RGB", (64, 64), (n, n, n)).save(root / "in" / f"{n}.bmp")
        (root / "in" / f"{n}.txt").write_text("grey")
    return root


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 kB; only root may have one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        subprocess.run(mounted, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs may be mounted here: {error}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def commands(shelf: Path, things: Path, disk: Path) -> list[list[object]]:
    model = shelf / "pictures"
    return [
        ["train", shelf / "toy.yaml", "--out", disk / "run", "--model.width", 128],
        ["demo-train", shelf / "pictures.yaml", "--out", disk / "demo", "--count", 100],
        ["finetune", "--model", things / "sd1.safetensors", "--data", things / "in", "--out",
         disk / "tuned", "--size", 64],
        ["sample", shelf / "toy", "--count", 16384, "--steps", 1, "--format", "npz", "--out",
         disk / "a.npz"],
        ["sample", model, "--steps", 1, "--out", disk / "a.png"],
        ["sample", model, "--steps", 1, "--format", "png", "--out", disk / "pngs"],
        ["generate", "bag", "--model", model, "--steps", 1, "--out", disk / "out"],
        ["regenerate", things / "0001.png", "--out", disk / "again.png"],
        ["average", things / "run", "--sigma-rel", 0.08, "--out", disk / "a.safetensors"],
        ["convert", things / "sd1.safetensors", "--to", "single-file", "--out", disk / "b.st"],
        ["convert", things / "sd1.safetensors", "--to", "diffusers", "--out", disk / "b"],
        ["shard", things / "in", "--out", disk / "shards"],
        ["demo", "--out", disk / "emoji"],
    ]  # fmt: skip


@pytest.mark.long
def test_disks_that_are_full_or_read_only(
    shelf: Path, things: Path, disk: Path, refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every verb that writes; the earlier file stays, and no half one beside it."""
    monkeypatch.setattr("minidiffusion.cli.demo.timed", lambda name, work: work())
    mine = disk / "mine"
    mine.write_bytes(bytes(128 * 1024 - 4096))
    for state in ("full", "read-only"):
        if state == "full":
            (disk / "rest").write_bytes(bytes(4096))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for words in commands(shelf, things, disk):
            line = refused(*words)
            reasons = ("No space left", "Read-only", "written to")
            assert any(reason in line for reason in reasons), (words, line)
            files = {path.name for path in disk.rglob("*") if path.is_file()}
            assert {"mine", "rest"} == files, (words, files)
    assert mine.stat().st_size == 128 * 1024 - 4096


VERBS = ("generate", "shard", "average", "convert-single-file", "convert-diffusers", "download")


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
def test_a_hundred_kills(verb: str, tmp_path: Path) -> None:
    """No file under its final name is half one, and the next call removes what was left."""
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path / "k"), verb, "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["half"] == 0 and found["swept"] and found["ended"] < 100, done.stderr
