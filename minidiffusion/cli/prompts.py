"""A file of prompts, one a line: checked whole before anything is generated, then streamed."""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from minidiffusion.cli.main import fail
from minidiffusion.data.parameters import MOST_TEXT, check_texts
from minidiffusion.pipelines.settings import Settings

MOST_PROMPTS = 2**28
"""Bytes of a file of prompts, which are kept in memory: some five million prompts."""
PIECE = 2**20
"""Bytes that are read at once."""
GROWTH = 13
"""So many bytes of a PNG's text may one of a prompt become: it stands there twice, escaped."""


class PromptFile:
    """The prompts of a file, or of a pipe, as they were when it was read; len: how many."""

    def __init__(self, path: Path, template: Settings) -> None:
        """Reads all. One line and exit code 2 for what is no text, or fits no PNG's settings."""
        self.count, self.kept = 0, BytesIO()
        known = sum(len(text.encode()) for text in template.facts().values())
        certain = (MOST_TEXT - known) // GROWTH
        for first, text in pieces(path):
            lines = split_lines(text)
            for line in lines:
                if "\0" in line or 4 * len(line) > certain:
                    check(path, first, text, line, template)
            prompts = [prompt for line in lines if (prompt := line.strip())]
            self.count += len(prompts)
            self.kept.write("".join(f"{prompt}\n" for prompt in prompts).encode())
        if not self.count:
            fail(f"{path}: holds no prompts")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        self.kept.seek(0)
        for line in self.kept:
            yield line.decode().removesuffix("\n")


def pieces(path: Path, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Some lines at a time, and the number of their first; from a pipe, too, or without end.

    errors: what becomes of bytes that are no UTF-8, see `bytes.decode`; strict ends with one line.
    """
    first, total, rest = 1, 0, b""
    with path.open("rb") as file:
        while data := file.read(PIECE):
            total += len(data)
            if total > MOST_PROMPTS:
                fail(f"{path}: more than {MOST_PROMPTS} bytes of prompts")
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if len(rest) > MOST_TEXT:
                fail(f"{path}: line {first}: more than {MOST_TEXT} bytes")
            yield first, decoded(path, first, whole + newline, errors)
            first += whole.count(b"\n") + len(newline)
    yield first, decoded(path, first, rest, errors)


def split_lines(text: str) -> list[str]:
    """As files have them; `str.splitlines` ends a line at other characters, too."""
    return re.split(r"\r\n|\r|\n", text)


def decoded(path: Path, first: int, data: bytes, errors: str) -> str:
    try:
        return (data.removeprefix(BOM_UTF8) if first == 1 else data).decode(errors=errors)
    except UnicodeDecodeError as error:
        number = first + data.count(b"\n", 0, error.start)
        fail(f"{path}: not UTF-8 text: line {number}")


def check(path: Path, first: int, text: str, line: str, template: Settings) -> None:
    """What a PNG cannot hold is reported with its line."""
    try:
        check_texts(replace(template, prompt=line.strip()).facts())
    except ValueError as error:
        fail(f"{path}: line {first + text[: text.index(line)].count(chr(10))}: {error}")
