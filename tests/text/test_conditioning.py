"""Prompts through a small text encoder: windows, weights, pairs, and bits that stay."""

import warnings
from dataclasses import replace

import pytest
import torch

from minidiffusion.models.clip import CLIPConfig, CLIPText
from minidiffusion.text import BPE, Text, emphasised

LONG = "a red cat on a blue mat, " * 20
"""160 tokens: three windows."""


@pytest.fixture(scope="module")
def text() -> Text:
    torch.manual_seed(0)
    config = CLIPConfig(width=32, layers=2, heads=2, feed_forward=64, projection=24)
    return Text(CLIPText(config).eval(), long_prompts="chunks")


def test_a_prompt_is_what_the_encoder_makes_of_its_ids(text: Text) -> None:
    cond = text.encode(["a cat", ""])
    with torch.no_grad():
        wanted = text.encoder(BPE().tokenize(["a cat"]))
    assert cond.tokens is not None and cond.pooled is not None
    assert cond.tokens.shape == (2, 77, 32) and cond.pooled.shape == (2, 24)
    assert torch.equal(cond.tokens[:1], wanted.tokens)
    assert torch.equal(cond.pooled[:1], wanted.pooled)
    assert cond.labels is None and cond.concat is None and not cond.tokens.requires_grad


def test_a_long_prompt_is_encoded_window_by_window(text: Text) -> None:
    ids = BPE().encode(LONG)
    assert len(ids) == 160
    rows = [[49406, *part, 49407] for part in (ids[:75], ids[75:150], ids[150:])]
    rows[2] += [49407] * 65
    assert text.tokenize(LONG).tolist() == [[number for row in rows for number in row]]
    cond = text.encode(LONG)
    with torch.no_grad():
        alone = [text.encoder(torch.tensor([row])) for row in rows]
    assert cond.tokens is not None and cond.pooled is not None
    assert torch.equal(cond.tokens, torch.cat([one.tokens for one in alone], dim=1))
    assert torch.equal(cond.pooled, alone[0].pooled)


def test_the_bits_of_a_prompt_do_not_depend_on_its_company(text: Text) -> None:
    together = text.encode(["a cat", LONG, "a dog", "a cat"])
    alone = text.encode("a cat")
    assert together.tokens is not None and alone.tokens is not None
    assert together.pooled is not None and alone.pooled is not None
    assert together.tokens.shape == (4, 231, 32)
    for row in (0, 3):
        assert torch.equal(together.tokens[row, :77], alone.tokens[0])
        assert torch.equal(together.pooled[row], alone.pooled[0])
    empty = text.encode("").tokens
    assert empty is not None and torch.equal(together.tokens[2, 77:154], empty[0])


def test_equal_windows_are_encoded_once(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], text.encoder.forward
    monkeypatch.setattr(text.encoder, "forward", lambda ids: calls.append(1) or forward(ids))
    text.encode(["a cat"] * 5 + ["", LONG])
    assert len(calls) == 1 + 1 + 3


def test_changed_weights_are_seen(text: Text) -> None:
    before = text.encode("a cat").tokens
    weight = text.encoder.blocks[0].enter.weight.data
    weight.mul_(2)
    after = text.encode("a cat").tokens
    weight.div_(2)
    assert before is not None and after is not None and not torch.equal(before, after)


