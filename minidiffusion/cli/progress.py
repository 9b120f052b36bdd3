"""How far drawing is: steps, their rate, the time that is left."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """A live line on a terminal; elsewhere only what is said."""

    def __init__(self, steps: int) -> None:
        self.steps, self.taken, self.began = steps, 0, time.monotonic()
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
            self.task = self.bar.add_task("", total=self.steps, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def rate(self) -> str:
        """Steps a second, or seconds a step where that is the larger number."""
        pace = self.taken / max(time.monotonic() - self.began, 1e-9)
        return f"{pace:.2f} it/s" if pace >= 1 or not pace else f"{1 / pace:.2f} s/it"

    def step(self) -> None:
        self.taken += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.taken, rate=self.rate)

    def say(self, line: str) -> None:
        text = f"{line}  ({self.rate})"
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(text, highlight=False, soft_wrap=True)
