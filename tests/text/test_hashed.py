"""Prompts without an encoder: fixed, told apart, and the same on every machine."""

import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from minidiffusion.shapes import Cond
from minidiffusion.text.bpe import BPE
from minidiffusion.text.hashed import HashedText, signs

TEXT = HashedText(length=7, width=64, pooled_width=48)
NAMES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
         "bag", "ankle boot")  # fmt: skip


def parts(cond: Cond) -> tuple[torch.Tensor, torch.Tensor]:
    assert cond.tokens is not None and cond.pooled is not None
    return cond.tokens, cond.pooled


def test_signs_are_the_bits_of_philox() -> None:
    """Bit k of the stream is sign k: read off here one by one, for lengths of no whole word."""
    for kind, number in (("token", 49407), ("place", 0), ("pooled", 3)):
        key = np.array([number, ("token", "place", "pooled").index(kind)], dtype=np.uint64)
        words = [int(word) for word in np.random.Philox(key=key).random_raw(3)]
        bits = [word >> k & 1 for word in words for k in range(64)]
        for count in (1, 7, 64, 65, 190):
            assert signs(kind, number, count).tolist() == [2 * bit - 1 for bit in bits[:count]]


def test_known_signs() -> None:
    """A network that was trained with these vectors knows no others: they stay for good."""
    found = "".join("+" if x > 0 else "-" for x in signs("token", 4313, 32).tolist())
    assert found == "+++-+++----+-+-+++-+--+++++-----"


def test_signs_are_as_random_as_they_should_be() -> None:
    """Mean 0 and products of different tokens 0, within five standard errors."""
    table = torch.stack([signs("token", number, 512) for number in range(400)])
    assert set(table.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(table.mean())) < 5 / table.numel() ** 0.5
    products = (table @ table.T / 512)[~torch.eye(400, dtype=torch.bool)]
    assert float(products.abs().max()) < 6 / 512**0.5
    assert abs(float(products.std()) * 512**0.5 - 1) < 0.02
    kinds = [signs(kind, 5, 512) for kind in ("token", "place", "pooled")]
    for first, second in combinations(kinds, 2):
        assert abs(float(first @ second)) / 512 < 5 / 512**0.5


def test_a_prompt_is_its_tokens_and_their_places() -> None:
    tokens, pooled = parts(TEXT.encode(["ankle boot"]))
    bpe = BPE()
    own = bpe.encode("ankle boot")
    ids = [bpe.bos, *own, *[bpe.eos] * (6 - len(own))]
    assert TEXT.tokenize("ankle boot").tolist() == [ids]
    for place, number in enumerate(ids):
        wanted = signs("token", number, 64) + signs("place", place, 64)
        assert torch.equal(tokens[0, place], wanted)
    assert torch.equal(pooled[0], sum(signs("pooled", n, 48) for n in own) / len(own))
    assert tokens.shape == (1, 7, 64) and pooled.shape == (1, 48)


def test_names_are_told_apart() -> None:
    tokens, pooled = parts(TEXT.encode([*NAMES, ""]))
    for i, j in combinations(range(11), 2):
        # One token of seven differs, by 2 in half of its signs: 2/7 is the least to be expected.
        assert float((tokens[i] - tokens[j]).square().mean()) > 0.5 * 2 / 7, (i, j)
        assert float((pooled[i] - pooled[j]).square().mean()) > 0.4, (i, j)


def test_order_is_seen() -> None:
    tokens, pooled = parts(TEXT.encode(["boot bag", "bag boot"]))
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(pooled[0], pooled[1])


def test_the_empty_prompt_has_a_row_of_its_own() -> None:
    tokens, pooled = parts(TEXT.encode(""))
    ends = [signs("pooled", n, 48) for n in (BPE().bos, BPE().eos)]
    assert torch.equal(pooled[0], (ends[0] + ends[1]) / 2)
    assert torch.equal(tokens, parts(TEXT.encode("   "))[0])  # as the tokenizer sees it


def test_neighbours_and_case_change_nothing() -> None:
    alone = TEXT.encode("Sneaker")
    beside = TEXT.encode(["bag", "sneaker", "t-shirt/top"])
    for one, many in zip(parts(alone), parts(beside), strict=True):
        assert torch.equal(one[0], many[1])


def test_pairs() -> None:
    cond, against = TEXT.encode_pair(["bag", "coat"], "dress")
    assert torch.equal(parts(cond)[0], parts(TEXT.encode(["bag", "coat"]))[0])
    assert torch.equal(parts(against)[1], parts(TEXT.encode(["dress"] * 2))[1])
    with pytest.raises(ValueError, match="negatives: 3 for 2 prompts"):
        TEXT.encode_pair(["bag", "coat"], ["a", "b", "c"])
    assert TEXT.windows(7) == TEXT.windows(0) == 1
    assert parts(TEXT.encode("bag", 3))[0].shape == (1, 7, 64)


def test_words_that_were_not_met_in_training() -> None:
    text = HashedText(8, 4, 4, ("ankle boot", "bag"))
    with pytest.warns(UserWarning, match="'purple horse': not met in training, which had ankle"):
        text.encode(["bag", "purple boot horse"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["Boot bag", "", "ankle"])
        HashedText(8, 4, 4).encode("purple horse")


def test_the_result_lies_on_the_device() -> None:
    for part in parts(TEXT.encode("bag", device=torch.device("meta"))):
        assert part.is_meta


def test_mistakes() -> None:
    with pytest.warns(UserWarning, match="prompt: 8 tokens, of which 5 fit; cut off: 'd e f'"):
        tokens, _ = parts(TEXT.encode("x y a b c d e f"))
    assert torch.equal(tokens, parts(TEXT.encode("x y a b c"))[0])
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        TEXT.encode([])
    with pytest.raises(ValueError, match=r"prompt: U\+D800 at character 1"):
        TEXT.encode("\ud800")
    for name, value, least in (("length", 1, 2), ("width", 0, 1), ("pooled_width", 0, 1)):
        with pytest.raises(ValueError, match=f"^{name}: must be at least {least}, got {value}$"):
            replace(TEXT, **{name: value})


def test_another_process_reads_the_same() -> None:
    """Not a function of Python's own hashes, nor of what was asked for before."""
    code = (
        "from minidiffusion.text.hashed import HashedText\n"
        "c = HashedText(7, 64, 48).encode(['ankle boot', ''])\n"
        "print((c.tokens.flatten() * 2 ** -1).tolist(), c.pooled.flatten().tolist())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, pooled = parts(TEXT.encode(["ankle boot", ""]))
    assert done.stdout == f"{(tokens.flatten() / 2).tolist()} {pooled.flatten().tolist()}\n"
