"""Byte-pair encoding (Sennrich et al. 2016) on bytes, with CLIP's vocabulary: text <-> numbers.

A word starts as its UTF-8 bytes, of which the last one carries the end of the word; then the pair
that stands first in the list of merges becomes one, again and again. The list is the vocabulary:
256 bytes, the same 256 at the end of a word, one token a merge, the start and the end of a text.
"""

import lzma
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from minidiffusion.text.chunks import chunks
from minidiffusion.text.words import ASSETS, BOS, EOS, SPECIAL, Dialect, words

Ids = Int[Tensor, "b n"]
Merge = tuple[str, str]
END = "</w>"
CLIP_MERGES = 48_894
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTED + [byte for byte in range(256) if byte not in PRINTED]
"""Bytes in the vocabulary's order: those that Latin-1 prints come first."""
SPELLED = {byte: chr(byte if k < 188 else 68 + k) for k, byte in enumerate(BYTES)}
"""How the vocabulary spells a byte: those 188 as themselves, the rest from U+0100 on."""
ID_OF = {byte: number for number, byte in enumerate(BYTES)}
BYTE_OF = {letter: byte for byte, letter in SPELLED.items()}
CACHED = 65_536
"""So many words are remembered; a prompt has a few, a data set of captions some thousands."""
LONG = 64
"""Letters from which on a word is not remembered."""
SHOWN = 60
"""Letters of what was cut off that a warning shows."""


class Vocabulary(NamedTuple):
    """tokens: how each is spelled. pairs: what left * len(tokens) + right become."""

    tokens: list[str]
    pairs: dict[int, int]


@dataclass(frozen=True)
class BPE:
    """CLIP's tokenizer; cheap to make, it reads its merges when it is first used.

    dialect: "clip" gives the ids of transformers' CLIPTokenizer, Stable Diffusion's reference;
    "openai" cleans the text as CLIP's authors do (HTML unescaped, quotes straight; see
    `minidiffusion.text.words.plainer` for what is left out). merges: others than CLIP's, in their
    order, spelled as there; a ValueError names a merge of parts that do not exist, or a second one
    with the same result.
    """

    dialect: Dialect = "clip"
    merges: tuple[Merge, ...] | None = field(default=None, repr=False)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are: 49,408 of CLIP."""
        return 2 * 256 + (CLIP_MERGES if self.merges is None else len(self.merges)) + 2

    @property
    def bos(self) -> int:
        return self.vocabulary - 2

    @property
    def eos(self) -> int:
        return self.vocabulary - 1

    @cached_property
    def _table(self) -> Vocabulary:
        return clip_table() if self.merges is None else table(self.merges)

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """The ids of words that came before."""
        if self.dialect == "openai":
            return {BOS: [self.bos], EOS: [self.eos]}
        # The reference takes "<|ENDOFTEXT|>" for a word, and then that word apart.
        apart = {one: [one[:2], one[2:-2], one[-2:]] for one in (BOS, EOS)}
        return {one: [n for part in apart[one] for n in self._merged(part)] for one in apart}

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, with neither start nor end; specials in it count.

        Raises ValueError for a lone surrogate, which is no text.
        """
        check(text)
        if self.dialect == "openai":
            return self._ids(words(text, "openai"))
        ids: list[int] = []
        for part in SPECIAL.split(text):
            # A special token is what the user wrote, before anything is cleaned or lowered.
            special = {BOS: self.bos, EOS: self.eos}.get(part)
            ids += self._ids(words(part, "clip")) if special is None else [special]
        return ids

    def _ids(self, found: Iterable[str]) -> list[int]:
        known, ids = self._known, []
        for word in found:
            if (merged := known.get(word)) is None:
                merged = self._merged(word)
                if len(known) < CACHED and len(word) < LONG:
                    known[word] = merged
            ids += merged
        return ids

    def _merged(self, word: str) -> list[int]:
        ids = [ID_OF[byte] for byte in word.encode()]
        ids[-1] += 256
        return merge(ids, self._table)

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text as the vocabulary spells them, such as astro, naut</w>."""
        return [self._table.tokens[number] for number in self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, in lower case, words apart; bytes that are not UTF-8 become U+FFFD."""
        ids = list(ids)
        for number in {min(ids, default=0), max(ids, default=0)}:
            self._check("token", number)
        letters = "".join(self._table.tokens[number] for number in ids)
        text = bytes(BYTE_OF[letter] for letter in letters).decode(errors="replace")
        return text.replace(END, " ").strip()

    def tokenize(
        self, texts: str | Sequence[str], pad: int | None = None, length: int = 77, *,
        warn: bool = True,
    ) -> Ids:  # fmt: skip
        """Ids (b, length) for a text encoder: start, text, end, padding.

        pad: what fills the rest; None is the end again, as in Stable Diffusion 1; OpenCLIP has 0.
        A text that is too long is cut, and a warning shows what was lost; `chunks` keeps it.
        """
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids, lost = self.cut(self.encode(text), length - 2)
            if lost and warn:
                warnings.warn(lost, stacklevel=2)
            rows += chunks(ids, self.bos, self.eos, self.padding(pad), length)
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)

    def cut(self, ids: list[int], room: int) -> tuple[list[int], str]:
        """The first ids, and a line that shows which did not fit, if any."""
        return cut(ids, room, self.decode, "tokens")

    def padding(self, pad: int | None) -> int:
        """The id to pad with; a ValueError for one that is no token."""
        return self.eos if pad is None else self._check("pad", pad)

    def _check(self, name: str, number: int) -> int:
        if not 0 <= number < self.vocabulary:
            raise ValueError(f"{name}: must be 0..{self.vocabulary - 1}, got {number}")
        return number


