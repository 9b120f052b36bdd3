"""All ways to cut a text into pieces, and the best of them (Viterbi 1967; Kudo 2018)."""

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

LONGEST_PIECE = 1000
"""Letters of a piece; the time for a text is bounded by its length times this."""
MOST_PIECES = 1_000_000
MOST_LETTERS = 4_000_000
"""Of all pieces together: each may cost a node of 250 bytes; mT5's 250,000 pieces have a third."""
PENALTY = 10.0
"""An unknown character scores so much less than the worst piece."""
FAR = 100_000.0
"""Sums of scores at which SentencePiece begins anew, as float32 has few digits left there."""
UNKNOWN, NONE = -1, -2
"""Ids of a character that is no piece, and of the beginnings of pieces."""
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
"""How pieces are spelled that stand for a byte."""
ROOT, STRANGER = 0, 1
"""Nodes: where a text begins, and where letters lead that no piece begins with."""


class Pieces(NamedTuple):
    """What a file says of its pieces.

    spelled: each, by id. scored: what a text may be cut into, as (piece, id, score); of two that
    are spelled alike the later counts. unknown: the score of an unknown character. special: ids by
    name (unk, bos, eos, pad), -1 where the file has none. byte: the pieces for the bytes of what is
    unknown, where the file has them. single: scores are added in float32.
    """

    spelled: tuple[str, ...]
    scored: tuple[tuple[str, int, float], ...]
    unknown: float
    special: Mapping[str, int]
    byte: Mapping[int, int]
    single: bool


class Lattice(NamedTuple):
    """A trie, by nodes: where a letter leads, the id and the score of the piece that ends there."""

    after: list[dict[str, int]]
    ids: list[int]
    scores: list[float]
    longest: int
    single: bool

    def best(self, text: str) -> list[tuple[int, int, int]]:
        """The pieces of the highest sum of scores as (begin, end, id), in order; UNKNOWN is an id.

        Where sums are equal, a piece that begins earlier wins, as in SentencePiece.
        """
        after, ids, scores, size = self.after, self.ids, self.scores, len(text)
        sums = array("f" if self.single else "d", [0.0]) * (size + 1)
        begins, pieces, first = [-1] * (size + 1), [UNKNOWN] * (size + 1), after[ROOT]
        for begin, letter in enumerate(text):
            if self.single and abs(sums[begin]) > FAR:
                count_anew(sums, begins, begin, min(begin + self.longest, size))
            here, end, node = sums[begin], begin + 1, first.get(letter, STRANGER)
            while node:
                if ids[node] > NONE:
                    fresh, old, total = begins[end] < 0, sums[end], here + scores[node]
                    if fresh or total > old:
                        sums[end] = total
                        # What is more as a sum in float64 may be the same when it is rounded.
                        if fresh or sums[end] > old:
                            begins[end], pieces[end] = begin, ids[node]
                if end == size:
                    break
                node = after[node].get(text[end], ROOT)
                end += 1
        return traced(begins, pieces)


def count_anew(sums: "array[float]", begins: list[int], begin: int, last: int) -> None:
    """Take the sum of the best way to a place off those of the places that are reached so far."""
    taken = sums[begin]
    for place in range(begin, last + 1):
        if place == begin or begins[place] >= 0:
            sums[place] -= taken


def traced(begins: list[int], pieces: list[int]) -> list[tuple[int, int, int]]:
    found, end = [], len(begins) - 1
    while end > 0:
        found.append((begins[end], end, pieces[end]))
        end = begins[end]
    return found[::-1]


def lattice(pieces: Pieces) -> Lattice:
    """The trie of the pieces, in which every character alone is a piece, if only an unknown one."""
    after: list[dict[str, int]] = [{}, {}]
    ids, scores = [NONE, UNKNOWN], [0.0, pieces.unknown]
    for piece, number, score in pieces.scored:
        node = ROOT
        for letter in piece:
            if letter not in after[node]:
                after[node][letter] = len(after)
                after.append({})
                ids.append(UNKNOWN if node == ROOT else NONE)
                scores.append(pieces.unknown)
            node = after[node][letter]
        ids[node], scores[node] = number, score
    longest = max((len(piece) for piece, _, _ in pieces.scored), default=1)
    return Lattice(after, ids, scores, longest, pieces.single)


def checked(pieces: Iterable[str]) -> tuple[str, ...]:
    """Pieces within bounds; a ValueError names the first that is not."""
    found: list[str] = []
    letters = 0
    for piece in pieces:
        letters += len(piece)
        if letters > MOST_LETTERS:
            raise ValueError(f"piece {len(found)}: beyond {MOST_LETTERS} letters of all pieces")
        if len(piece) > LONGEST_PIECE or len(found) == MOST_PIECES:
            raise ValueError(
                f"piece {len(found)}: {len(piece)} letters long; allowed: {MOST_PIECES} pieces "
                f"of {LONGEST_PIECE} letters"
            )
        found.append(piece)
    return tuple(found)
