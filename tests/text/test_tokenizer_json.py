"""HuggingFace's files: every step against tokenizers itself, and files that are damaged."""

import json
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import sentencepieces as made

from minidiffusion.text.unigram import Unigram

LETTERS = "ab é日▁"
PLAIN = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0)]
BYTES = [(f"<0x{byte:02X}>", -9.5) for byte in range(256)]
RULES = {"A": "a", "é": "e", "e\u0301": "é", "日": "x  y", "\t": " ", "\x01": "", "aa": "ab"}
WHITE, STRIP = {"type": "WhitespaceSplit"}, {"type": "Strip"}
FIRST = made.METASPACE | {"prepend_scheme": "first"}
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
STRING = {"type": "Replace", "pattern": {"String": "b"}, "content": r"\1a"}


def word(draw: random.Random, letters: str, most: int) -> str:
    return "".join(draw.choices(letters, k=draw.randrange(1, most)))


def token(text: str, number: int, **flags: bool) -> dict[str, Any]:
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, "special": False} | kept | flags


def cutter(draw: random.Random) -> dict[str, Any] | None:
    """A pre-tokenizer, of the kinds that are read."""
    scheme, split = draw.choice(["always", "never", "first"]), bool(draw.randrange(2))
    metaspace = made.METASPACE | {"prepend_scheme": scheme, "split": split}
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    some = [made.METASPACE, metaspace, old, None]
    if scheme != "first":
        some.append({"type": "Sequence", "pretokenizers": [WHITE, metaspace]})
    return draw.choice(some)


