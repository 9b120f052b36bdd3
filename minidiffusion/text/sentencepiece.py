"""SentencePiece: its .model files, protobuf messages, and what it does around the pieces."""

import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from minidiffusion.text.lattice import BYTE_PIECES, MOST_PIECES, PENALTY, Pieces, checked
from minidiffusion.text.normalise import CharacterMap, Spared, by_longest, read_map, spare

SPACE = "▁"
UNIGRAM = 1
"""The kind of model that is read, of UNIGRAM, BPE, WORD, CHAR."""
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
LENGTHS = {VARINT: -1, EIGHT: 8, BYTES: -1, FOUR: 4}
"""The ways to write a field, and of how many bytes its value is; -1 where it says so itself."""
PIECE = {1: BYTES, 2: FOUR, 3: VARINT}
TRAINER = {3: VARINT, 24: VARINT, 35: VARINT, **dict.fromkeys(range(44, 49), BYTES)}
NORMALIZER = {2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT}
"""Fields of the messages, by number: how each is written."""
SPECIAL = {"bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}
"""Where the trainer's settings name a special piece, and how it is called else."""
LARGEST_FLOAT = float.fromhex("0x1.fffffep127")
Message = dict[int, list[Any]]
"""The values of a message's fields, by number: int or bytes."""


class Row(NamedTuple):
    text: str
    score: float
    kind: int


class Sentences(NamedTuple):
    """A text is one word, normalised as a whole; names of control pieces in it are mere letters.

    prefix: a space is put before the text, or, suffix, behind it. tidy: spaces at both ends and
    doubled ones go. escape: a space is written as U+2581. spared: the pieces that users defined,
    which no rule touches. kinds: of the pieces, by id. surface: what the unknown piece is shown as.
    """

    rules: CharacterMap | None
    spared: Spared
    prefix: bool
    suffix: bool
    tidy: bool
    escape: bool
    kinds: tuple[int, ...]
    surface: str

    def words(self, text: str) -> Iterator[str | int]:
        if normal := self.normalised(text):
            yield normal

    def normalised(self, text: str) -> str:
        parts = list(by_longest(text.encode(), self.rules, self.spared))
        if not parts or (self.tidy and all(part == b" " for part in parts)):
            return ""
        space = SPACE if self.escape else " "
        normal = b"".join(tidied(parts) if self.tidy else parts).decode().replace(" ", space)
        if self.prefix and not self.suffix:
            normal = space + normal
        if self.tidy:
            normal = normal.rstrip(space)
        return normal + space if self.prefix and self.suffix else normal

    def shown(self, ids: Iterable[int], pieces: Pieces) -> str:
        """The text of ids: no control pieces, bytes that are not UTF-8 as U+FFFD one by one."""
        values = {number: byte for byte, number in pieces.byte.items()}
        found: list[str] = []
        start = self.prefix or self.tidy
        for byte, run in groupby(ids, key=values.__contains__):
            if byte:
                found.append(utf8(bytes(values[number] for number in run)))
                start = False
                continue
            for number in run:
                kind, piece = self.kinds[number], pieces.spelled[number]
                if kind == UNKNOWN:
                    piece = self.surface
                elif kind == CONTROL:
                    piece = ""
                elif start and piece.startswith(SPACE):
                    # Where spaces are not tidied away, only the one that was put there goes.
                    piece, start = piece[1:], self.tidy
                found.append(piece if kind == UNKNOWN else piece.replace(SPACE, " "))
                start = start and not piece
        return "".join(found)


def utf8(data: bytes) -> str:
    """Bytes as text; each that is not UTF-8 becomes U+FFFD."""
    text = data.decode(errors="surrogateescape")
    return "".join("\ufffd" if "\udc80" <= letter <= "\udcff" else letter for letter in text)


def tidied(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts without spaces at the start of one that follows a space, or nothing."""
    spaced = True
    for part in parts:
        left = part.lstrip(b" ") if spaced else part
        if left:
            spaced = left.endswith(b" ")
            yield left


def read_model(data: bytes) -> tuple[Pieces, Sentences]:
    """A Unigram model of SentencePiece; a ValueError says what is wrong with it."""
    model = fields(data, dict.fromkeys((1, 2, 3, 5), BYTES))
    if 1 not in model:
        raise ValueError("not a SentencePiece model: it has no pieces")
    # A message in a message may come in parts.
    trainer = fields(b"".join(model.get(2, [])), TRAINER)
    normalizer, inverse = (fields(b"".join(model.get(k, [])), NORMALIZER) for k in (3, 5))
    if (kind := last(trainer, 3, UNIGRAM)) != UNIGRAM:
        raise ValueError(f"a SentencePiece model of kind {kind}; allowed: {UNIGRAM}, Unigram")
    if last(inverse, 2, b""):
        raise ValueError("a SentencePiece model with a denormalizer, which is not read")
    fallback = bool(last(trainer, 35, 0))
    rows = [row(message, fallback) for message in model[1]]
    check_rows(rows, fallback)
    rules = last(normalizer, 2, b"")
    return pieces_of(rows, trainer), Sentences(
        rules=read_map(rules) if rules else None,
        spared=spare(row.text for row in rows if row.kind == USER),
        prefix=bool(last(normalizer, 3, 1)),
        suffix=bool(last(trainer, 24, 0)),
        tidy=bool(last(normalizer, 4, 1)),
        escape=bool(last(normalizer, 5, 1)),
        kinds=tuple(row.kind for row in rows),
        surface=last(trainer, 44, b" \xe2\x81\x87 ").decode(),
    )


def row(message: bytes, fallback: bool) -> Row:
    found = fields(message, PIECE)
    text = found[1][-1].decode() if 1 in found else ""
    (points,) = struct.unpack("<f", found[2][-1] if 2 in found else bytes(4))
    kind = found[3][-1] if 3 in found else NORMAL
    if fallback and text == "\0":
        kind = UNUSED
    elif not text or "\0" in text:
        raise ValueError(f"piece {text!r:.60}: must have letters, and no U+0000")
    if not math.isfinite(points) or not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece {text!r:.60}: score {points}, kind {kind}")
    return Row(text, points, kind)


def check_rows(rows: list[Row], fallback: bool) -> None:
    checked(row.text for row in rows)
    kinds = [row.kind for row in rows]
    apart = {(row.text, row.kind in (NORMAL, USER, UNUSED)) for row in rows}
    if len(apart) < len(rows):
        raise ValueError("two pieces are spelled alike")
    if kinds.count(UNKNOWN) > 1 or not (UNKNOWN in kinds or fallback):
        raise ValueError(f"{kinds.count(UNKNOWN)} unknown pieces; allowed: 1")
    if not {NORMAL, USER} & set(kinds):
        raise ValueError("no piece is one that a text may be cut into")
    if {row.text for row in rows if row.kind == BYTE} != (set(BYTE_PIECES) if fallback else set()):
        raise ValueError(
            "the pieces of bytes are not 256" if fallback else "pieces of bytes without use"
        )


def pieces_of(rows: list[Row], trainer: Message) -> Pieces:
    kinds = [row.kind for row in rows]
    lowest = min((row.score for row in rows if row.kind == NORMAL), default=LARGEST_FLOAT)
    special = {"unk": kinds.index(UNKNOWN) if UNKNOWN in kinds else -1}
    control = {row.text: number for number, row in enumerate(rows) if row.kind == CONTROL}
    for name, (place, usual) in SPECIAL.items():
        special[name] = control.get(last(trainer, place, b"").decode() or usual, -1)
    return Pieces(
        spelled=tuple(row.text for row in rows),
        scored=tuple(
            (row.text, number, score(row))
            for number, row in enumerate(rows)
            if row.kind in (NORMAL, USER)
        ),
        unknown=single(lowest - PENALTY),
        special=special,
        byte={BYTE_PIECES[row.text]: number for number, row in enumerate(rows) if row.kind == BYTE},
        single=True,
    )


def score(row: Row) -> float:
    """What a user defined scores so that it always wins."""
    return row.score if row.kind == NORMAL else single(0.1 * (len(row.text.encode()) - 1))


def single(number: float) -> float:
    """A number as float32 has it."""
    return array("f", [number])[0]


def fields(data: bytes, schema: Mapping[int, int]) -> Message:
    """Those fields of a protobuf message that a schema has; a ValueError for what is no message."""
    found: Message = {}
    place, size = 0, len(data)
    while place < size:
        tag, place = varint(data, place) if data[place] > 127 else (data[place], place + 1)
        number, how = tag >> 3, tag & 7
        if not number or how not in LENGTHS or schema.get(number, how) != how:
            raise ValueError(f"not a SentencePiece model: field {number} of type {how}")
        value, length = 0, LENGTHS[how]
        if length < 0:
            value, place = varint(data, place)
            length = value if how == BYTES else 0
        if length > size - place:
            raise ValueError(f"cut short: a field of {length} bytes where {size - place} are")
        if number in schema:
            several = found.setdefault(number, [])
            if len(several) == MOST_PIECES:
                raise ValueError(f"field {number}: more than {MOST_PIECES} of them")
            several.append(value if how == VARINT else data[place : place + length])
        place += length
    return found


def varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven a byte, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if place == len(data):
            raise ValueError("cut short: a number without an end")
        number |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return number, place
    raise ValueError("not a SentencePiece model: a number of more than ten bytes")


def last(message: Message, number: int, usual: Any) -> Any:
    """A field's last value, which is the one that counts."""
    return message[number][-1] if number in message else usual
