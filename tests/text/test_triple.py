"""Stable Diffusion 3's prompts against diffusers, and what is remembered of them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from rounding import all_in_float64, assert_near, check_parity
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers import T5Config as TheirT5Config

from minidiffusion.checkpoints.rename import Renamed, rules, their_shapes
from minidiffusion.checkpoints.tables import clip as clip_table
from minidiffusion.checkpoints.tables import t5 as t5_table
from minidiffusion.models import CLIPConfig, CLIPText, T5Config, T5Encoder, hollow
from minidiffusion.shapes import Cond
from minidiffusion.text import BPE, triple
from minidiffusion.text.triple import TripleText
from minidiffusion.text.unigram import t5_tokenizer

LONG = "a red cat on a blue mat, " * 20
WIDTH = 96
"""Of the tokens: more than both CLIPs have, 32 and 40."""


class Letters:
    """A tokenizer for T5 as small as can be, from transformers' own."""

    eos, pad = 1, 0

    def __init__(self, theirs: T5Tokenizer) -> None:
        self.theirs = theirs

    def encode(self, text: str) -> list[int]:
        return list(self.theirs(text, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.theirs.decode(ids))


class Models(NamedTuple):
    theirs: StableDiffusion3Pipeline
    ours: TripleText


def shaken(network: nn.Module) -> nn.Module:
    for name, p in network.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 and "shared" not in name else 0.3
        p.data.copy_(torch.randn(p.shape) * scale + (p.ndim == 1 and name.endswith("weight")))
    return network.eval().requires_grad_(False)


def their_clip(width: int, heads: int, act: str) -> CLIPTextModelWithProjection:
    return shaken(CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=49408, num_hidden_layers=3, intermediate_size=64, projection_dim=width,
        hidden_size=width, num_attention_heads=heads, hidden_act=act, bos_token_id=49406,
        eos_token_id=49407,
    )))  # fmt: skip


def filled(network: nn.Module, table: Any, weights: Mapping[str, Tensor]) -> Any:
    shapes = {name: tuple(w.shape) for name, w in network.state_dict().items()}
    made = rules(table, shapes)
    there = {name: weights[name] for name in their_shapes(made, shapes)}
    named = Renamed(made, there, shapes, "ours")
    network.load_state_dict({name: named[name].clone() for name in named}, assign=True)
    return network.eval().requires_grad_(False)


def our_clip(theirs: CLIPTextModelWithProjection) -> CLIPText:
    c = theirs.config
    config = CLIPConfig(
        width=c.hidden_size, layers=3, heads=c.num_attention_heads, feed_forward=64,
        activation=c.hidden_act, projection=c.projection_dim, skip=1, final_norm=False,
    )  # fmt: skip
    table = clip_table.table(config, "transformers")
    return filled(hollow(CLIPText, config), table, theirs.state_dict())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def models(reference: CLIPTokenizer) -> Models:
    torch.manual_seed(0)
    folder = reference.name_or_path
    small = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    large = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!")
    signs = [(f"{space}{letter}", -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,"
             for space in ("", "▁")]  # fmt: skip
    words = [("▁cat", -2.0), ("▁on", -2.0), ("ed", -2.0)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = T5Tokenizer(vocab=[*special, *words, *signs], extra_ids=0)
    t5 = shaken(T5EncoderModel(TheirT5Config(
        vocab_size=70, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )))  # fmt: skip
    clips = their_clip(32, 4, "quick_gelu"), their_clip(40, 20, "gelu")
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=72,
    )  # fmt: skip
    theirs = StableDiffusion3Pipeline(
        transformer, None, None, clips[0], small, clips[1], large, t5, pieces
    )
    config = T5Config(
        vocabulary=70, width=WIDTH, layers=2, heads=4, head_width=8, feed_forward=64
    )  # fmt: skip
    table = t5_table.table(config, "transformers-shared")
    our_t5 = filled(hollow(T5Encoder, config), table, t5.state_dict())
    ours = TripleText(*map(our_clip, clips), our_t5, t5_tokenizer=Letters(pieces), width=WIDTH)
    return Models(theirs, ours)


@pytest.fixture
def text(models: Models) -> TripleText:
    """With nothing remembered, and weights of its own."""
    return deepcopy(models.ours)


def in_float64(models: Models) -> Models:
    """Copies of all encoders, theirs and ours, with nothing remembered."""
    theirs, ours = deepcopy(models)
    for place, names in (
        (theirs, ("text_encoder", "text_encoder_2", "text_encoder_3")),
        (ours, ("clip_l", "clip_g", "t5")),
    ):
        for name in names:
            if getattr(place, name) is not None:
                getattr(place, name).double()
    return Models(theirs, ours)


def assert_same(models: Models, prompts: Any, negatives: Any, length: int) -> tuple[Cond, Cond]:
    """What ours makes of prompts, and of what to avoid, is what theirs does."""

    def run_ours(models: Models) -> tuple[Any, ...]:
        cond, negative = models.ours.encode_pair(prompts, negatives)
        return cond.tokens, negative.tokens, cond.pooled, negative.pooled

    def run_theirs(models: Models) -> tuple[Any, ...]:
        return tuple(models.theirs.encode_prompt(
            prompts, None, None, max_sequence_length=length, negative_prompt=negatives
        ))  # fmt: skip

    found, usual = run_ours(models), run_theirs(models)
    with all_in_float64():
        models = in_float64(models)
        exact, truth = run_ours(models), run_theirs(models)
    for some in zip(found, usual, exact, truth, strict=True):
        check_parity(*some)
        assert some[0].std() > 0.3
    tokens, avoided, pooled, pooled_avoided = found
    return Cond(tokens=tokens, pooled=pooled), Cond(tokens=avoided, pooled=pooled_avoided)


def equal(first: Cond, second: Cond) -> bool:
    assert first.tokens is not None and first.pooled is not None
    assert second.tokens is not None and second.pooled is not None
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.pooled, second.pooled)


