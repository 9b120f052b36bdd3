"""What a run leaves to read: log.jsonl always, TensorBoard events where it is installed."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from minidiffusion.cli.runfolder import LOG_FILE
from minidiffusion.training.loop import Report

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

    def __init__(self, lines: IO[str], board: Any) -> None:
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
        self.lines.write(json.dumps({"step": report.step, **drawn, **rest}) + "\n")
        self.lines.flush()
        if self.board is not None:
            parts = {f"parts/{name.replace(' ', '_')}": x for name, x in report.parts.items()}
            for name, number in {**drawn, **parts}.items():
                self.board.add_scalar(name, number, report.step)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        if self.board is not None:
            self.board.add_image(
                name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW"
            )


@contextmanager
def opened(folder: Path, step: int) -> Iterator[Log]:
    """The log of a run that stands at ``step``: lines of later steps, which a resume will take
    again, are dropped first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG_FILE
    kept = [line for line in _lines(path) if _step(path, line) <= step]
    path.write_text("".join(line + "\n" for line in kept))
    with ExitStack() as stack:
        board = _board(folder / "tensorboard", step)
        if board is not None:
            stack.callback(board.close)
        yield Log(stack.enter_context(path.open("a")), board)


def _lines(path: Path) -> list[str]:
    """Whole lines only: a crash may have cut the last one."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return whole.splitlines()


def _step(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: {line[:60]!r} is no line of a log; mend or remove it") from None


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
