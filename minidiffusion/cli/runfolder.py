"""A run's folder: what a run leaves there, and how a new run takes the place of an old one."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minidiffusion.checkpoints.catalog import MODEL_FILE
from minidiffusion.files import claimed, draft_of, locked, sweep
from minidiffusion.training.latents import FOLDER as CACHE
from minidiffusion.training.loop import CHECKPOINTS
from minidiffusion.training.posthoc import FOLDER as AVERAGES
from minidiffusion.training.start import LORA_FILE

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.jsonl"
ASIDE = ".replaced-"
LEFT = (
    RECIPE_FILE, LOG_FILE, MODEL_FILE, LORA_FILE, CHECKPOINTS, CACHE, AVERAGES, "tensorboard",
    "samples", "loss.png", "dashboard.png", "samples.png", "strip.png", "report.json", "report.md",
)  # fmt: skip


@contextmanager
def claimed_run(folder: Path) -> Iterator[None]:
    """No other process writes into the run; what killed ones left half written is removed.

    Raises ValueError where another is at work.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file is in the way of the run's folder")
    with claimed(folder):
        for place in (folder, folder / CACHE, folder / AVERAGES, folder / "samples"):
            sweep(place)
        yield


def left(folder: Path) -> list[Path]:
    """What stands where a run would write."""
    return [folder / name for name in LEFT if (folder / name).exists()]


def check_free(folder: Path) -> None:
    """Raises ValueError where a new run would write over something.

    What was encoded before a run could begin is no run: its files are named by what they hold.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file is in the way of the run's folder")
    for path in left(folder):
        if path.name == CACHE:
            continue
        raise ValueError(
            f"{folder}: holds a run already ({path.name}); --resume goes on with it, "
            "--force replaces it"
        )


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """An earlier run stands aside, comes back after an error, and else is removed at the end.

    Nothing but a run's own files is ever touched. Raises ValueError for a folder of other things.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        check_free(folder)
        yield
        return
    if not (folder / RECIPE_FILE).exists() or not (folder / LOG_FILE).exists():
        raise ValueError(
            f"{folder}: --force replaces runs only, and this folder holds no {RECIPE_FILE} "
            f"with a {LOG_FILE}"
        )
    found, aside = left(folder), Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
    for path in found:
        path.rename(aside / path.name)
    try:
        yield
    except BaseException:
        for path in found:
            (aside / path.name).rename(path)
        aside.rmdir()
        raise
    gone = draft_of(folder / "replaced")  # which a sweep finds if this is not the end of it
    aside.rename(gone)
    shutil.rmtree(gone)


def restore_replaced(folder: Path) -> None:
    """A run that stood aside when `replaced` was killed comes back, in place of what had begun.

    Not where the file system has no locks: the process that put it aside may be at work.
    """
    for aside in folder.glob(f"{ASIDE}*/"):
        if not (aside / RECIPE_FILE).exists() or (folder / RECIPE_FILE).exists():
            continue
        with suppress(BlockingIOError), locked(folder, wait=False) as granted:
            if not granted:
                continue
            for path in left(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in aside.iterdir():
                path.rename(folder / path.name)
            aside.rmdir()
