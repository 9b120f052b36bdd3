"""Writers that are killed, run as a process of its own: it forks, which threads would spoil.

``random COUNT``: kill a saving child at a random moment, COUNT times. ``every``: end a child
before its first, second, ... change of the file system, until one comes through. ``readonly``: a
folder that may not be written. Each prints its figures as JSON, or fails.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minidiffusion.checkpoints.snapshot import newest, save

torch.set_num_threads(1)
WEIGHT = torch.arange(200_000.0)
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def state(step: int, version: int) -> dict[str, dict[str, torch.Tensor]]:
    weight = WEIGHT.clone()
    weight[:2] = torch.tensor([step, version])
    return {"model": {"weight": weight}, "ema": {"weight": -weight}}


def put(folder: Path, step: int, version: int) -> None:
    save(folder, step, state(step, version), {"step": step, "version": version})


def check(folder: Path, step: int, version: int) -> None:
    """The newest snapshot is whole and at least as new as the last that was reported."""
    found, complaints = newest(folder)
    assert found is not None and not complaints, (step, complaints)
    assert (found.step, found.facts["version"]) >= (step, version), (found, step, version)
    expected = state(found.facts["step"], found.facts["version"])
    assert found.step == found.facts["step"]
    for part in ("model", "ema"):
        assert torch.equal(found.tensors[part]["weight"], expected[part]["weight"])


def child(work: Callable[[], None]) -> int:
    number = os.fork()
    if number == 0:
        try:
            work()
        finally:
            os._exit(1)
    return number


def random_kills(folder: Path, count: int) -> dict[str, int]:
    """The child saves each step twice, and reports each save through a pipe."""
    midway, last = 0, (0, 0)
    put(folder, *last)
    draw = random.Random(0)
    for _ in range(count):
        reading, writing = os.pipe()

        def work(start: int = last[0], pipe: int = writing) -> None:
            for step in range(start + 1, start + 10_000):
                for version in range(2):
                    put(folder, step, version)
                    os.write(pipe, f"{step} {version}\n".encode())

        number = child(work)
        os.close(writing)
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(number, signal.SIGKILL)
        assert os.waitpid(number, 0)[1] == signal.SIGKILL
        with os.fdopen(reading) as pipe:
            for line in pipe:
                last = (int(line.split()[0]), int(line.split()[1]))
        midway += any(folder.glob(".tmp-*")) or any(folder.glob("*.again"))
        check(folder, *last)
        found, _ = newest(folder)
        assert found is not None
        last = (found.step, found.facts["version"])
    put(folder, last[0] + 1, 0)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"step_{last[0] + more:08d}" for more in (0, 1)], names
    return {"kills": count, "midway": midway, "saves": last[0]}


def every_kill(folder: Path) -> dict[str, int]:
    """Die before change 1, 2, 3, ... of a save that replaces, and of one that prunes."""
    count = 0
    for step, version in ((2, 1), (3, 0)):
        for moment in range(1, 1000):
            here = folder / f"{step}-{moment}"
            for old in (1, 2):
                put(here, old, 0)

            def work(here: Path = here, moment: int = moment) -> None:
                left = moment

                def count_down(event: str, arguments: tuple[object, ...]) -> None:
                    nonlocal left
                    left -= event in CHANGES
                    if left == 0:
                        os._exit(9)

                sys.addaudithook(count_down)
                put(here, step, version)  # noqa: B023
                os._exit(0)

            status = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
            assert status in (0, 9)
            check(here, *((step, version) if status == 0 else (2, 0)))
            put(here, 4, 0)  # the next save tidies up
            assert sorted(path.name for path in here.iterdir())[1:] == ["step_00000004"]
            if status == 0:
                break
            count += 1
    return {"moments": count}


def readonly(folder: Path) -> dict[str, bool]:
    """Root may write anywhere, so the child becomes nobody first."""
    with tempfile.TemporaryDirectory() as name:
        shut = Path(name) / "run"
        put(shut, 1, 0)
        Path(name).chmod(0o755)
        shut.chmod(0o555)

        def work() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                put(shut, 2, 0)
            except PermissionError as error:
                check(shut, 1, 0)
                os._exit(0 if str(shut) in str(error) else 3)

        status = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
        shut.chmod(0o755)
        assert status == 0, status
        check(shut, 1, 0)
        assert [path.name for path in shut.iterdir()] == ["step_00000001"]
    return {"refused": True}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    verbs: dict[str, Callable[[], object]] = {
        "random": lambda: random_kills(place, int(sys.argv[3])),
        "every": lambda: every_kill(place),
        "readonly": lambda: readonly(place),
    }
    print(json.dumps(verbs[sys.argv[2]]()))
