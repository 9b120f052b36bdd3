"""HuggingFace's tokenizer.json of Unigram models, and what `tokenizers` does around the pieces."""

import binascii
import json
import math
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from minidiffusion.text.lattice import BYTE_PIECES, PENALTY, Pieces, checked
from minidiffusion.text.normalise import LONGEST_RESULT, by_grapheme, read_map

T = TypeVar("T")
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
"""What Unicode calls white space, which is less than Python does."""
SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
NORMALIZERS = "Sequence, Precompiled, Strip, Replace"
CUTTERS = "Sequence, WhitespaceSplit, Metaspace"
MOST_ADDED, MOST_ADDED_LETTERS = 10_000, 200_000
MOST_STEPS, MOST_GROWTH = 16, 16
"""Of a normalizer, and of a pre-tokenizer; T5's have three and one. Growth multiplies."""
WORST = 1e30
"""A bound on scores, so that no sum of them is infinite."""
HALF = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON can spell and UTF-8 cannot."""
Normal = partial[str]
Cut = Callable[[str, bool], Iterable[str]]
"""Words of a text, which may be its start."""
Table = dict[str, Any]


class Added(NamedTuple):
    """A token that is recognised before anything else; left, right: white space there goes."""

    number: int
    left: bool
    right: bool


class Steps(NamedTuple):
    """Added tokens are recognised in the text as it is; what lies between is normalised, then cut.

    pattern: of the added tokens. space, first: the sign for a space, and whether those of the first
    piece are not shown.
    """

    pattern: re.Pattern[str] | None
    added: Mapping[str, Added]
    normal: tuple[Normal, ...]
    cuts: tuple[Cut, ...]
    space: str
    first: bool

    def words(self, text: str) -> Iterator[str | int]:
        parts = self.pattern.split(text) if self.pattern else [text]
        for k, part in enumerate(parts):
            if k % 2:
                yield self.added[part].number
                continue
            if k and self.added[parts[k - 1]].right:
                part = part.lstrip(WHITE)
            if k + 1 < len(parts) and self.added[parts[k + 1]].left:
                part = part.rstrip(WHITE)
            for normal in self.normal:
                part = normal(part)
            found = [part] if part else []
            for cut in self.cuts:
                found = [word for one in found for word in cut(one, k == 0)]
            yield from found

    def shown(self, ids: Iterable[int], pieces: Pieces) -> str:
        """The text of ids; special pieces are shown as they are spelled."""
        spelled = [pieces.spelled[number] for number in ids]
        if spelled and self.first:
            spelled[0] = spelled[0].replace(self.space, "")
        return "".join(spelled).replace(self.space, " ")


def by_white(text: str, start: bool) -> list[str]:
    """The words between white space."""
    return re.findall(f"[^{WHITE}]+", text)


def by_space(text: str, start: bool, space: str, scheme: str, split: bool) -> list[str]:
    """The words with the sign for a space before each."""
    text = text.replace(" ", space)
    put = scheme == "always" or (scheme == "first" and start)
    if put and not text.startswith(space):
        text = space + text
    pattern = f"{re.escape(space)}[^{re.escape(space)}]*|[^{re.escape(space)}]+"
    return re.findall(pattern, text) if split else [text]


def read_json(data: bytes) -> tuple[Pieces, Steps]:
    """A Unigram model of `tokenizers`; a ValueError says what is wrong with it.

    Read are the pieces, added tokens, normalizer, pre_tokenizer and decoder. Padding, truncation
    and the post_processor, which adds the end of the text, are the caller's.
    """
    found = json.loads(data.decode().removeprefix("\ufeff"))
    model = item(found, "model", dict)
    if model.get("type", "Unigram") != "Unigram":
        raise ValueError(f"model.type: must be Unigram, got {model['type']!r}")
    rows = [row(one, k) for k, one in enumerate(item(model, "vocab", list))]
    unknown = item(model, "unk_id", int)
    if not 0 <= unknown < len(rows):
        raise ValueError(f"model.unk_id: must be 0..{len(rows) - 1}, got {unknown}")
    ids = {piece: number for number, (piece, _) in enumerate(rows)}
    added = dict(added_tokens(item(found, "added_tokens", list, []), ids, len(rows)))
    spelled = checked([piece for piece, _ in rows] + [t for t in added if t not in ids])
    known = ids | {text: one.number for text, one in added.items()}
    fallback = item(model, "byte_fallback", bool, False)
    pieces = Pieces(
        spelled=spelled,
        scored=tuple((piece, number, score) for number, (piece, score) in enumerate(rows)),
        unknown=min(score for _, score in rows) - PENALTY,
        special={"unk": unknown} | {name: known.get(SPECIAL[name], -1) for name in SPECIAL},
        byte={byte: ids[text] for text, byte in BYTE_PIECES.items() if fallback and text in ids},
        single=False,
    )
    return pieces, steps(found, added)


def steps(found: Table, added: Mapping[str, Added]) -> Steps:
    by_length = sorted(added, key=len, reverse=True)
    decoder = item(found, "decoder", dict)
    if decoder.get("type") != "Metaspace":
        raise ValueError(f"decoder.type: must be Metaspace, got {decoder.get('type')!r}")
    space, scheme, _ = metaspace(decoder)
    normal = bounded("normalizer", normals(item(found, "normalizer", dict, {})))
    longer = math.prod(step.keywords.get("longer", 1) for step in normal)
    if longer > MOST_GROWTH or sum(step.func is by_grapheme for step in normal) > 1:
        raise ValueError(f"normalizer: its steps make a text more than {MOST_GROWTH} times longer")
    shifted = any(step.keywords.get("left") for step in normal)
    return Steps(
        pattern=re.compile(f"({'|'.join(map(re.escape, by_length))})") if by_length else None,
        added=added,
        normal=normal,
        cuts=bounded("pre_tokenizer", cuts_of(item(found, "pre_tokenizer", dict, {}), not shifted)),
        space=space,
        first=scheme != "never",
    )


def bounded(name: str, steps: Iterable[T]) -> tuple[T, ...]:
    found = tuple(islice(steps, MOST_STEPS + 1))
    if len(found) > MOST_STEPS:
        raise ValueError(f"{name}: more than {MOST_STEPS} steps")
    return found


def normals(found: Table) -> Iterator[Normal]:
    """What a normalizer does, step by step."""
    kind = found.get("type")
    if kind == "Sequence":
        for one in item(found, "normalizers", list):
            yield from normals(one)
    elif kind == "Precompiled":
        text = item(found, "precompiled_charsmap", str)
        try:
            yield partial(by_grapheme, rules=read_map(b64decode(text, validate=True)))
        except binascii.Error as error:
            raise ValueError(f"normalizer.precompiled_charsmap: {error}") from None
    elif kind == "Strip":
        yield partial(
            strip, left=item(found, "strip_left", bool), right=item(found, "strip_right", bool)
        )
    elif kind == "Replace":
        pattern, content = item(found, "pattern", dict), item(found, "content", str)
        old = item(pattern, "String", str, "")
        # A pattern of a file may take for ever, so the one that tokenizers of T5 have is known.
        known = pattern == {"Regex": " {2,}"} or (list(pattern) == ["String"] and old)
        if not known or len(content) > LONGEST_RESULT:
            raise ValueError(f"normalizer: {pattern!r:.60} to {content!r:.60} is not read")
        expression = re.compile(re.escape(old) if old else " {2,}")
        longer = max(1, -(-len(content) // len(old or "  ")))
        yield partial(replace, pattern=expression, content=content, longer=longer)
    elif found:
        raise ValueError(f"normalizer.type: {kind!r} is not read; allowed: {NORMALIZERS}")


def replace(text: str, pattern: re.Pattern[str], content: str, longer: int) -> str:
    """longer: so many times at most, which the file's reader asks for."""
    return pattern.sub(content.replace("\\", "\\\\"), text)


