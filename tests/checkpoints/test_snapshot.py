"""Snapshots survive kills, full disks and flipped bits, or say which file did not."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiffusion.checkpoints.snapshot import load, newest, save

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


def small(value: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((20,), float(value))},
        "ema": {"weight": torch.zeros(20)},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(found: Tensors, expected: Tensors) -> bool:
    def flat(parts: Tensors) -> dict[tuple[str, str], torch.Tensor]:
        return {(part, name): t for part, rows in parts.items() for name, t in rows.items()}

    a, b = flat(found), flat(expected)
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in b
    )


def test_round_trip(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    tensors = {
        "model": {"w": weight, "t": weight.T, "tied": weight, "row": weight[1], "e": weight[:0]},
        "optimizer": {
            "step": torch.tensor(3.0),
            "count": torch.tensor(2**60),
            "m": torch.randn(3, dtype=torch.bfloat16),
            "on": torch.tensor([True, False]),
            "empty": torch.empty(0, 3, dtype=torch.int64),
        },
        "nothing": {},
    }
    facts = {"seed": 1, "loss": 0.1, "notes": ["é", None], "recipe": {"steps": 3}}
    path = save(tmp_path / "runs" / "one", 1234, tensors, facts)
    assert path == tmp_path / "runs" / "one" / "step_00001234"
    found = load(path)
    assert found[:3] == (path, 1234, facts)
    assert found.tensors.keys() == tensors.keys() and same(found.tensors, tensors)
    found.tensors["model"]["w"].zero_()  # its memory is its own
    assert same(load(path).tensors, tensors)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, small(), {}, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000010"]
    save(tmp_path, 4, small(), {}, keep=2)  # a run that went back; the future is not its to remove
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000010"]
    save(tmp_path, 11, small(), {}, keep=1)
    assert names(tmp_path) == ["step_00000011"]


def test_the_same_step_again(tmp_path: Path) -> None:
    save(tmp_path, 1, small(1), {})
    save(tmp_path, 1, small(2), {"again": True})
    assert names(tmp_path) == ["step_00000001"]
    found, complaints = newest(tmp_path)
    assert found is not None and not complaints
    assert found.facts == {"again": True} and same(found.tensors, small(2))


@pytest.mark.parametrize("first_is_left", [True, False])
def test_a_crash_while_a_step_was_replaced(tmp_path: Path, first_is_left: bool) -> None:
    save(tmp_path / "other", 1, small(2), {"again": True})
    if first_is_left:
        save(tmp_path / "run", 1, small(1), {})
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "other" / "step_00000001").rename(tmp_path / "run" / "step_00000001.again")
    found, _ = newest(tmp_path / "run")
    assert found is not None and found.facts == {"again": True}
    save(tmp_path / "run", 2, small(), {})
    assert names(tmp_path / "run") == ["step_00000001", "step_00000002"]
    assert load(tmp_path / "run" / "step_00000001").facts == {"again": True}


def test_remains_of_dead_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-dead" / "deeper").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 1, small(), {})
    assert names(tmp_path) == ["notes.txt", "step_00000001"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 7, small(), {"seed": 1, "loss": 0.25})
    draw, whole = random.Random(0), sorted(path.iterdir())
    flips = [(draw.choice(whole), draw.random(), draw.randrange(8)) for _ in range(500)]
    # ... and each bit of the two files that people can read, since no digest covers the manifest.
    for file in (path / "manifest.json", path / "facts.json"):
        size = file.stat().st_size
        flips += [(file, i / size, bit) for i in range(size) for bit in range(8)]
    for file, where, bit in flips:
        good = file.read_bytes()
        data = bytearray(good)
        data[min(round(where * len(data)), len(data) - 1)] ^= 1 << bit
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{file.name}: damaged"):
            load(path)
        file.write_bytes(good)
    assert load(path).step == 7


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def forge(path: Path) -> None:
    """A manifest that is whole in itself, of other files."""
    other = save(path.parent / "other", 2, small(5), {})
    shutil.copy(other / "manifest.json", path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors: damaged: 151 bytes, 152 were written"),
    "emptied": (lambda path: (path / "ema.safetensors").write_bytes(b""), "ema.safetensors: dam"),
    "extra": (lambda path: (path / "more").touch(), "more: does not belong"),
    "extra folder": (lambda path: (path / "more").mkdir(), "more: does not belong"),
    "missing": (lambda path: (path / "ema.safetensors").unlink(), "ema.safetensors: is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json: dam"),
    "a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json: damaged"),
    "forged": (forge, "model.safetensors: damaged: the SHA-256"),
    "no folder": (shutil.rmtree, "step_00000002"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_the_newest_good_one_is_taken(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    save(tmp_path, 1, small(), {"good": True})
    path = save(tmp_path, 2, small(), {})
    damage(path)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    found, complaints = newest(tmp_path)
    assert found is not None and found.step == 1 and found.facts == {"good": True}
    assert complaints == ([str(caught.value)] if path.exists() else [])


def test_none_is_good(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])
    truncate(save(tmp_path, 1, small(), {}))
    found, complaints = newest(tmp_path)
    assert found is None and len(complaints) == 1


def test_another_name_is_not_another_step(tmp_path: Path) -> None:
    path = save(tmp_path, 1, small(), {})
    assert load(shutil.copytree(path, tmp_path / "best")).step == 1
    with pytest.raises(ValueError, match="a snapshot of step 1 under another name"):
        load(path.rename(tmp_path / "step_00000009"))


@pytest.mark.parametrize("room", [0, 40, 400, 1400])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """The disk fills up at the first byte, or after some files."""
    save(tmp_path, 1, small(1), {})
    left, opened = room, Path.open

    def limited(path: Path, mode: str = "r", *rest: Any) -> Any:
        file = opened(path, mode, *rest)
        if "x" not in mode:
            return file
        write = file.write

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *details: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, part: bytes | memoryview) -> int:
                nonlocal left
                left -= len(part)
                if left < 0:
                    raise OSError(28, "No space left on device")
                return int(write(part))

        return Full()

    monkeypatch.setattr(Path, "open", limited)
    big = {"model": {"weight": torch.ones(400)}}
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.tmp-\w+/[\w.]+'") as caught:
        save(tmp_path, 2, big, {"some": "facts"})
    assert caught.value.errno == 28
    assert names(tmp_path) == ["step_00000001"]
    found, complaints = newest(tmp_path)
    assert found is not None and not complaints and same(found.tensors, small(1))


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot keep 0"):
        save(tmp_path, 1, small(), {}, keep=0)
    with pytest.raises(ValueError, match=r"'\.\./model' cannot be the name of a file"):
        save(tmp_path, 1, {"../model": {}}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, small(), {"a": object()})
    with pytest.raises(ValueError, match="complex64 cannot be stored"):
        save(tmp_path, 1, {"model": {"a": torch.zeros(1, dtype=torch.complex64)}}, {})
    assert names(tmp_path) == []


def test_order_of_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the manifest, then their folder; only then the name, then the parent."""
    events: list[Any] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        sync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    path = save(tmp_path / "run", 1, small(), {})
    known = {entry.stat().st_ino: entry.name for entry in [*path.iterdir(), path, *path.parents]}
    assert [known.get(event, event) for event in events] == [
        tmp_path.name,
        "facts.json",
        "model.safetensors",
        "ema.safetensors",
        "manifest.json",
        "step_00000001",
        "rename",
        "run",
    ]


def killed(*arguments: object) -> dict[str, Any]:
    """A fresh process, because forking one with threads is unsafe, and warned of by Python."""
    script = Path(__file__).with_name("killed.py")
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **single},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_random_kills(tmp_path: Path, count: int) -> None:
    figures = killed(tmp_path, "random", count)
    assert figures["kills"] == count and figures["midway"] > count // 4


def test_death_at_every_change_of_the_file_system(tmp_path: Path) -> None:
    assert killed(tmp_path, "every")["moments"] > 30


def test_read_only_folder(tmp_path: Path) -> None:
    assert killed(tmp_path, "readonly")["refused"]
