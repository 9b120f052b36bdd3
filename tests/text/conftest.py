"""The reference tokenizer, made offline from the same merges, and lines to compare it on."""

import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minidiffusion

MERGES = Path(minidiffusion.__file__).parent / "assets" / "clip" / "merges.txt.xz"
CAPTIONS = Path(__file__).parent / "data" / "captions.txt.xz"
Lines = Callable[[int, int], Iterator[str]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' CLIPTokenizer from the two files that it is shipped as."""
    from transformers import CLIPTokenizer

    merges = lzma.decompress(MERGES.read_bytes()).decode()
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in seen] + [chr(256 + k) for k in range(256 - len(seen))]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    vocabulary += [line.replace(" ", "") for line in merges.splitlines()]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    assert len(vocabulary) == len(set(vocabulary)) == 49408
    folder = tmp_path_factory.mktemp("tokenizer")
    numbers = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    return CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return lzma.decompress(CAPTIONS.read_bytes()).decode().splitlines()


@pytest.fixture(scope="session")
def lines(captions: list[str]) -> Lines:
    """So many lines of a seed: captions, and what people and fuzzers make of them."""

    def generate(count: int, seed: int) -> Iterator[str]:
        draw = random.Random(seed)
        kinds = [caption, mixed, characters, marks, specials, spelled]
        for k in range(count):
            yield captions[draw.randrange(len(captions))] if k % 2 else draw.choice(kinds)(draw)

    def caption(draw: random.Random) -> str:
        text = draw.choice(captions)
        return draw.choice([text.upper(), text.title(), text[::-1], text.replace(" ", "\u200d")])

    def mixed(draw: random.Random) -> str:
        words = [word for _ in range(3) for word in draw.choice(captions).split()]
        glue = [
            "",
            " ",
            "'",
            "'s ",
            "'LL",
            "’s",
            ",",
            "!!",
            "--",
            "1",
            "२٣",
            "\t\n",
            "\x00",
            "</w>",
        ]
        glue += [
            "<|",
            "|>",
            "\u3000",
            "\x85",
            "\x1c",
            "\ufeff",
            "\u200b",
            "ﬁ",
            "İ",
            "Σ ",
            "ΑΣ",
            "ß",
        ]
        return "".join(draw.choice(words) + draw.choice(glue) for _ in range(draw.randrange(12)))

    def characters(draw: random.Random) -> str:
        tops = [0x20, 0x100, 0x600, 0x3000, 0xD7FF, 0x20000, 0x110000]
        codes = [draw.randrange(draw.choice(tops)) for _ in range(draw.randrange(1, 30))]
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    def marks(draw: random.Random) -> str:
        blocks = [(0x300, 0x370), (0x41, 0x5B), (0x1AB0, 0x1B00), (0x1100, 0x1200), (0x900, 0xE00)]
        blocks += [(0x591, 0x700), (0x1DC0, 0x2000), (0xAC00, 0xAC40), (0x1F300, 0x1FB00)]
        blocks += [(0x11000, 0x12000), (0x105C0, 0x10600), (0x16100, 0x16170), (0x1E000, 0x1E900)]
        blocks += [(0x10D00, 0x10F00), (0x16D40, 0x16D80), (0xA640, 0xAB00), (0x1D100, 0x1D260)]
        some = [draw.choice([*blocks, blocks[0], blocks[1]]) for _ in range(draw.randrange(1, 16))]
        return "".join(chr(draw.randrange(*block)) for block in some)

    def specials(draw: random.Random) -> str:
        parts = ["<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|>", "<|", "|>"]
        parts += [
            "a",
            " ",
            "!",
            "endoftext",
            "e",
            "\u0301",
            "'",
            "s",
            "<|startoftext",
            "7",
            "🐈",
            "Σ",
        ]
        return "".join(draw.choice(parts) for _ in range(draw.randrange(1, 12)))

    def spelled(draw: random.Random) -> str:
        letters = draw.choice(["ab", "aeiou'st ", "abcdefghijklmnopqrstuvwxyz ", "0123456789.,:-/"])
        return "".join(draw.choice(letters) for _ in range(draw.randrange(1, 80)))

    return generate
