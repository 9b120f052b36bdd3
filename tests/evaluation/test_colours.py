import pytest
import torch
from rounding import assert_near

from minidiffusion.data.dataset import as_floats
from minidiffusion.data.emoji import Emoji
from minidiffusion.evaluation.colours import COLOURS, EXAMPLES, coloured, dominant, named, oklab


@pytest.mark.parametrize(("caption", "colour"), [
    ("red heart, 3d style", "red"), ("a blue circle, flat style", "blue"),
    ("an orange book", "orange"), ("large orange diamond, noto style", "orange"),
    ("a light blue heart", "blue"), ("black cat, flat style", "black"),
    ("man: red hair, flat style", None), ("white heart, flat style", None),
    ("black square button, noto style", None), ("mahjong red dragon, flat style", None),
    ("leafy green, noto style", None), ("police car light", None), ("green, flat style", None),
    ("redwood tree", None), ("orange, flat style", None),
])  # fmt: skip
def test_the_colour_of_what_a_caption_is_of(caption: str, colour: str | None) -> None:
    assert named(caption) == colour


def test_oklab_of_its_author() -> None:
    """Of sRGB's white, red, green and blue: Ottosson's figures."""
    given = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    wanted = torch.tensor([
        [1.0, 0, 0], [0.628, 0.2249, 0.1258], [0.8664, -0.2339, 0.1795], [0.452, -0.0325, -0.3115],
    ])  # fmt: skip
    assert_near(oklab(given), wanted, 0.51, scale=1, eps=1e-4)  # of 4 decimals


def painted(code: str, part: float = 0.3) -> torch.Tensor:
    """A square of this colour on white."""
    picture = torch.ones(3, 64, 64)
    side = round(64 * part**0.5)
    colour = torch.tensor([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 127.5 - 1
    picture[:, 5 : 5 + side, 9 : 9 + side] = colour[:, None, None]
    return picture


@pytest.mark.parametrize("colour", COLOURS)
def test_plain_colours_bear_their_names(colour: str) -> None:
    pictures = torch.stack([painted(code) for code in EXAMPLES[colour]])
    assert dominant(pictures) == [colour] * len(pictures)


def test_the_larger_part_decides_and_the_background_is_none() -> None:
    both = painted("f8312f", 0.2)
    both[:, 40:44, 40:60] = painted("0074ba", 1.0)[:, 20:24, 20:40]
    both[:, 50:] = 0.95  # a background that is not quite white
    empty = torch.full((3, 64, 64), 0.9)
    assert dominant(torch.stack([both, empty, empty * 1.5])) == ["red", None, None]


def test_only_captions_that_name_one_are_counted() -> None:
    pictures = torch.stack([painted("f8312f"), painted("0074ba"), painted("0074ba")])
    captions = ["red heart", "a dog", "green book"]
    assert coloured(pictures, captions).tolist() == [True, False]
    assert coloured(pictures[:1], ["a dog"]).shape == (0,)


def test_real_pictures_have_the_colours_that_their_names_say() -> None:
    """The rest are black nibs, which are grey, salad in a grey bowl, lanterns that glow."""
    pairs = Emoji(split="all").pairs()
    rows = [row for row, pair in enumerate(pairs) if named(pair.label)]
    x = as_floats(Emoji(split="all", captions="short").open().x[rows])
    hits = coloured(x, [pairs[row].label for row in rows])
    assert len(hits) == 155 and hits.sum() >= 146
