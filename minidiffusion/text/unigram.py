"""Unigram language models (Kudo 2018), T5's among them: text <-> numbers.

Of all ways to cut a text into pieces the most probable one counts, the pieces being independent.
Two programs do that around the same models and differ in more than they say. `sentencepiece` reads
.model files; `tokenizers` reads tokenizer.json, and is what transformers' tokenizers run. A file is
read as its own program reads it. What they do differently, as measured:

- `tokenizers` recognises added tokens such as </s> and <extra_id_0> in the text and cuts what is
  between them on its own; to `sentencepiece` they are letters.
- `sentencepiece` replaces the longest match of the character map; `tokenizers` the shortest one at
  the start of a grapheme of less than six bytes, and drops the rest of that grapheme: of a letter
  with two accents, the second; longer graphemes (the Hangul syllables spelled as jamo) it replaces
  character by character and so leaves apart.
- `sentencepiece` cuts the whole text at once and adds scores up in float32; `tokenizers` word by
  word in float64: near ties may fall differently, and unknown characters join across a "▁" only
  where that is no piece.
- `tokenizers` takes every piece of the file for text, control pieces too: a full-width </s> ends
  the text.
"""

import lzma
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from minidiffusion.text.bpe import CACHED, LONG, check
from minidiffusion.text.lattice import UNKNOWN, Lattice, Pieces, lattice
from minidiffusion.text.sentencepiece import Sentences, read_model
from minidiffusion.text.tokenizer_json import Steps, read_json
from minidiffusion.text.words import ASSETS

LARGEST_FILE = 1 << 25
"""Bytes; the largest vocabulary in use, mT5's, has 16 million as tokenizer.json."""


@dataclass(frozen=True, eq=False)
class Unigram:
    """A tokenizer of pieces with scores; `Unigram.from_file` reads one, `t5_tokenizer` has T5's.

    pieces: those of the file. way: what is done with a text before it is cut, and afterwards.
    """

    pieces: Pieces = field(repr=False)
    way: Sentences | Steps = field(repr=False)

    @classmethod
    def from_file(cls, path: Path | str) -> "Unigram":
        """Reads a SentencePiece .model or a tokenizer.json, known by its content, of type Unigram.

        Nothing in it is executed. Raises ValueError, in one line, for a file that is damaged, of
        another kind, or that asks for something that is not read; OSError if it cannot be opened.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ValueError(f"{path}: a tokenizer of more than {LARGEST_FILE >> 20} MB")
        try:
            return cls.from_bytes(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "Unigram":
        """As from_file, from what the file holds."""
        if not data.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r").startswith(b"{"):
            return cls(*read_model(data))
        try:
            return cls(*read_json(data))
        except RecursionError:
            raise ValueError("nested too deeply") from None

    @property
    def vocabulary(self) -> int:
        """How many pieces there are, added tokens among them: 32,100 of T5."""
        return len(self.pieces.spelled)

    @property
    def unk(self) -> int:
        """The id of what is unknown; -1 where that is always spelled in bytes."""
        return self.pieces.special["unk"]

    @property
    def bos(self) -> int:
        """The id of the start of a text, <s>; -1 where there is none, as in T5."""
        return self.pieces.special["bos"]

    @property
    def eos(self) -> int:
        """The id of the end of a text, </s>; -1 where there is none."""
        return self.pieces.special["eos"]

    @property
    def pad(self) -> int:
        """The id of padding, <pad>; -1 where there is none."""
        return self.pieces.special["pad"]

    @cached_property
    def _lattice(self) -> Lattice:
        return lattice(self.pieces)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """What a run of unknown characters may be after all; SentencePiece does not look."""
        return {} if self.pieces.single else {piece: k for piece, k, _ in self.pieces.scored}

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """The ids of words that came before."""
        return {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, with neither start nor end.

        The time is linear in its length. Raises ValueError for a lone surrogate, which is no text.
        """
        check(text)
        known, ids = self._known, []
        for word in self.way.words(text):
            if isinstance(word, int):
                ids.append(word)
                continue
            if (cut := known.get(word)) is None:
                cut = self._cut(word)
                if len(known) < CACHED and len(word) < LONG:
                    known[word] = cut
            ids += cut
        return ids

    def _cut(self, word: str) -> list[int]:
        """The ids of a word, in which what is unknown is one run however long."""
        ids: list[int] = []
        run, unk = 0, self.unk
        for begin, end, number in self._lattice.best(word):
            if number in (UNKNOWN, unk):
                continue
            if run < begin:
                ids += self._unknown(word[run:begin])
            ids.append(number)
            run = end
        return ids + self._unknown(word[run:]) if run < len(word) else ids

    def _unknown(self, run: str) -> list[int]:
        byte = self.pieces.byte
        if (number := self._ids.get(run)) is not None:
            return [number]
        spelled = [byte.get(one, UNKNOWN) for one in run.encode()] if byte else [UNKNOWN]
        return [self.unk] if UNKNOWN in spelled else spelled

    def spelled(self, text: str) -> list[str]:
        """The pieces of a text as the vocabulary spells them, such as ▁hello."""
        return [self.pieces.spelled[number] for number in self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids as the file's own program shows it; ValueError for an id that is none."""
        ids = list(ids)
        for number in {min(ids, default=0), max(ids, default=0)}:
            if not 0 <= number < self.vocabulary:
                raise ValueError(f"token: must be 0..{self.vocabulary - 1}, got {number}")
        return self.way.shown(ids, self.pieces)


@cache
def t5_tokenizer() -> Unigram:
    """T5's own tokenizer, read once: the ids of transformers' T5TokenizerFast without the final 1.

    transformers 5 splits at white space first, whatever the tokenizer.json says; that of T5's first
    release has a "▁" more for white space at the end of the text or beside an added token.
    `sentencepiece` with T5's spiece.model knows neither the extra ids nor </s> in a text; what else
    differs is said above. Source: Raffel et al. 2020; the file's README says where it is from.
    """
    return Unigram.from_bytes(t5_json())


def t5_json() -> bytes:
    """T5's tokenizer.json, as the package carries it."""
    return lzma.decompress((ASSETS.parent / "t5" / "tokenizer.json.xz").read_bytes())
