"""The command: its verbs, and the one place where a mistake becomes one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

VERBS = {
    "train": "train a network from a recipe, or go on with a run",
    "sample": "draw pictures from a run",
    "evaluate": "judge a run's pictures: agreement, Frechet distance, their floors",
    "demo": "train on real pictures, draw, judge: three minutes, one folder to look at",
}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (try: {self.prog} --help)")


def fail(message: str) -> NoReturn:
    print(f"minidiffusion: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


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
            module = import_module(f"minidiffusion.cli.{name}")
            module.add_arguments(verb)
            run: Callable[[argparse.Namespace], None] = module.run
            verb.set_defaults(run=run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. 0: done. 2: a mistake, said in one line. 130: interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser(argv).parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("\nminidiffusion: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, MissingExtraError) as error:
        fail(str(error))
    except RuntimeError as error:
        if not is_ours(error):
            raise
        fail(str(error))
    return 0


class MissingExtraError(Exception):
    """An optional dependency is not installed; the message names the extra."""


def is_ours(error: RuntimeError) -> bool:
    """A run that diverged, or memory that ran out: the user's to mend, not a bug to trace."""
    from minidiffusion.device import out_of_memory
    from minidiffusion.training.loop import DivergedError

    return isinstance(error, DivergedError) or out_of_memory(error)