PROMPTS = ["A red cat on a mat, 3 times: naïve?", ""]
"""Without exclamation marks, which diffusers' second tokenizer takes for padding."""


@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("t5", [True, False], ids=["T5", "no T5"])
@torch.no_grad()
def test_parity_with_diffusers(models: Models, t5: bool, length: int) -> None:
    parts = models.theirs.components
    parts |= {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    parts.pop("image_encoder"), parts.pop("feature_extractor")
    theirs = StableDiffusion3Pipeline(**parts)
    ours = replace(models.ours, t5_length=length, t5=models.ours.t5 if t5 else None)
    cond, _ = assert_same(Models(theirs, ours), PROMPTS, ["blurred, ugly", "a dog"], length)
    assert cond.tokens is not None and cond.tokens.shape == (2, 77 + length, WIDTH)
    assert bool(cond.tokens[:, 77:].any()) == t5 and not cond.tokens[:, :77, 72:].any()
    assert not cond.tokens.requires_grad and cond.labels is None and cond.concat is None


@torch.no_grad()
def test_a_long_prompt_is_cut_as_in_diffusers(models: Models) -> None:
    short = Models(models.theirs, replace(models.ours, t5_length=77))
    with pytest.warns(UserWarning) as told:
        short.ours.encode_pair(LONG)
    lines = [str(one.message) for one in told]
    assert [line.split(";")[0] for line in lines] == [
        "prompt: 160 tokens, of which 75 fit", "prompt: 280 tokens of T5, of which 76 fit"
    ]  # fmt: skip
    assert "cut off: 'blue mat, a red cat on a blue mat" in lines[1]
    assert all("\n" not in line and len(line) < 200 for line in lines)
    with pytest.warns(UserWarning):
        assert_same(short, LONG, "", 77)


@torch.no_grad()
def test_the_reference_takes_the_pooled_vector_of_l_as_it_is(models: Models) -> None:
    """Stability's files hold no projection of CLIP-L's; diffusers' folders do."""
    ids = BPE().tokenize("a cat")
    plain = models.theirs.text_encoder.text_model(ids).pooler_output[0]
    bare = deepcopy(models.ours.clip_l)
    bare.projection = None
    found = replace(models.ours, clip_l=bare).encode("a cat").pooled
    usual = models.ours.encode("a cat").pooled
    assert found is not None and usual is not None
    assert_near(found[0, :32], plain, 32)  # a network of two layers
    assert torch.equal(found[0, 32:], usual[0, 32:])
    assert_near(usual[0, :32], models.theirs.text_encoder.text_projection(plain), 32)
    assert (usual[0, :32] - found[0, :32]).abs().max() > 0.1


def test_padding_of_each_encoder(models: Models, text: TripleText) -> None:
    """CLIP-L's goes on with ends, bigG's with the token of an exclamation mark, T5's with 0."""
    row = text.tokenize("!! cat!").tolist()[0]
    ids = BPE().encode("!! cat!")
    assert ids[-1] == BPE().encode("!")[0] == 256
    assert row[:77] == [49406, *ids, *[49407] * (76 - len(ids))]
    assert row[77:154] == [49406, *ids, 49407, *[0] * (75 - len(ids))]
    assert models.theirs.tokenizer_2("!! cat!").input_ids == [49406, 0, 0, 2368, 0, 49407]
    assert text.t5_tokenizer is not None
    pieces = text.t5_tokenizer.encode("!! cat!")
    assert row[154:] == [*pieces, 1, *[0] * (255 - len(pieces))] and len(pieces) > 3


def test_an_end_that_the_user_wrote(text: TripleText) -> None:
    ids = [49406, *BPE().encode("a <|endoftext|> b"), 49407]
    assert ids.count(49407) == 2
    row = text.tokenize("a <|endoftext|> b").tolist()[0]
    assert row[:77] == ids + [49407] * (77 - len(ids))
    assert row[77:154] == ids + [0] * (77 - len(ids))


def test_windows_of_clip_and_one_of_t5(text: TripleText) -> None:
    long = replace(text, long_prompts="chunks")
    with pytest.warns(UserWarning, match="prompt: 280 tokens of T5, of which 255 fit"):
        cond = long.encode([LONG, "a cat"])
        short = text.encode("a cat")
    assert cond.tokens is not None and short.tokens is not None and short.pooled is not None
    assert cond.pooled is not None
    assert cond.tokens.shape == (2, 3 * 77 + 256, WIDTH)
    assert long.windows(cond.tokens.shape[1]) == 3 and text.windows(short.tokens.shape[1]) == 1
    assert torch.equal(cond.tokens[1, :77], short.tokens[0, :77])
    assert torch.equal(cond.tokens[1, 231:], short.tokens[0, 77:])
    assert torch.equal(cond.pooled[1], short.pooled[0])
    empty = text.encode("").tokens
    assert empty is not None and torch.equal(cond.tokens[1, 77:154], empty[0, :77])
    assert long.encode("", windows=3).tokens is not None


def calls(text: TripleText, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoder works, text by text."""
    made: list[str] = []

    def counted(name: str, forward: Any) -> Any:
        return lambda *args, **kwargs: made.append(name) or forward(*args, **kwargs)

    for name, part in text.encoders.items():
        monkeypatch.setattr(part, "forward", counted(name, part.forward))
    return made


def test_a_prompt_is_encoded_once(text: TripleText, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(text, monkeypatch)
    first = text.encode(["a cat", "a cat", ""])
    assert made == ["t5"] * 2 + ["clip_g"] * 2 + ["clip_l"] * 2
    again = text.encode(["a cat", "a cat", ""])
    cond, negative = text.encode_pair(["a cat"], "")
    assert len(made) == 6 and equal(first, again)
    assert first.tokens is not None and cond.tokens is not None and negative.tokens is not None
    assert torch.equal(cond.tokens[0], first.tokens[1])
    assert torch.equal(negative.tokens[0], first.tokens[2])
    text.encode("a dog")
    assert len(made) == 9
    first.tokens.zero_()  # what a caller does to it stays with the caller
    assert first.pooled is not None and first.pooled.zero_() is not None
    assert equal(text.encode(["a cat", "a cat", ""]), again)


def test_not_everything_is_remembered(text: TripleText, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(text, monkeypatch)
    prompts = [f"{letter} cat" for letter in "abcdefghijklmnopqrst"]
    assert len(prompts) > triple.KEPT
    whole = text.encode(prompts)
    assert whole.tokens is not None and len(whole.tokens) == len(prompts)
    assert all(len(known) <= triple.KEPT for _, known in text._known.values())
    lately = prompts[-triple.KEPT :]
    made.clear()
    text.encode(lately)
    assert not made
    text.encode(lately[0])  # what is used stays longer
    text.encode("new")
    assert len(made) == 3
    text.encode(lately[0])
    assert len(made) == 3
    alone = text.encode(lately[1]).tokens
    assert len(made) == 6
    assert alone is not None and torch.equal(alone[0], whole.tokens[-triple.KEPT + 1])


def test_changed_weights_are_seen(text: TripleText, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(text, monkeypatch)
    before = text.encode("a cat")
    text.clip_l.blocks[0].enter.weight.mul_(2)
    after = text.encode("a cat")
    assert made[3:] == ["clip_l"] and not equal(before, after)
    text.clip_l.blocks[0].enter.weight.div_(2)
    assert equal(text.encode("a cat"), before)
    text.t5.load_state_dict(  # type: ignore[union-attr]
        {name: -w for name, w in text.t5.state_dict().items()}, assign=True  # type: ignore[union-attr]
    )  # fmt: skip
    assert not equal(text.encode("a cat"), before)
    made.clear()
    text.encoder.bfloat16()
    rough = text.encode("a cat")
    assert made == ["t5", "clip_g", "clip_l"]
    assert rough.tokens is not None and rough.tokens.dtype == torch.bfloat16
    replace(text).encode("a cat")
    assert len(made) == 6
    text.encode("a cat")
    assert len(made) == 6


def test_one_encoder_at_a_time_has_its_place(text: TripleText) -> None:
    """T5 first; who knows everything already is not called for."""
    there: list[str] = []
    names = {part: name for name, part in text.encoders.items()}

    @contextmanager
    def place(part: nn.Module) -> Iterator[None]:
        there.append(f"+{names[part]}")  # type: ignore[index]
        yield
        there.append(f"-{names[part]}")  # type: ignore[index]

    wanted = text.encode(["a cat", ""])
    text = replace(text)
    cond, negative = text.encode_pair("a cat", place=place)
    assert there == ["+t5", "-t5", "+clip_g", "-clip_g", "+clip_l", "-clip_l"]
    assert wanted.tokens is not None and cond.tokens is not None and negative.tokens is not None
    assert torch.equal(torch.cat([cond.tokens, negative.tokens]), wanted.tokens)
    text.encode(["", "a cat"], place=place)
    assert len(there) == 6
    assert list(text.encoder) == ["t5", "clip_g", "clip_l"]


def test_encoders_that_lie_elsewhere_between_prompts(text: TripleText) -> None:
    """Weights that come and go: nothing is left of T5 but its shape, the next prompt fetches it."""
    fetched: list[nn.Module] = []
    weights = {part: dict(part.state_dict()) for part in text.encoders.values()}

    @contextmanager
    def place(part: nn.Module) -> Iterator[None]:
        fetched.append(part)
        part.load_state_dict(weights[part], assign=True)  # type: ignore[index]
        yield
        part.to("meta")

    wanted, other = text.encode(["a cat", ""]), text.encode("a dog")
    text = replace(text)
    text.encoder.to("meta")
    cpu = torch.device("cpu")
    for _ in range(3):
        assert equal(text.encode(["a cat", ""], place=place, device=cpu), wanted)
    assert len(fetched) == 3
    assert equal(text.encode("a dog", place=place, device=cpu), other)
    assert len(fetched) == 6


def test_other_weights_may_come_back(text: TripleText) -> None:
    """What the former ones made is forgotten as soon as these are there."""
    sign = 1

    @contextmanager
    def place(part: nn.Module) -> Iterator[None]:
        part.load_state_dict(weights[part][sign], assign=True)  # type: ignore[index]
        yield
        part.to("meta")

    weights = {
        part: {sign: {name: sign * w for name, w in part.state_dict().items()} for sign in (1, -1)}
        for part in text.encoders.values()
    }
    cpu = torch.device("cpu")
    before = text.encode("a cat", place=place, device=cpu)
    sign = -1
    text.encode("a dog", place=place, device=cpu)
    assert not equal(text.encode("a cat", place=place, device=cpu), before)


def test_what_one_device_made_is_not_another_s(text: TripleText) -> None:
    """The meta device stands for another one: it makes shapes only."""
    meta = torch.device("meta")

    @contextmanager
    def place(part: nn.Module) -> Iterator[None]:
        kept = dict(part.state_dict())
        part.to(meta)
        yield
        part.load_state_dict(kept, assign=True)

    before = text.encode("a cat")
    away = text.encode("a cat", place=place, device=meta)
    assert away.tokens is not None and away.tokens.is_meta and away.tokens.shape[1] == 333
    assert equal(text.encode("a cat"), before)


def test_a_device_is_asked_for(text: TripleText, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(text, monkeypatch)
    before = text.encode("a cat")
    away = text.encode("a cat", device=torch.device("meta"))
    assert len(made) == 6 and away.tokens is not None and away.tokens.is_meta
    assert equal(text.encode("a cat"), before) and len(made) == 6


def test_half_of_a_failure_is_no_memory(text: TripleText, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = text.encode("a cat")
    text = replace(text)

    def broken(ids: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(text.clip_g, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            text.encode("a cat")
    assert equal(text.encode("a cat"), wanted)


def test_without_t5_there_are_zeros_of_its_length(text: TripleText) -> None:
    bare = replace(text, t5=None, t5_tokenizer=None, t5_length=100)
    cond, whole = bare.encode("a cat"), text.encode("a cat")
    assert cond.tokens is not None and whole.tokens is not None
    assert cond.tokens.shape == (1, 177, WIDTH) and not cond.tokens[:, 77:].any()
    assert torch.equal(cond.tokens[:, :77], whole.tokens[:, :77])
    assert bare.tokenize("a").shape == (1, 154) and list(bare.encoder) == ["clip_g", "clip_l"]


@pytest.mark.parametrize("long_prompts", ["truncate", "chunks"])
def test_bad_prompts_get_a_line_or_a_result(text: TripleText, long_prompts: Any) -> None:
    text = replace(text, long_prompts=long_prompts)
    with pytest.raises(ValueError, match=r"prompt: U\+D83D at character 6 is half") as caught:
        text.encode("half \ud83d")
    assert "\n" not in str(caught.value)
    assert text.encode("nul \x00 here").tokens is not None
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        text.encode([])
    with pytest.raises(ValueError, match="negatives: 3 for 2 prompts"):
        text.encode_pair(["a", "b"], ["", "", ""])
    huge = "a cat " * 160_000
    if long_prompts == "chunks":
        with pytest.raises(ValueError, match=r"prompt: 4267 windows of 77 tokens; allowed: 1\.\."):
            text.encode(huge)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert text.encode(huge).tokens is not None


def test_with_the_tokenizer_of_t5_itself(text: TripleText) -> None:
    config = T5Config(width=WIDTH, layers=1, heads=2, head_width=8, feed_forward=32)
    real = replace(text, t5=T5Encoder(config).eval(), t5_tokenizer=t5_tokenizer(), t5_length=77)
    row = real.tokenize("translate English to German: hello world").tolist()[0]
    ids = [13959, 1566, 12, 2968, 10, 21820, 296]
    assert row[154:] == [*ids, 1, *[0] * 69]
    with pytest.warns(UserWarning) as told:
        cond = real.encode(["nul \x00 \u202e", "a" * 50_000])
    assert cond.tokens is not None and cond.tokens.shape == (2, 154, WIDTH)
    lines = [str(one.message) for one in told]
    assert len(lines) == 2 and all("\n" not in line and len(line) < 200 for line in lines)


def test_parts_that_do_not_fit(text: TripleText) -> None:
    whole = CLIPText(CLIPConfig(width=8, layers=2, heads=1, feed_forward=8))
    bare = CLIPText(replace(whole.config, skip=1, final_norm=False))
    few = CLIPText(replace(bare.config, vocabulary=99))
    wide = T5Encoder(T5Config(vocabulary=9, width=8, layers=1, heads=1, feed_forward=8))
    small = T5Encoder(replace(wide.config, width=WIDTH))
    for changes, line in (
        ({"clip_l": whole}, "clip_l: must be loaded with skip=1 and final_norm=False"),
        ({"clip_g": bare}, r"clip_g: holds no projection \(text_projection\): not bigG"),
        ({"clip_l": few}, "encoder: knows 99 tokens, the tokenizer has 49408"),
        ({"width": 71}, "width: must be at least 72, of both CLIPs, got 71"),
        ({"t5": wide}, "t5: makes 8 features, expected 96"),
        ({"t5_length": 76}, r"t5_length: must be 77\.\.512, got 76"),
        ({"t5_length": 513}, r"t5_length: must be 77\.\.512, got 513"),
        ({"weighting": "a1111"}, "weighting: not for Stable Diffusion 3, whose T5 knows no"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            replace(text, **changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="t5: knows 9 tokens, the tokenizer has 13 or more"):
        replace(text, t5=small).encode("c")
