"""Files of Unigram tokenizers, made from nothing: character maps, .model files, tokenizer.json."""

import json
import struct
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
FREE = 1 << 31
"""A unit that no byte leads to."""


def character_map(rules: Mapping[str, str]) -> bytes:
    """The rules as a double array (Aoe 1989, as darts-clone lays it out) and a pool of strings."""
    pool, tree = b"", {}
    for key, text in rules.items():
        node = tree
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[None] = len(pool)
        pool += text.encode() + b"\0"
    units = [FREE] * 256
    units[0] = 0
    taken, bases = {0}, {0}
    todo: list[tuple[int, Any]] = [(0, tree)]
    while todo:
        place, node = todo.pop()
        labels = [label or 0 for label in node]
        base = 1
        while base in bases or any(base ^ label in taken for label in labels):
            base += 1
        bases.add(base)
        units += [FREE] * (256 * (base // 256 + 1) - len(units))
        units[place] |= (place ^ base) << 10 | (None in node) << 8
        for label, child in node.items():
            taken.add(base ^ (label or 0))
            units[base ^ (label or 0)] = FREE | child if label is None else label
            if label is not None:
                todo.append((base ^ label, child))
    assert len(units) < 1 << 21
    return packed_map(units, pool)


def packed_map(units: Sequence[int], pool: bytes) -> bytes:
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + pool


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    few = []
    while number >= 128:
        few.append(number & 127 | 128)
        number >>= 7
    return bytes([*few, number])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(fields: Mapping[int, int | float | str | bytes]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


Piece = tuple[str, float, int]


def model(
    pieces: Sequence[Piece],
    trainer: Mapping[int, Any] | None = None,
    normalizer: Mapping[int, Any] | None = None,
) -> bytes:
    """A SentencePiece .model file; a piece is its spelling, score and kind."""
    rows = b"".join(field(1, message({1: p, 2: float(s), 3: kind})) for p, s, kind in pieces)
    return rows + field(2, message(trainer or {})) + field(3, message(normalizer or {}))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def tokenizer_json(
    pieces: Sequence[tuple[str, float]], rules: bytes | None = None, **changes: Any
) -> dict[str, Any]:
    """A tokenizer.json of the piece <unk> and others; changes: other keys, or keys of the model."""
    charsmap = {"type": "Precompiled", "precompiled_charsmap": b64encode(rules or b"").decode()}
    inner = {key: changes.pop(key) for key in ("unk_id", "byte_fallback") if key in changes}
    vocabulary = [list(piece) for piece in pieces]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": charsmap if rules else None,
        "pre_tokenizer": METASPACE,
        "post_processor": None,
        "decoder": METASPACE,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, **inner},
    } | changes


def written(folder: Path, data: bytes | dict[str, Any]) -> Path:
    path = folder / ("spiece.model" if isinstance(data, bytes) else "tokenizer.json")
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path
