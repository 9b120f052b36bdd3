"""Weights inside a prompt: (word:1.3) counts more, [word] less.

The dialect is that of AUTOMATIC1111's stable-diffusion-webui: (a) is 1.1, ((a)) is 1.21, [a] is
1/1.1, (a:1.3) is 1.3, brackets inside brackets multiply, a backslash makes a bracket text. A
bracket that nothing closes reaches to the end; one that closes nothing is text. Its BREAK, AND,
[from:to:when] and <lora:...> are ordinary text here.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.shapes import Tokens

MARK = re.compile(
    r"(?P<open>\()|(?P<close>\)|:\s*+([+-]?(?:\d++\.?\d*+|\.\d++))\s*+\))"
    r"|(?P<escape>\\[\\()\[\]])|[^\\()\[\]:]++|.",
    re.DOTALL,
)
"""A bracket, a round one's end with its weight, an escape, or text."""
ROUND = 1.1
LARGEST = 100.0


def weighted(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt and their weights; linear in its length, however deep the brackets.

    Raises ValueError where brackets multiply to a weight outside [-100, 100].
    """
    parts = groupby(weighted_marks(prompt), key=itemgetter(1))
    return [("".join(text for text, _ in group), weight) for weight, group in parts]


def weighted_marks(prompt: str) -> Iterator[tuple[str, float]]:
    marks = list(MARK.finditer(prompt))
    factors = opened(marks)
    outer, squares = [1.0], 0
    for place, mark in enumerate(marks):
        text, kind = mark[0], mark.lastgroup
        if kind == "open":
            outer.append(outer[-1] * factors[place])
        elif kind == "close" and len(outer) > 1:
            outer.pop()
        elif text == "[":
            squares += 1
        elif text == "]" and squares:
            squares -= 1
        else:
            weight = outer[-1] * ROUND**-squares
            if not abs(weight) <= LARGEST:  # nor is it a number where infinity met zero
                raise ValueError(
                    f"prompt: the brackets around character {mark.start() + 1} multiply to a "
                    f"weight of {weight:.3g}; allowed: {-LARGEST:g} to {LARGEST:g}"
                )
            yield text[1:] if kind == "escape" else text, weight


def opened(marks: list[re.Match[str]]) -> dict[int, float]:
    """What each opening round bracket multiplies by, which is said only where it closes."""
    factors, waiting = {}, []
    for place, mark in enumerate(marks):
        if mark.lastgroup == "open":
            factors[place] = ROUND
            waiting.append(place)
        elif mark.lastgroup == "close" and waiting:
            factors[waiting.pop()] = float(mark[3] or ROUND)
    return factors


def emphasised(tokens: Tokens, weights: Float[Tensor, "b n"]) -> Tokens:
    """Every token's embedding times its weight, the mean of each text restored to what it was.

    The original takes the mean over a whole batch; here a text does not depend on its neighbours.
    """
    if bool((weights == 1).all()):
        return tokens
    before = tokens.float()
    after = before * weights[..., None]
    means = before.mean(dim=(1, 2), keepdim=True), after.mean(dim=(1, 2), keepdim=True)
    scale = torch.where(means[1] == 0, 1, means[0] / means[1])
    return (after * scale).to(tokens.dtype)