def drawn(draw: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A file of random pieces and steps, and texts for it."""
    scores = [-1.0, -2.0, -0.5, -7.25, 0.5, 40.0]
    rows = [*PLAIN, *(BYTES if draw.randrange(2) else BYTES[:200])]
    rows += [(word(draw, LETTERS, 5), draw.choice(scores)) for _ in range(20)]
    rows = list(dict(rows).items())
    flags = {name: bool(draw.randrange(2)) for name in ("lstrip", "rstrip")}
    added = [token("</s>", 1), token("<s>", 2), token("ba", len(rows), **flags)]
    rows = [row for row in rows if row[0] != "ba"]
    added[2]["id"] = len(rows)
    cut = cutter(draw)
    left = bool(draw.randrange(2)) and (cut or {}).get("prepend_scheme") != "first"
    strip = STRIP | {"strip_left": left, "strip_right": bool(draw.randrange(2))}
    found = made.tokenizer_json(rows, made.character_map(RULES), byte_fallback=draw.random() < 0.5)
    steps = [found["normalizer"], *draw.sample([strip, SPACES, STRING], draw.randrange(4))]
    found["normalizer"] = draw.choice(
        [None, found["normalizer"], {"type": "Sequence", "normalizers": steps}]
    )
    found |= {"added_tokens": added[: draw.randrange(4)], "pre_tokenizer": cut}
    found["decoder"] = made.METASPACE | {"prepend_scheme": draw.choice(["always", "never"])}
    letters = [*LETTERS, *" A\t\x01\x1cz🐈\0\x85\u3000\u0301", "</s>", "<s>", "<unk>", "ba", "＜"]
    texts = ["".join(draw.choices(letters, k=draw.randrange(20))) for _ in range(40)]
    return found, ["", " ", "  ", "\x01", "\t ", *texts]


@pytest.mark.parametrize("seed", range(80))
def test_every_step_is_the_reference_s(seed: int) -> None:
    from tokenizers import Tokenizer

    draw = random.Random(seed)
    found, texts = drawn(draw)
    data = json.dumps(found)
    ours, theirs = Unigram.from_bytes(data.encode()), Tokenizer.from_str(data)
    assert ours.vocabulary == theirs.get_vocab_size()
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        some = [*ids[:5], *draw.choices(range(ours.vocabulary), k=6)]
        for shown in (ids, some):
            assert ours.decode(shown) == theirs.decode(shown, skip_special_tokens=False)


def test_names_of_special_pieces() -> None:
    found = made.tokenizer_json([*PLAIN, ("a", -1)], added_tokens=[token("<pad>", 4)])
    ours = Unigram.from_bytes(json.dumps(found).encode())
    assert (ours.unk, ours.eos, ours.bos, ours.pad, ours.vocabulary) == (0, 1, 2, 4, 5)
    assert ours.encode("<pad>a") == [4, 0, 3] and ours.decode([4, 3]) == "<pad>a"


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good file with another value at a path such as model.vocab.0."""
    found = deepcopy(made.tokenizer_json([*PLAIN, ("a", -1)], made.character_map(RULES)))
    found["added_tokens"] = [token("</s>", 1)]
    place: Any = found
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return found


LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaa"}
WRONG = [
    ("model", None, "model: must be dict, got None"),
    ("model.type", "BPE", "model.type: must be Unigram, got 'BPE'"),
    ("model.vocab", {}, "vocab: must be list"),
    ("model.vocab.3", ["a"], "model.vocab[3]: must be a piece and its score"),
    ("model.vocab.3", [1, "a"], "model.vocab[3]"),
    ("model.vocab.3", ["a", "b"], "model.vocab[3]"),
    ("model.vocab.3", ["a", True], "model.vocab[3]"),
    ("model.vocab.3", ["a", float("nan")], "model.vocab[3]"),
    ("model.vocab.3", ["a", float("inf")], "model.vocab[3]"),
    ("model.vocab.3", ["a", 10**400], "model.vocab[3]"),
    ("model.vocab.3", ["\ud800", 0], "model.vocab[3]"),
    ("model.vocab.3", ["a" * 1001, 0], "1001 letters long"),
    ("model.vocab", [], "model.unk_id: must be 0..-1, got 0"),
    ("model.unk_id", None, "unk_id: must be int, got None"),
    ("model.unk_id", True, "unk_id: must be int, got True"),
    ("model.unk_id", 4, "model.unk_id: must be 0..3, got 4"),
    ("model.byte_fallback", "yes", "byte_fallback: must be bool"),
    ("added_tokens.0.id", 2, "added token '</s>': id must be 1, got 2"),
    ("added_tokens.0.content", "new", "added token 'new': id must be 4, got 1"),
    ("added_tokens.0.content", "", "added token ''"),
    ("added_tokens.0.normalized", True, "single_word, normalized must be false"),
    ("added_tokens.0.single_word", True, "single_word, normalized must be false"),
    ("added_tokens.0", 5, "content: must be str"),
    ("added_tokens", [token("x", 4)] * 10_001, "added_tokens: 10001 tokens; allowed: 10000"),
    ("normalizer.type", "NFKC", "normalizer.type: 'NFKC' is not read; allowed: Sequence"),
    ("normalizer.precompiled_charsmap", "?", "precompiled_charsmap"),
    ("normalizer.precompiled_charsmap", "AAAA", "a character map of 3 bytes"),
    ("normalizer", SPACES | {"pattern": {"Regex": "(a+)+$"}}, "(a+)+$'} to '▁' is not read"),
    ("normalizer", SPACES | {"pattern": {"String": ""}}, "{'String': ''} to '▁' is not read"),
    ("normalizer", SPACES | {"content": "a" * 256}, "aaa is not read"),
    ("normalizer", [], "normalizer: must be dict"),
    ("normalizer", {"type": "Sequence", "normalizers": [LONGER] * 3}, "more than 16 times longer"),
    ("normalizer", {"type": "Sequence", "normalizers": [SPACES] * 17}, "more than 16 steps"),
    (
        "pre_tokenizer",
        {"type": "Sequence", "pretokenizers": [made.METASPACE] * 17},
        "pre_tokenizer: more than 16 steps",
    ),
    ("added_tokens", [token("x" * 200_001, 4)], "added_tokens: 200001 letters; allowed: 200000"),
    (
        "model.vocab",
        [*PLAIN, *([f"{k:05}" * 200, 0] for k in range(4001))],
        "beyond 4000000 letters of all pieces",
    ),
    ("pre_tokenizer", {"type": "ByteLevel"}, "pre_tokenizer.type: 'ByteLevel' is not read"),
    ("pre_tokenizer", made.METASPACE | {"replacement": "__"}, "Metaspace: replacement '__'"),
    ("pre_tokenizer", made.METASPACE | {"prepend_scheme": "last"}, "prepend_scheme 'last'"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [FIRST]}, "first is not read with"),
    ("decoder", None, "decoder: must be dict"),
    ("decoder", {"type": "ByteLevel"}, "decoder.type: must be Metaspace, got 'ByteLevel'"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_in_a_line(path: str, value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        Unigram.from_bytes(json.dumps(changed(path, value)).encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def places(found: Any, path: str = "") -> Iterator[str]:
    some = found.items() if isinstance(found, dict) else enumerate(found)
    for key, value in some if isinstance(found, dict | list) else ():
        yield f"{path}{key}"
        if isinstance(value, dict | list):
            yield from places(value, f"{path}{key}.")


STRANGE = [
    None,
    True,
    -1,
    10**30,
    1e308,
    "",
    "a\n",
    "\ud800",
    [],
    [[]],
    {},
    {"type": {}},
    {"a": []},
]


def test_strange_values_anywhere_are_survived() -> None:
    for path in places(changed("version", "2")):
        for value in STRANGE:
            try:
                found = Unigram.from_bytes(json.dumps(changed(path, value)).encode())
            except ValueError as error:
                assert "\n" not in str(error), (path, value)
            else:
                assert found.decode(found.encode("a </s> b")) is not None


@pytest.mark.parametrize("key", ["normalizer", "pre_tokenizer"])
def test_deep_sequences_are_survived(key: str) -> None:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[key]
    for depth in (5, 300, 450, 900, 5000):
        step = f'{{"type": "Sequence", "{inner}": [' * depth + "]}" * depth
        text = json.dumps(changed(key, None)).replace(f'"{key}": null', f'"{key}": {step}')
        try:
            found = Unigram.from_bytes(text.encode())
        except ValueError as error:
            assert str(error) == "nested too deeply"
        else:
            assert found.encode("a")
