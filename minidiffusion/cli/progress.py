"""How far drawing is: steps, their rate, the time that is left."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """A live line on a terminal; elsewhere only what is said."""

    def __init__(self, steps: int, pictures: int) -> None:
        """steps: of each picture. What a batch does counts once for each of its pictures."""
        self.steps, self.total, self.finished = steps, steps * pictures, 0
        self.taken, self.began = 0, time.monotonic()
        self.bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("drawing"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def rate(self) -> str:
        """Steps a second, or seconds a step where that is the larger number."""
        pace = self.taken / max(time.monotonic() - self.began, 1e-9)
        return f"{pace:.2f} it/s" if pace >= 1 or not pace else f"{1 / pace:.2f} s/it"

    def step(self, index: int, pictures: int) -> None:
        """A batch has taken its step ``index``: again, where memory ran out and it began anew."""
        self.taken += 1
        self._show(self.finished + (index + 1) * pictures)

    def finish(self, pictures: int) -> None:
        self.finished += self.steps * pictures
        self._show(self.finished)

    def _show(self, completed: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=completed, rate=self.rate)

    def say(self, line: str) -> None:
        text = f"{line}  ({self.rate})"
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(text, highlight=False, soft_wrap=True)
