"""What a run shows and leaves to read: a live line, log.jsonl, TensorBoard events if installed."""

import json
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any

from minidiffusion.checkpoints.reader import write_whole
from minidiffusion.cli.runfolder import LOG_FILE
from minidiffusion.files import is_endless
from minidiffusion.training.loop import Report

LONGEST = 2**20
"""Bytes of a line; a step takes 300."""
RECENT = 50
"""Steps that the rate is taken over: sheets and checkpoints between them are part of it."""


def rate(recent: Sequence[Report]) -> float:
    """Pictures a second over these steps; of a single one since the process began."""
    first, last = recent[0], recent[-1]
    seconds, fresh = (0.0, 0) if first is last else (first.seconds, first.fresh)
    return (last.fresh - fresh) / max(last.seconds - seconds, 1e-9)


def left(recent: Sequence[Report]) -> float | None:
    """Seconds to the end of the run at that rate; None while its length is not known."""
    last = recent[-1]
    if last.total is None:
        return None
    return (last.total - last.step) * (last.samples / last.step) / max(rate(recent), 1e-9)


class Log:
    """One line a step, as JSON, and the same numbers for TensorBoard."""

    def __init__(self, lines: FileIO, board: Any) -> None:
        self.lines, self.board = lines, board
        self.recent: deque[Report] = deque(maxlen=RECENT)

    def add(self, report: Report) -> None:
        self.recent.append(report)
        drawn = {"loss": report.loss, "lr": report.rate, "grad_norm": report.norm,
                 "pictures_per_second": round(rate(self.recent), 2)}  # fmt: skip
        eta = left(self.recent)
        rest = {
            "seconds": round(report.seconds, 3), "samples": report.samples,
            "skipped": report.skipped, "eta": None if eta is None else round(eta, 1),
            "parts": {name: float(f"{part:.6g}") for name, part in report.parts.items()},
        }  # fmt: skip
        line = json.dumps({"step": report.step, **drawn, **rest}).encode() + b"\n"
        try:
            while line:
                line = line[self.lines.write(line) :]
        except OSError as error:  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(self.lines.name)) from error
        parts = {f"parts/{name.replace(' ', '_')}": x for name, x in report.parts.items()}
        with self.spared():
            for name, number in {**drawn, **parts}.items():
                self.board.add_scalar(name, number, report.step)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        with self.spared():
            self.board.add_image(
                name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW"
            )

    @contextmanager
    def spared(self) -> Iterator[None]:
        """A run goes on without TensorBoard where its events cannot be written."""
        try:
            yield
        except OSError as error:
            folder, self.board = self.board.log_dir, Silent()
            warnings.warn(f"{folder}: {error.strerror}: no more events", stacklevel=3)


class Silent:
    """TensorBoard where there is none."""

    def add_scalar(self, name: str, number: float, step: int) -> None: ...

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None: ...

    def close(self) -> None: ...


@contextmanager
def opened(folder: Path, step: int) -> Iterator[Log]:
    """The log of a run that stands at ``step``: lines of later steps, which a resume will take
    again, are dropped first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG_FILE
    kept = [line for line in _lines(path) if _step(path, line) <= step]
    write_whole(path, [f"{line}\n".encode() for line in kept])
    # Without a buffer: what a full disk did not take is not tried again, and lost, at the end.
    with path.open("ab", buffering=0) as lines, quiet():
        log = Log(lines, _board(folder / "tensorboard", step))
        try:
            yield log
        finally:
            with log.spared():
                log.board.close()


@contextmanager
def quiet() -> Iterator[None]:
    """TensorBoard's thread that cannot write dies of it, with a traceback; `Log.spared` says it."""
    usual = threading.excepthook
    threading.excepthook = lambda what: None if what.exc_type is OSError else usual(what)
    try:
        yield
    finally:
        threading.excepthook = usual


def _lines(path: Path) -> Iterator[str]:
    """Whole lines only: a crash may have cut the last one."""
    if not path.exists():
        return
    if is_endless(path):
        raise ValueError(f"{path}: a device or a pipe, not a file")
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            if line.endswith(b"\n"):
                yield line.decode(errors="replace").rstrip("\r\n")
            elif len(line) == LONGEST:
                raise ValueError(f"{path}: a line of more than {LONGEST} bytes: no log")


def rows(path: Path) -> list[dict[str, Any]]:
    """The log's lines, each a step."""
    return [json.loads(line) for line in _lines(path)]


def _step(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: {line[:60]!r} is no line of a log; mend or remove it") from None


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return Silent()
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


@contextmanager
def display(name: str) -> Iterator[Any]:
    """A live line on a terminal; elsewhere a plain line every ten seconds."""
    if not sys.stdout.isatty():
        yield Lines(name)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )  # fmt: skip
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=None, facts="")
        smooth: list[float] = []

        def show(recent: Sequence[Report]) -> None:
            report = recent[-1]
            smooth.append(report.loss if not smooth else 0.95 * smooth[-1] + 0.05 * report.loss)
            facts = f"loss {smooth[-1]:.4f}  {pace(recent)}"
            progress.update(task, completed=report.step, total=report.total, facts=facts)

        yield show


class Lines:
    """Progress for logs and pipes."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, -10.0

    def __call__(self, recent: Sequence[Report]) -> None:
        report, now = recent[-1], time.monotonic()
        if now - self.last >= 10 or report.step == report.total:
            self.last = now
            total = report.total or "?"
            print(
                f"{self.name}: step {report.step}/{total}  loss {report.loss:.4f}  {pace(recent)}",
                flush=True,
            )


def pace(recent: Sequence[Report]) -> str:
    """The rate of late, and the time that is left at it."""
    seconds = left(recent)
    eta = f"  ETA {timedelta(seconds=round(seconds))}" if seconds else ""
    return f"{rate(recent):.0f} pictures/s{eta}"
