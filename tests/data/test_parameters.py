"""A1111's text: as that program writes it, back to the letter, and what is no such text."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minidiffusion.data.parameters import (
    KNOWN,
    SAMPLER_NAMES,
    SCHEDULES,
    Facts,
    read_parameters,
    write_parameters,
)
from minidiffusion.diffusion import SAMPLERS, SPACINGS

FULL = Facts(
    prompt="a cat in a hat, (red:1.3)\nin the snow",
    negative_prompt="blurry, text",
    steps=30,
    sampler="dpmpp_2m",
    spacing="karras",
    guidance_scale=7.5,
    seed=7,
    width=768,
    height=512,
    model_hash="6ce0161689",
    model="v1-5-pruned-emaonly",
    strength=0.75,
    version="minidiffusion 0.1.0",
)
TEXT = """a cat in a hat, (red:1.3)
in the snow
Negative prompt: blurry, text
Steps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 7, Size: 768x512, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.75, \
Version: minidiffusion 0.1.0"""


def test_the_text_is_the_one_that_others_read() -> None:
    assert write_parameters(FULL) == TEXT
    assert read_parameters(TEXT) == FULL
    assert write_parameters(Facts("a cat", 1)) == "a cat\nSteps: 1"
    assert write_parameters(Facts("", 1, guidance_scale=7.0)) == "Steps: 1, CFG scale: 7"
    assert write_parameters(Facts("", 1, "x")) == "Negative prompt: x\nSteps: 1"


def test_values_are_quoted_where_they_must_be() -> None:
    facts = Facts("p", 1, model='a, "b": c\nd', extra={"Lora hashes": "one: 1, two: 2", "Eta": "0"})
    line = write_parameters(facts).split("\n")[1]
    assert line == (
        r'Steps: 1, Model: "a, \"b\": c\nd", Lora hashes: "one: 1, two: 2", Eta: 0'
    )  # fmt: skip
    assert read_parameters(write_parameters(facts)) == facts


def test_texts_of_the_program_itself() -> None:
    newer = (
        "portrait, <lora:a:0.8>\nNegative prompt: bad\nworse\n"
        "Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 7, Seed: 4294967295, "
        "Size: 512x768, Model hash: cc6cb27103, Model: v1-5-pruned, Clip skip: 2, "
        'Lora hashes: "a: 1, b: 2", Version: v1.10.1\n'
    )
    found = read_parameters(newer)
    assert (found.prompt, found.negative_prompt) == ("portrait, <lora:a:0.8>", "bad\nworse")
    assert (found.sampler, found.spacing) == ("dpmpp_2m_sde", "karras")
    assert (found.guidance_scale, found.seed) == (7.0, 4294967295)
    assert (found.width, found.height, found.model_hash) == (512, 768, "cc6cb27103")
    assert found.extra == {"Clip skip": "2", "Lora hashes": "a: 1, b: 2"}
    older = read_parameters("Steps: 5, Sampler: Euler a, CFG scale: 1.0, Seed: -1, Size: 64x64")
    assert (older.prompt, older.sampler, older.spacing) == ("", "euler_ancestral", None)
    strange = read_parameters("a\nSteps: 5, Sampler: DPM fast, Schedule type: Turbo")
    assert (strange.sampler, strange.spacing) == ("DPM fast", "Turbo")
    automatic = read_parameters("a\nSteps: 5, Sampler: Euler, Schedule type: Automatic")
    assert (automatic.sampler, automatic.spacing) == ("euler", None)


def test_every_sampler_and_spacing_has_a_name() -> None:
    assert set(SAMPLER_NAMES) == set(SAMPLERS) and set(SCHEDULES) <= set(SPACINGS)
    seen = set()
    for sampler in (None, *SAMPLERS):
        for spacing in (None, *SPACINGS):
            facts = Facts("p", 3, sampler=sampler, spacing=spacing)
            text = write_parameters(facts)
            assert read_parameters(text) == facts
            seen.add(text)
    assert len(seen) == (1 + len(SAMPLERS)) * (1 + len(SPACINGS))


LETTERS = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates too
AWKWARD = st.lists(
    st.sampled_from(
        ["Negative prompt:", "Negative prompt: ", "\n", " ", "Steps: ", "Steps: 3, Seed: 4", ",",
         ":", '"', "\\", "\r", "\t", "\x85", "\u2028", "\0", "a", "狐", 'Prompt: "x"']
    ),
    max_size=8,
).map("".join)  # fmt: skip
TEXTS = LETTERS | AWKWARD
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9 /-]{0,20}[A-Za-z]", fullmatch=True)
NAMES = NAMES.filter(lambda name: name not in KNOWN)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SIDES = st.integers(1, 65536)


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    made = Facts(
        draw(TEXTS), draw(st.integers(1, 1000)), draw(TEXTS),
        draw(st.none() | st.sampled_from(sorted(SAMPLERS))),
        draw(st.none() | st.sampled_from(sorted(SPACINGS))),
        draw(st.none() | NUMBERS), draw(st.none() | st.integers(-(2**63), 2**64)),
        model_hash=draw(st.none() | TEXTS), model=draw(st.none() | TEXTS),
        strength=draw(st.none() | NUMBERS), version=draw(st.none() | TEXTS),
        extra=draw(st.dictionaries(NAMES, TEXTS, max_size=3)),
    )  # fmt: skip
    size = draw(st.none() | st.tuples(SIDES, SIDES))
    return made if size is None else replace(made, width=size[0], height=size[1])


@settings(max_examples=200, deadline=None)
@given(facts())
@example(Facts("Steps: 3, Sampler: Euler, Seed: 1", 1))
@example(Facts("a\nNegative prompt: b", 1, "c\nNegative prompt: d"))
@example(Facts("Negative prompt: b", 1))
@example(Facts("\n", 1, "\n"))
@example(Facts("p", 1, model='"x"', version='"'))
def test_every_text_comes_back_to_the_letter(made: Facts) -> None:
    text = write_parameters(made)
    assert read_parameters(text) == made
    assert text.split("\n")[-1].startswith("Steps: ")


@settings(max_examples=100, deadline=None)
@given(facts())
def test_a_reader_of_their_kind_understands_the_settings(made: Facts) -> None:
    """Their way to read, as their documentation of the format has it: settings are name: value by
    commas, and a value in double quotes is JSON."""
    line, found = write_parameters(made).split("\n")[-1], {}
    while line:
        name, line = line.split(":", 1)
        line = line.removeprefix(" ")
        if line.startswith('"'):
            value, end = json.JSONDecoder(strict=False).raw_decode(line)
            line = line[end:]
            assert line == "" or line.startswith(", ")
        else:
            value, comma, rest = line.partition(", ")
            line = comma + rest
        found[name.removeprefix(", ")] = value
    assert int(found["Steps"]) == made.steps
    for name, value in made.extra.items():
        assert found[name] == value
    if made.model is not None:
        assert found["Model"] == made.model


@pytest.mark.parametrize(
    "prompt",
    ["word " * 200_000, "狐" * 1_000_000, "a:" * 500_000, '",\n' * 330_000, "a" * 1_000_000],
)
def test_a_megabyte(prompt: str) -> None:
    made = replace(FULL, prompt=prompt, negative_prompt=prompt, extra={"Note": prompt})
    assert read_parameters(write_parameters(made)) == made


def test_a_hostile_line_is_read_in_no_time() -> None:
    for line in (
        "a" * 10**6,
        'a1: "' * 10**4,
        " " * 10**5 + "a",
        "x: " + '"\\' * 10**5,
        "a " * 10**5,
    ):
        assert read_parameters(f"p\nSteps: 1, {line}").steps == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "their last line must start with 'Steps: '"),
        ("a cat", "their last line"),
        ("Steps: 3\na cat", "their last line"),
        ("a\nSteps: many", "Steps: expected a whole number, got 'many'"),
        ("a\nSteps: 3, Seed: 1e5", "Seed: expected a whole number, got '1e5'"),
        ("a\nSteps: 3, Seed: " + "9" * 10**5, "Seed: expected a whole number, got '9999"),
        ("a\nSteps: 3, CFG scale: nan", "CFG scale: expected a number, got 'nan'"),
        ("a\nSteps: 3, Denoising strength: ", "Denoising strength: expected a number, got ''"),
        ("a\nSteps: 3, Size: 512", "Size: expected WIDTHxHEIGHT, got '512'"),
        ("a\nSteps: 3, Size: 1x2x3", "Size: expected WIDTHxHEIGHT"),
    ],
)
def test_what_is_no_such_text(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_parameters(text)
    assert str(caught.value).startswith("parameters: ") and len(str(caught.value)) < 200


def test_what_cannot_be_written() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not finite"):
            write_parameters(Facts("a", 1, guidance_scale=value))
    for name in ("Seed", "Prompt", "a", "a:b", "a,b", " ab", "ab ", "a\nb", ""):
        with pytest.raises(ValueError, match="a name of its own, in words"):
            write_parameters(Facts("a", 1, extra={name: "x"}))
