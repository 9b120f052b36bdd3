"""Weights in a prompt: the dialect's grammar against its definition, and the embeddings."""

import random
import re

import pytest
import torch
from rounding import assert_near

from minidiffusion.text.weighting import emphasised, weighted

ROWS: list[tuple[str, list[tuple[str, float]]]] = [
    ("", []),
    ("a cat", [("a cat", 1)]),
    ("a (cat)", [("a ", 1), ("cat", 1.1)]),
    ("((cat))", [("cat", 1.21)]),
    ("a (cat:1.3) sat", [("a ", 1), ("cat", 1.3), (" sat", 1)]),
    ("[cat]", [("cat", 1 / 1.1)]),
    ("([cat])", [("cat", 1)]),
    ("(a (b:2) c:.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
    (r"\(cat\) \[dog\] \\ \n", [("(cat) [dog] \\ \\n", 1)]),
    ("(cat", [("cat", 1.1)]),
    ("a [(cat", [("a cat", 1)]),
    ("cat) dog] :1.2)", [("cat) dog] :1.2)", 1)]),
    ("(cat: 1.5 )", [("cat", 1.5)]),
    ("(cat:-1)(dog:+2)", [("cat", -1), ("dog", 2)]),
    ("(wait:...) (a:b) 12:30", [("wait:...", 1.1), (" ", 1), ("a:b", 1.1), (" 12:30", 1)]),
    ("(a)(b)", [("ab", 1.1)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
    ("()[]", []),
    ("(cat\n:1.3)", [("cat\n", 1.3)]),
]


@pytest.mark.parametrize(("prompt", "parts"), ROWS)
def test_the_grammar(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = weighted(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert_near([weight for _, weight in found], [weight for _, weight in parts], 32)


def by_definition(prompt: str) -> list[tuple[str, float]]:
    """Every letter's weight: each bracket, when it closes, multiplies all since it was opened."""
    marks = re.findall(r"\\[\\()\[\]]|[()\[\]]|:\d\.\d\)|[^\\]|\\", prompt)
    letters: list[list[object]] = []
    waiting: dict[str, list[int]] = {")": [], "]": []}

    def close(kind: str, factor: float) -> None:
        for row in letters[waiting[kind].pop() :]:
            row[1] = float(row[1]) * factor  # type: ignore[arg-type]

    for mark in marks:
        if mark in "([":
            waiting[")" if mark == "(" else "]"].append(len(letters))
        elif mark[0] != "\\" and mark[-1] in ")]" and waiting[mark[-1]]:
            close(mark[-1], float(mark[1:-1]) if mark[1:] else {")": 1.1, "]": 1 / 1.1}[mark])
        else:
            letters += [[letter, 1.0] for letter in (mark[-1:] if mark[0] == "\\" else mark)]
    for kind, factor in ((")", 1.1), ("]", 1 / 1.1)):
        while waiting[kind]:
            close(kind, factor)
    return [(str(letter), float(weight)) for letter, weight in letters]  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_random_prompts_follow_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    parts = ["(", ")", "[", "]", ":1.3)", ":0.5)", "\\(", "\\]", "\\", "a", "b", ":", "."]
    for _ in range(50):
        prompt = "".join(draw.choices(parts, k=draw.randrange(20)))
        found = [(letter, weight) for text, weight in weighted(prompt) for letter in text]
        wanted = by_definition(prompt)
        assert [letter for letter, _ in found] == [letter for letter, _ in wanted], prompt
        assert_near(
            [weight for _, weight in found], [weight for _, weight in wanted], 32
        )  # factors


def test_long_prompts_and_deep_nesting() -> None:
    many = 100_000
    assert weighted(")" * many) == [(")" * many, 1.0)]
    assert weighted("(" * many) == weighted("[" * many) == []
    assert weighted("a:" * (many // 2)) == [("a:" * (many // 2), 1.0)]
    assert weighted("[" * many + "a") == [("a", 0.0)]
    assert weighted("(" * 5000 + "[" * 5000 + "a" * 9)[0][0] == "a" * 9
    assert weighted(":" + " " * many) == [(":" + " " * many, 1.0)]
    assert weighted("(a:" + "1" * 9) == [("a:" + "1" * 9, 1.1)]


@pytest.mark.parametrize(
    "prompt", ["(" * 60 + "a", "(a:101)", "((a:99):99)", "(a:" + "9" * 999 + ")"]
)
def test_absurd_weights_are_refused_in_a_line(prompt: str) -> None:
    with pytest.raises(
        ValueError, match=r"prompt: the brackets .*; allowed: -100 to 100"
    ) as caught:
        weighted(prompt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_embeddings_are_multiplied_and_their_mean_restored() -> None:
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.ones(2, 5)
    assert emphasised(tokens, weights) is tokens
    weights[1, 2] = 1.5
    found = emphasised(tokens, weights)
    assert torch.equal(found[0], tokens[0])
    assert_near(found[1].mean(), tokens[1].mean(), 16)
    assert_near(found[1, 2] / found[1, 1], 1.5 * tokens[1, 2] / tokens[1, 1], 8)
    half = emphasised(tokens.bfloat16(), weights)
    assert half.dtype == torch.bfloat16 and torch.equal(half[0], tokens[0].bfloat16())


def test_no_mean_to_restore_is_no_division_by_zero() -> None:
    tokens = torch.ones(1, 2, 4)
    assert emphasised(tokens, torch.tensor([[1.0, -1.0]])).isfinite().all()
