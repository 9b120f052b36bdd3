"""Ctrl-C and SIGTERM: a command ends with nothing half done, a run with a checkpoint."""

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


class StoppedError(KeyboardInterrupt):
    """A signal ends the command. Like Ctrl-C it is no Exception, which a reader might take for a
    damaged file; whatever is half written is removed on the way out."""

    def __init__(self, signum: int, message: str = "") -> None:
        words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
        super().__init__(message or words[signal.Signals(signum)])
        self.signum = signum


def raise_stopped(signum: int, frame: FrameType | None) -> None:
    raise StoppedError(signum)


@contextmanager
def handled(signum: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A signal goes to this handler, unless the parent said to ignore it, or in another thread."""
    ours = current_thread() is main_thread() and signal.getsignal(signum) is not signal.SIG_IGN
    before = signal.signal(signum, handler) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signum, before)


def is_first() -> bool:
    """Of the processes that torchrun started, only the first shows and writes."""
    return os.environ.get("RANK", "0") == "0"


class Stop:
    """Whether a signal has asked the run to end: the step at hand and a checkpoint come first."""

    def __init__(self, out: str | None) -> None:
        self.out, self.signum = out, 0

    def __call__(self) -> bool:
        return bool(self.signum)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C are noted; a second Ctrl-C leaves at once."""
        with handled(signal.SIGTERM, self.note), handled(signal.SIGINT, self.note):
            yield

    def note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise StoppedError(signum)
        self.signum = self.signum or signum
        if is_first() and signum == signal.SIGINT:
            # Not print, which a signal may find in the middle of its work.
            os.write(2, b"\nstopping after this step; Ctrl-C again: at once\n")

    def leave(self) -> None:
        """Ends the command where a signal has ended the run."""
        if self.signum:
            again = f"minidiffusion train --resume {shlex.quote(str(self.out))}"
            raise StoppedError(self.signum, f"stopped: {again} goes on")
