"""The command: its verbs, and the one place where a mistake becomes one line and exit code 2."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from minidiffusion.cli.signals import StoppedError, handled, is_first, raise_stopped
from minidiffusion.typed import SEED

VERBS = {
    "train": "train a network from a recipe, or go on with a run",
    "sample": "draw pictures from a run",
    "evaluate": "judge a run's pictures: agreement, Frechet distance, their floors",
    "demo": "draw what prompts say with the model that ships: a minute, one folder to look at",
    "demo-train": "train on real pictures, draw, judge: three minutes, one folder to look at",
    "generate": "draw what a prompt says with the model that ships, or Stable Diffusion",
    "finetune": "teach the model that ships, or Stable Diffusion, your own pictures",
    "regenerate": "draw a picture once more, from what its PNG says",
    "map": "draw or encode very many pictures over a cluster (Ray)",
    "shard": "pack a folder of captioned pictures into tar shards, to train on",
    "average": "make weights averaged over any length of a run, after it",
    "inspect": "say what a file of weights is: parts, sizes, precision, prediction",
    "plan": "say what a model takes of memory, and which options make it fit",
    "convert": "write official weights in another layout: diffusers or single-file",
    "download": "fetch a model's official files, such as sd1.5, whole and checked",
}
DRAW = ("generate", "regenerate", "demo")
SPINS = "2000"
MAY_BE_EMPTY = {"prompt", "negative_prompt"}
LONGEST = 2000
"""Letters of an error message; the names of all recipe keys fit."""


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (try: {self.prog} --help)")

    def parse_known_args(self, *given: Any) -> Any:  # type: ignore[override]
        """Nothing unknown is let through, and the parser that does not know it says so."""
        found, strangers = super().parse_known_args(*given)
        for word in strangers[:1]:
            close = get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unknown argument: {word}{hint}")
        return found, strangers


def fail(message: str) -> NoReturn:
    """End with one line."""
    print(f"minidiffusion: error: {shown(message)}", file=sys.stderr)
    raise SystemExit(2)


def shown(message: str) -> str:
    """One line. A message may quote a megabyte, or letters that move the cursor."""
    line = " ".join(message.split())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Every verb's name and purpose; the options of the one that is called."""
    top = Parser(
        prog="minidiffusion", description="Diffusion models in one small house.",
        epilog="Start with: minidiffusion demo. Each verb has its own --help.",
        allow_abbrev=False,
    )  # fmt: skip
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, purpose in VERBS.items():
        verb = verbs.add_parser(
            name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".",
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name == called:  # a verb's options may need torch, and that takes a second to import
            if name in DRAW:
                wait_briefly()
            module = import_module(f"minidiffusion.cli.{name.replace('-', '_')}")
            module.add_arguments(verb)
            run: Callable[[argparse.Namespace], None] = module.run
            verb.set_defaults(run=run)
    return top


def wait_briefly() -> None:
    """Before torch comes: its threads wait for each other by spinning, some milliseconds at first.

    Beside another program a small picture took 20 seconds so, and takes 1.3 with a fiftieth of it;
    alone both take as long. Training, whose steps are finer, would lose by it.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. 0: done. 2: a mistake, said in one line. 130: interrupted. 143: terminated."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with plain_warnings(), handled(signal.SIGTERM, raise_stopped):
            perform(argv)
    except KeyboardInterrupt as stop:
        if not isinstance(stop, StoppedError):
            stop = StoppedError(signal.SIGINT)
        if is_first():
            print(f"\nminidiffusion: {shown(str(stop))}", file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:
        # The reader has left (`| head`); at exit Python would try once more to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, MissingExtraError) as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_ours(error):
            raise
        fail(str(error) or "out of memory")
    return 0


@contextmanager
def plain_warnings() -> Iterator[None]:
    """What a user should know is one line, once, without the place in the code that says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(
            f"minidiffusion: warning: {shown(str(message))}", file=sys.stderr
        )
        yield


def perform(argv: Sequence[str]) -> None:
    try:
        arguments = parser(argv).parse_args(argv)
        check_words(arguments)
        arguments.run(arguments)
    finally:
        sys.stdout.flush()  # here, where a reader who has left is no surprise


def seed(text: str) -> int:
    """A seed of the command line, for argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if not SEED["min"] <= value <= SEED["max"]:
        raise argparse.ArgumentTypeError(f"must be 0..{SEED['max']}, got {text}")
    return value


def check_seeds(first: int, count: int) -> None:
    """Ends with one line where the last of so many seeds has no number of its own."""
    if first + count - 1 > SEED["max"]:
        fail(f"--seed: {first} and {count - 1} more go beyond {SEED['max']}")


def check_words(arguments: argparse.Namespace) -> None:
    """An empty word, as of a variable that is not set, would mean this folder, or nothing."""
    for key, given in vars(arguments).items():
        words = given if isinstance(given, list) else [given]
        if key not in MAY_BE_EMPTY and any(isinstance(w, str) and not w.strip() for w in words):
            fail(f"{key.replace('_', '-')}: must not be empty")


class MissingExtraError(Exception):
    """An optional dependency is not installed; the message names the extra."""


def is_ours(error: RuntimeError | MemoryError) -> bool:
    """A run that diverged, or memory that ran out: the user's to mend, not a bug to trace."""
    from minidiffusion.device import out_of_memory
    from minidiffusion.training.loop import DivergedError

    return isinstance(error, DivergedError) or out_of_memory(error)