def test_a_pair_can_be_stacked(text: Text) -> None:
    for prompts, negatives in ((["a cat", "a dog"], LONG), ([LONG], ["blur"]), (["a"], "")):
        cond, nothing = text.encode_pair(prompts, negatives)
        assert cond.tokens is not None and nothing.tokens is not None
        assert cond.tokens.shape == nothing.tokens.shape
        wanted = text.encode(negatives, windows=cond.tokens.shape[1] // 77).tokens
        assert wanted is not None and torch.equal(nothing.tokens[-1], wanted[-1])
    with pytest.raises(ValueError, match="negatives: 3 for 2 prompts"):
        text.encode_pair(["a", "b"], ["", "", ""])


def test_so_many_windows_as_asked_for(text: Text) -> None:
    assert text.tokenize(["a", "b"], windows=3).shape == (2, 231)
    with pytest.warns(
        UserWarning, match=r"^prompt: 160 tokens, of which 150 fit; cut off: 'mat , a red"
    ):
        ids = text.tokenize(LONG, windows=2)
    assert torch.equal(ids, text.tokenize(LONG)[:, :154])
    for count in (0, -1, 65):
        with pytest.raises(ValueError, match=rf"prompt: {count} windows .*; allowed: 1\.\.64"):
            text.encode("a", windows=count)


def test_the_reference_cuts_and_we_say_so(text: Text) -> None:
    short = replace(text, long_prompts="truncate")
    with pytest.warns(UserWarning) as told:
        ids = short.tokenize([LONG])
    (line,) = [str(one.message) for one in told]
    assert line.startswith("prompt: 160 tokens, of which 75 fit; cut off: ")
    assert line.endswith('; long_prompts="chunks" keeps it') and "\n" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(ids, BPE().tokenize([LONG]))
    assert short.tokenize("a", windows=2).shape == (1, 154)


def test_brackets_are_text_until_a_dialect_is_named(text: Text) -> None:
    plain = text.tokenize("a (cat:1.3)")
    assert plain[0, 1:9].tolist() == BPE().encode("a (cat:1.3)")
    heavy = replace(text, weighting="a1111")
    assert torch.equal(heavy.tokenize("a (cat:1.3)"), text.tokenize("a cat"))
    assert torch.equal(heavy.tokenize(r"a \(cat\)"), text.tokenize("a (cat)"))


def test_weights_lie_on_their_tokens(text: Text) -> None:
    heavy = replace(text, weighting="a1111")
    plain, found = text.encode("a cat sat"), heavy.encode("a (cat:1.3) sat")
    assert plain.tokens is not None and found.tokens is not None and plain.pooled is not None
    weights = torch.ones(1, 77)
    weights[0, 2] = 1.3
    assert torch.equal(found.tokens, emphasised(plain.tokens, weights))
    assert torch.equal(plain.pooled, found.pooled)
    again = heavy.encode("a cat sat").tokens
    assert again is not None and torch.equal(again, plain.tokens)


def test_weights_follow_into_later_windows(text: Text) -> None:
    heavy = replace(text, weighting="a1111")
    plain, found = text.encode("a " * 80 + "cat"), heavy.encode("a " * 80 + "(cat:0.5)")
    assert plain.tokens is not None and found.tokens is not None
    assert torch.equal(plain.tokens[:, :77], found.tokens[:, :77])
    weights = torch.ones(1, 77)
    weights[0, 6] = 0.5
    assert torch.equal(found.tokens[:, 77:], emphasised(plain.tokens[:, 77:], weights))


def test_open_clip_pads_with_zero(text: Text) -> None:
    ids = replace(text, pad=0).tokenize(["a cat", LONG])
    assert ids[0, :5].tolist() == [49406, 320, 2368, 49407, 0]
    assert ids[0, 77:80].tolist() == [49406, 49407, 0] and ids[1, -1] == 0


@pytest.mark.parametrize("weighting", [None, "a1111"])
def test_bad_prompts_get_a_line(text: Text, weighting: str | None) -> None:
    bold = replace(text, weighting=weighting)
    for prompt, line in {
        "half \ud83d": r"prompt: U\+D83D at character 6 is half of a character",
        "a " * 10_000: r"prompt: 134 windows of 77 tokens; allowed: 1\.\.64",
    }.items():
        with pytest.raises(ValueError, match=line) as caught:
            bold.encode(prompt)
        assert "\n" not in str(caught.value)
    assert bold.encode("nul \x00").tokens is not None
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        bold.encode([])


def test_an_encoder_must_know_every_token() -> None:
    small = CLIPText(CLIPConfig(vocabulary=99, width=8, layers=1, heads=1, feed_forward=8))
    with pytest.raises(ValueError, match="encoder: knows 99 tokens, the tokenizer has 49408"):
        Text(small)
    with pytest.raises(ValueError, match=r"pad: must be 0\.\.514, got 600"):
        Text(small, BPE(merges=(("a", "b"),)), pad=600)
