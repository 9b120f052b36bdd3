"""Unigram tokenizers against sentencepiece and tokenizers, each on the files that are its own."""

import json
import lzma
import random
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepieces as made

import minidiffusion
from minidiffusion.text.unigram import Unigram, t5_tokenizer

T5 = Path(minidiffusion.__file__).parent / "assets" / "t5" / "tokenizer.json.xz"
DATA = Path(__file__).parent / "data"
NAMES = ["english", "japanese", "t5.model", "t5.json", "t5"]
RELEASED = {
    "normalizer": [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
    "decoder": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
}
"""What T5's first tokenizer.json does around the pieces."""


class Pair(NamedTuple):
    ours: Unigram
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def unpacked(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def t5_model() -> bytes:
    """T5's spiece.model, made again from the tokenizer.json: without the extra ids."""
    found = json.loads(unpacked(T5))
    kinds = {"<pad>": made.CONTROL, "</s>": made.CONTROL, "<unk>": made.UNKNOWN}
    rows = [(p, score, kinds.get(p, made.NORMAL)) for p, score in found["model"]["vocab"][:32000]]
    rules = b64decode(found["normalizer"]["precompiled_charsmap"])
    return made.model(rows, {40: 2, 41: -1, 42: 1, 43: 0}, {1: "nmt_nfkc", 2: rules})


def released() -> bytes:
    """T5's tokenizer.json as it was released."""
    found = json.loads(unpacked(T5))
    steps = [found["normalizer"], *RELEASED["normalizer"]]
    found |= RELEASED | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    return json.dumps(found).encode()


def sentencepiece_pair(data: bytes) -> Pair:
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_proto=data)
    return Pair(Unigram.from_bytes(data), theirs.encode, theirs.decode)


def tokenizers_pair(data: bytes) -> Pair:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(data.decode())
    return Pair(
        Unigram.from_bytes(data),
        lambda text: theirs.encode(text, add_special_tokens=False).ids,
        lambda ids: theirs.decode(ids, skip_special_tokens=False),
    )


def transformers_pair(folder: Path) -> Pair:
    """What diffusers runs: transformers' own reading of T5's tokenizer.json as released."""
    from transformers import T5TokenizerFast

    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(released())
    theirs = T5TokenizerFast.from_pretrained(str(folder))
    return Pair(
        t5_tokenizer(),
        lambda text: theirs(text, add_special_tokens=False).input_ids,
        lambda ids: theirs.decode(ids),
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {
        "english": sentencepiece_pair(unpacked(DATA / "botchan_en_unigram_1000.model.xz")),
        "japanese": sentencepiece_pair(unpacked(DATA / "kyoto_ja_unigram_8000.model.xz")),
        "t5.model": sentencepiece_pair(t5_model()),
        "t5.json": tokenizers_pair(released()),
        "t5": transformers_pair(tmp_path_factory.mktemp("t5") / "tokenizer"),
    }


SPECIALS = ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "＜/s＞"]
GLUE = [
    "",
    " ",
    "  ",
    "\t",
    "\u3000",
    "▁",
    "\x85",
    "\u200b",
    "\x01",
    "\r\n",
    "ﬁ\u0301",
    "日本",
    "ㄱ",
]


def spiced(texts: Iterator[str], seed: int) -> Iterator[str]:
    """The lines, every third with special tokens and spaces of all kinds in it."""
    draw = random.Random(seed)
    for k, text in enumerate(texts):
        if k % 3 == 0:
            words = text.split(" ")
            for _ in range(draw.randrange(1, 5)):
                some = draw.choice(SPECIALS) if draw.randrange(2) else draw.choice(GLUE)
                words.insert(draw.randrange(len(words) + 1), some)
            text = draw.choice(["", " "]).join(words)
        yield text


def differences(pair: Pair, texts: Sequence[str]) -> list[str]:
    return [text for text in texts if pair.ours.encode(text) != pair.encode(text)]


@pytest.mark.parametrize("name", NAMES)
def test_5000_lines_have_the_reference_s_ids(pairs: Any, lines: Any, name: str) -> None:
    assert differences(pairs[name], list(spiced(lines(5000, 0), 0))) == []


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_100000_lines_have_the_reference_s_ids(
    pairs: Any, lines: Any, captions: list[str], name: str
) -> None:
    for seed in range(10):
        assert differences(pairs[name], list(spiced(lines(10_000, 1 + seed), seed))) == []
    assert differences(pairs[name], captions) == []


CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]