def strip(text: str, left: bool, right: bool) -> str:
    text = text.lstrip(WHITE) if left else text
    return text.rstrip(WHITE) if right else text


def cuts_of(found: Table, alone: bool) -> Iterator[Cut]:
    """What a pre-tokenizer does, step by step; alone: no other step takes a text's start away."""
    kind = found.get("type")
    if kind == "Sequence":
        for one in item(found, "pretokenizers", list):
            yield from cuts_of(one, False)
    elif kind == "WhitespaceSplit":
        yield by_white
    elif kind == "Metaspace":
        space, scheme, split = metaspace(found)
        if scheme == "first" and not alone:
            raise ValueError("prepend_scheme: first is not read with other steps")
        yield partial(by_space, space=space, scheme=scheme, split=split)
    elif found:
        raise ValueError(f"pre_tokenizer.type: {kind!r} is not read; allowed: {CUTTERS}")


def metaspace(found: Table) -> tuple[str, str, bool]:
    """The sign for a space, where one is put before a text, whether the text is cut at them."""
    usual = "always" if item(found, "add_prefix_space", bool, True) else "never"
    space, scheme = item(found, "replacement", str), item(found, "prepend_scheme", str, usual)
    if len(space) != 1 or scheme not in ("always", "first", "never"):
        raise ValueError(f"Metaspace: replacement {space!r}, prepend_scheme {scheme!r}")
    return space, scheme, item(found, "split", bool, True)


def added_tokens(
    found: list[object], ids: Mapping[str, int], size: int
) -> Iterator[tuple[str, Added]]:
    """Added tokens by their text; those that are no pieces have the numbers after the pieces."""
    if len(found) > MOST_ADDED:
        raise ValueError(f"added_tokens: {len(found)} tokens; allowed: {MOST_ADDED}")
    letters = sum(len(item(one, "content", str)) for one in found)
    if letters > MOST_ADDED_LETTERS:
        raise ValueError(f"added_tokens: {letters} letters; allowed: {MOST_ADDED_LETTERS}")
    known = dict(ids)
    for one in found:
        text, number = item(one, "content", str), item(one, "id", int)
        left, right = item(one, "lstrip", bool, False), item(one, "rstrip", bool, False)
        if item(one, "single_word", bool, False) or item(one, "normalized", bool, False):
            raise ValueError(f"added token {text!r:.60}: single_word, normalized must be false")
        expected = known.setdefault(text, size + len(known) - len(ids))
        if not text or HALF.search(text) or number != expected:
            raise ValueError(f"added token {text!r:.60}: id must be {expected}, got {number}")
        yield text, Added(number, left, right)


def row(found: object, number: int) -> tuple[str, float]:
    match found:
        case [_, bool()]:
            pass
        case [str(piece), int() | float() as score] if abs(score) < WORST:
            if not HALF.search(piece):
                return piece, float(score)
    raise ValueError(f"model.vocab[{number}]: must be a piece and its score, got {found!r:.60}")


def item(table: object, key: str, kind: type[T], usual: T | None = None) -> T:
    """What stands under a key, of a kind; usual: where nothing does, or null."""
    found = table.get(key) if isinstance(table, dict) else table
    if found is None and usual is not None:
        return usual
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise ValueError(f"{key}: must be {kind.__name__}, got {found!r:.60}")
    return found
