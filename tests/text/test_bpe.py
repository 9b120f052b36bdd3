"""CLIP's tokenizer against transformers', and against byte-pair encoding as it is defined."""

import random
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from minidiffusion.text.bpe import BPE, BYTES, SPELLED, Merge, shortened
from minidiffusion.text.words import BOS, EOS


@pytest.fixture(scope="module")
def clip() -> BPE:
    return BPE()


def differences(clip: BPE, reference: Any, lines: Sequence[str]) -> list[str]:
    theirs = reference(list(lines), add_special_tokens=False)["input_ids"]
    return [line for line, ids in zip(lines, theirs, strict=True) if clip.encode(line) != ids]


def test_5000_lines_have_the_reference_s_ids(clip: BPE, reference: Any, lines: Any) -> None:
    assert differences(clip, reference, list(lines(5000, 0))) == []


@pytest.mark.long
def test_100000_lines_have_the_reference_s_ids(
    clip: BPE, reference: Any, lines: Any, captions: list[str]
) -> None:
    for seed in range(10):
        assert differences(clip, reference, list(lines(10_000, 1 + seed))) == []
    assert differences(clip, reference, captions) == []


def test_every_code_point_has_the_reference_s_ids(clip: BPE, reference: Any) -> None:
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    lines = ["".join(map(chr, codes[k : k + 4096])) for k in range(0, len(codes), 4096)]
    assert differences(clip, reference, lines) == []


@pytest.mark.parametrize("text", ["a", "don't 'S I'LL", "<|endoftext|> a <|ENDOFTEXT|>!", "ΣΑΣ İ"])
def test_pieces_and_text_are_spelled_as_the_reference_spells_them(
    clip: BPE, reference: Any, text: str
) -> None:
    ids = clip.encode(text)
    assert clip.pieces(text) == reference.tokenize(text)
    assert clip.decode(ids) == reference.decode(ids)


def test_decoding_is_the_reference_s(clip: BPE, reference: Any, lines: Any) -> None:
    draw = random.Random(0)
    for line in lines(300, 77):
        ids = clip.encode(line)[:20] + draw.choices(range(49408), k=5)
        assert clip.decode(ids) == reference.decode(ids)
    with pytest.raises(ValueError, match=r"token: must be 0\.\.49407, got 49408"):
        clip.decode([49408])


def test_known_numbers(clip: BPE) -> None:
    assert (clip.vocabulary, clip.bos, clip.eos) == (49408, 49406, 49407)
    assert clip.encode("an astronaut scuba diving") == [550, 18376, 20559, 9886]
    assert clip.encode(" ") == clip.encode("") == []