@pytest.mark.parametrize("name", ["t5", "t5.model"])
def test_every_code_point_has_the_reference_s_ids(pairs: Any, name: str) -> None:
    texts = ["".join(map(chr, CODES[k : k + 4096])) for k in range(0, len(CODES), 4096)]
    texts += [chr(code) for code in [*CODES[:0x400], *CODES[0x400:0x3400:5]]]
    assert differences(pairs[name], texts) == []


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_code_point_alone_has_the_reference_s_ids(pairs: Any, name: str) -> None:
    assert differences(pairs[name], [chr(code) for code in CODES]) == []


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_reference_s(pairs: Any, lines: Any, name: str) -> None:
    pair, draw = pairs[name], random.Random(0)
    for text in lines(300, 77):
        some = draw.choices(range(pair.ours.vocabulary), k=5)
        for ids in (pair.ours.encode(text)[:20] + some, some, pair.ours.encode(text)):
            assert pair.ours.decode(ids) == pair.decode(ids)
    assert pair.ours.decode([]) == ""


def test_known_numbers(pairs: Any) -> None:
    t5 = t5_tokenizer()
    assert t5 is t5_tokenizer()
    assert (t5.vocabulary, t5.pad, t5.eos, t5.unk, t5.bos) == (32100, 0, 1, 2, -1)
    hello = "translate English to German: hello world"
    assert t5.encode(hello) == [13959, 1566, 12, 2968, 10, 21820, 296]
    assert t5.encode(" \n") == t5.encode("") == []
    assert t5.spelled("Straße </s>") == ["▁Stra", "ß", "e", "</s>"]
    assert t5.decode(t5.encode("a photo of a red panda")) == "a photo of a red panda"
    other = pairs["english"].ours
    assert (other.vocabulary, other.pad, other.eos, other.unk, other.bos) == (1000, -1, 2, 0, 1)
    with pytest.raises(ValueError, match=r"token: must be 0\.\.32099, got 32100"):
        t5.decode([32100])
    with pytest.raises(ValueError, match=r"token: must be 0\.\.32099, got -1"):
        t5.decode([-1])


APART = {
    "hello </s>": ([21820, 1], [21820, 3, 1], [21820, 3, 2, 87, 7, 3155]),
    "hello ": ([21820], [21820, 3], [21820]),
    "a ＜/s＞": ([3, 9, 3, 1], [3, 9, 3, 1], [3, 9, 3, 2, 87, 7, 3155]),
}
"""Ids of T5 as transformers, tokenizers and sentencepiece give them."""


@pytest.mark.parametrize("text", APART)
def test_where_the_references_differ(pairs: Any, text: str) -> None:
    for name, ids in zip(("t5", "t5.json", "t5.model"), APART[text], strict=True):
        assert pairs[name].ours.encode(text) == pairs[name].encode(text) == ids


def test_marks_that_one_reference_loses(pairs: Any) -> None:
    kept = pairs["t5.model"].ours.encode("e\u0301\u0301")
    lost = pairs["t5"].ours.encode("e\u0301\u0301")
    assert lost == pairs["t5"].ours.encode("é") and kept == [*lost, 2]


@pytest.mark.parametrize("name", ["t5", "t5.model"])
def test_a_million_characters_are_no_trouble(pairs: Any, name: str) -> None:
    draw = random.Random(0)
    for text in [
        "a" * 10**6,
        "".join(draw.choices("abcdefgh ", k=10**4)),
        "🐈‍⬛" * 10**4,
        "\0" * 10**4,
        " " * 10**4,
        "क" + "\u094d" * 10**4,
    ]:
        assert pairs[name].ours.encode(text) == pairs[name].encode(text)


def test_half_a_character_is_a_plain_mistake(pairs: Any) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match=r"prompt: U\+D83D at character 3 is half") as caught:
            pairs[name].ours.encode("ab\ud83d")
        assert "\n" not in str(caught.value)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    packed = unpacked(DATA / "botchan_en_unigram_1000.model.xz")
    (tmp_path / "tokenizer.json").write_bytes(packed)
    (tmp_path / "spiece.model").write_bytes(b"\xef\xbb\xbf \t" + released())
    assert Unigram.from_file(tmp_path / "tokenizer.json").vocabulary == 1000
    assert Unigram.from_file(str(tmp_path / "spiece.model")).encode("hello ") == [21820, 3]
    with pytest.raises(FileNotFoundError):
        Unigram.from_file(tmp_path / "none")
    with pytest.raises(ValueError, match="not a file"):
        Unigram.from_file(tmp_path)


STRANGERS = [
    b"",
    b"{",
    b"{}",
    b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
    b"PK\x03\x04" + bytes(60),
    b"<!DOCTYPE html><html></html>",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"{" * 100_000,
    b'{"model":' * 100_000,
    b'{"a":' + b"[" * 10**6,
    b'{"model": {"vocab": ' + b"9" * 10_000 + b"}}",
    b'{"\xff": 1}',
    b"\n" + b"\xff" * 10,
]


@pytest.mark.parametrize("data", STRANGERS, ids=range(len(STRANGERS)))
def test_other_files_are_refused_in_a_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        Unigram.from_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="a tokenizer of more than 32 MB"):
        Unigram.from_file(path)