def cut(
    ids: list[int], room: int, decode: Callable[[list[int]], str], kind: str
) -> tuple[list[int], str]:
    """`BPE.cut` for any tokenizer. kind: what its ids are called."""
    if len(ids) <= room:
        return ids, ""
    lost = decode(ids[room : room + SHOWN])
    more = "..." if len(lost) > SHOWN or len(ids) > room + SHOWN else ""
    return ids[:room], (
        f"prompt: {len(ids)} {kind}, of which {room} fit; cut off: {lost[:SHOWN] + more!r}"
    )


def check(text: str) -> None:
    """A ValueError for what UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"prompt: U+{code:04X} at character {error.start + 1} is half of a character; "
            "allowed: any Unicode text"
        ) from None


@cache
def clip_merges() -> tuple[Merge, ...]:
    lines = lzma.decompress((ASSETS / "merges.txt.xz").read_bytes()).decode().splitlines()
    return tuple((left, right) for left, _, right in (line.partition(" ") for line in lines))


@cache
def clip_table() -> Vocabulary:
    """CLIP's own vocabulary, read once."""
    return table(clip_merges())


@cache
def shortened(vocabulary: int) -> BPE:
    """CLIP's tokenizer with so many tokens only: its first merges, which are the most frequent.

    Raises ValueError for fewer than the 514 that need no merge, or more than CLIP's.
    """
    least, most = BPE(merges=()).vocabulary, BPE().vocabulary
    if not least <= vocabulary <= most:
        raise ValueError(f"vocabulary: must be {least}..{most}, got {vocabulary}")
    return BPE() if vocabulary == most else BPE(merges=clip_merges()[: vocabulary - least])


def table(merges: Sequence[Merge]) -> Vocabulary:
    letters = [SPELLED[byte] for byte in BYTES]
    tokens = [*letters, *(letter + END for letter in letters)]
    size = len(tokens) + len(merges) + 2
    ids = {token: number for number, token in enumerate(tokens)}
    pairs: dict[int, int] = {}
    for left, right in merges:
        if left not in ids or right not in ids or left + right in ids:
            wrong = "is made twice" if left + right in ids else "is of unknown parts"
            raise ValueError(f"merges: row {len(pairs) + 1}: {left!r} + {right!r} {wrong}")
        pairs[ids[left] * size + ids[right]] = ids[left + right] = len(tokens)
        tokens.append(left + right)
    return Vocabulary([*tokens, BOS, EOS], pairs)


def merge(ids: list[int], table: Vocabulary) -> list[int]:
    """Merge what can be merged, the earliest row of the list first and from left to right.

    A token is made by one row only and used by later ones, so one round through the rows that
    occur is enough: n log n for a word of n bytes, however long.
    """
    pairs, size, end = table.pairs, len(table.tokens), len(ids)
    before, after = [*range(-1, end - 1)], [*range(1, end + 1)]
    places: dict[int, list[int]] = {}
    for place, (left, right) in enumerate(pairwise(ids)):
        if (row := pairs.get(left * size + right)) is not None:
            places.setdefault(row, []).append(place)
    rows = list(places)
    heapify(rows)
    while rows:
        row = heappop(rows)
        for here in sorted(places.pop(row)):
            there = after[here]
            # What is gone is -1, which no pair has.
            if there == end or pairs.get(ids[here] * size + ids[there]) != row:
                continue
            ids[here], ids[there] = row, -1
            beyond = after[here] = after[there]
            if beyond < end:
                before[beyond] = here
            for first, second in ((before[here], here), (here, beyond)):
                if first < 0 or second == end:
                    continue
                new = pairs.get(ids[first] * size + ids[second])
                if new is None:
                    continue
                if new not in places:
                    places[new] = []
                    heappush(rows, new)
                places[new].append(first)
    return [number for number in ids if number >= 0]