@pytest.mark.parametrize("length", [77, 10, 3])
def test_batches_are_the_reference_s(clip: BPE, reference: Any, lines: Any, length: int) -> None:
    texts = [*lines(200, 5), "", "word " * 200, "<|endoftext|> " * 100]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = clip.tokenize(texts, length=length)
    theirs = reference(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    assert ours.dtype == torch.int64 and torch.equal(ours, theirs)


def test_padding_is_asked_for(clip: BPE) -> None:
    rows = clip.tokenize(["a cat", ""], pad=0, length=6).tolist()
    assert rows == [[49406, 320, 2368, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0]]
    assert clip.tokenize("a", length=5).tolist() == [[49406, 320, 49407, 49407, 49407]]
    with pytest.raises(ValueError, match=r"pad: must be 0\.\.49407, got -1"):
        clip.tokenize(["a"], pad=-1)
    with pytest.raises(ValueError, match="length: must be at least 3, got 2"):
        clip.tokenize([""], length=2)


def test_what_is_cut_off_is_said_in_a_line(clip: BPE) -> None:
    with pytest.warns(UserWarning) as told:
        clip.tokenize(["a " * 75 + "green\nfrog"])
    assert [str(one.message) for one in told] == [
        "prompt: 77 tokens, of which 75 fit; cut off: 'green frog'"
    ]
    with pytest.warns(UserWarning) as told:
        clip.tokenize(["cat " * 250_000])
    (line,) = [str(one.message) for one in told]
    assert line.startswith("prompt: 250000 tokens, of which 75 fit; cut off: 'cat cat")
    assert line.endswith("cat ...'") and len(line) < 140
    clip.tokenize(["a " * 75])


def test_half_a_character_is_a_plain_mistake(clip: BPE) -> None:
    for dialect in ("clip", "openai"):
        with pytest.raises(ValueError, match=r"prompt: U\+D83D at character 3 is half") as caught:
            BPE(dialect).encode("ab\ud83d")
        assert "\n" not in str(caught.value)


def test_a_million_characters_are_no_trouble(clip: BPE) -> None:
    for text in [
        "a" * 10**6,
        "".join(random.Random(0).choices("abcdefgh", k=10**5)),
        "🐈‍⬛" * 10**4,
    ]:
        assert clip.decode(clip.encode(text)) == text


def naive(word: str, merges: Sequence[Merge]) -> list[str]:
    """The definition: again and again the earliest row that fits, at its first place."""
    parts = [SPELLED[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while True:
        fits = [row for row in merges if row in pairwise(parts)]
        if not fits:
            return parts
        row = min(fits, key=merges.index)
        place = list(pairwise(parts)).index(row)
        parts[place : place + 2] = ["".join(row)]


def vocabulary(draw: random.Random, letters: str, size: int) -> tuple[Merge, ...]:
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[Merge] = []
    while len(merges) < size:
        left, right = draw.choice(tokens), draw.choice(tokens)
        if not left.endswith("</w>") and left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    return tuple(merges)


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_naive_merge_on_random_vocabularies(seed: int) -> None:
    draw = random.Random(seed)
    letters = "abcdef"[: draw.randrange(1, 7)]
    merges = vocabulary(draw, letters, draw.randrange(40))
    bpe = BPE(merges=merges)
    assert bpe.vocabulary == 514 + len(merges) and bpe.eos == bpe.bos + 1
    for _ in range(30):
        word = "".join(draw.choices(letters, k=draw.randrange(1, 40)))
        assert bpe.pieces(word) == naive(word, merges)


def test_own_merges_are_checked() -> None:
    twice = (("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc"))
    with pytest.raises(ValueError, match=r"merges: row 4: 'a' \+ 'bc' is made twice"):
        BPE(merges=twice).encode("a")
    with pytest.raises(ValueError, match=r"merges: row 1: 'ab' \+ 'c' is of unknown parts"):
        BPE(merges=twice[1:]).encode("a")


def test_every_byte_has_a_letter_of_its_own() -> None:
    assert sorted(BYTES) == list(range(256)) and len(set(SPELLED.values())) == 256
    assert all(letter.isprintable() and not letter.isspace() for letter in SPELLED.values())


OPENAI = {
    "AT&amp;T &amp;lt;3": [536, 261, 339, 283, 274],
    "It’s “quoted” ﬁne": [585, 568, 257, 27706, 257, 3797],
    "ＦＵＬＬ\u3000ｗｉｄｔｈ": [1476, 23571],
    "café cafe\u0301": [15304, 15304],
    "a\x00b\x1cc\td": [5334, 323],
    "I'LL'ſ": [328, 1342, 6, 129, 379],
    "naïve &eacute;t&eacute; &#233;": [1097, 35689, 563, 3459, 39694, 4166],
    "ŉ Ǆ ﬅ ﬆ": [262, 333, 67, 129, 378, 129, 123, 339, 545],
    "ΣΑΣ": [139, 225, 138, 109, 139, 480],
}
"""Ids that OpenAI's own tokenizer, with ftfy 6.3, gives."""


@pytest.mark.parametrize("text", OPENAI)
def test_the_openai_dialect(text: str) -> None:
    assert BPE("openai").encode(text) == OPENAI[text]


def test_special_tokens_of_the_dialects() -> None:
    upper = f"{BOS.upper()}A{EOS}"
    assert BPE("openai").encode(upper) == [49406, 320, 49407]
    assert BPE().encode(upper)[-2:] == [320, 49407] and 49406 not in BPE().encode(upper)


# --- fewer tokens ---------------------------------------------------------------------------------

LEAST = 514
SHORT_TEXTS = ("a red apple, 3d style", "Zürich  ÉTÉ", "日本 🦊", "it's 1,000 dogs!", "", "\u0000")


@pytest.mark.parametrize("vocabulary", [LEAST, 515, 700, 4610, 49407])
def test_a_shortened_vocabulary(clip: BPE, vocabulary: int) -> None:
    """Every id lies below it, start and end are its last two, and the text comes back."""
    short = shortened(vocabulary)
    assert short.vocabulary == vocabulary
    assert (short.bos, short.eos) == (vocabulary - 2, vocabulary - 1)
    for text in SHORT_TEXTS:
        ids = short.encode(text)
        assert all(0 <= number < vocabulary - 2 for number in ids)
        assert len(ids) >= len(clip.encode(text))
        assert short.decode(ids) == clip.decode(clip.encode(text))
    rows = short.tokenize(["apple", ""], length=9)
    assert rows[1].tolist() == [short.bos, *[short.eos] * 8]
    assert int(rows.max()) == short.eos  # where a text encoder looks for the end


def test_its_merges_are_clip_s_first(clip: BPE) -> None:
    """A word that these make whole has the very ids of CLIP; without any, bytes."""
    short = shortened(4610)
    for word in ("the", "style", "red", "face"):
        assert short.encode(word) == clip.encode(word) and len(short.encode(word)) == 1
    assert shortened(LEAST).pieces("cat") == ["c", "a", "t</w>"]
    counts = [len(shortened(size).encode("astronaut")) for size in (LEAST, 700, 4610, 49408)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 9
    assert shortened(49408) == clip and shortened(4610) is short


@pytest.mark.parametrize("vocabulary", [-1, 0, LEAST - 1, 49409])
def test_sizes_that_no_shortened_vocabulary_has(vocabulary: int) -> None:
    with pytest.raises(ValueError, match=rf"vocabulary: must be 514\.\.49408, got {vocabulary}"):
        shortened(vocabulary)
