import pytest
import torch
from rounding import assert_near, assert_parity

from minidiffusion.models.matcher import PADDING, Matcher, MatcherConfig

TINY = MatcherConfig(widths=(4, 8, 8), features=6, width=5, words=10, token=4, hidden=7)


def network() -> Matcher:
    torch.manual_seed(0)
    made = Matcher(TINY).eval()
    made.vocabulary.copy_(torch.arange(10) * 3)
    return made


@pytest.mark.parametrize("config", [TINY, MatcherConfig()])
def test_directions_have_length_one_and_cosines_are_of_all_pairs(config: MatcherConfig) -> None:
    made = Matcher(config).eval()
    x, ids = torch.randn(3, 3, config.side, config.side), torch.tensor([[0, 3], [9, PADDING]])
    looks, reads = made.pictures(x), made.captions(ids)
    assert made.features(x).shape == (3, config.features)
    assert_near(looks.norm(dim=1), torch.ones(3), 8)
    assert_near(reads.norm(dim=1), torch.ones(2), 8)
    assert_near(made(x, ids), looks @ reads.T, 8, scale=1)
    assert made(x, ids).abs().max() <= 1 + 8 * torch.finfo(x.dtype).eps


def test_a_caption_is_a_bag_of_known_words() -> None:
    made, plain = network(), torch.tensor([[3, 27, 9]])
    same = [[27, 9, 3, PADDING], [3, 4, 27, 9], [3, 27, 9, 1000], [3, 27, 9, 28]]
    for row in same:
        assert_near(made.captions(torch.tensor([row])), made.captions(plain), 8)
    other = made.captions(torch.tensor([[3, 27, 6]]))
    assert (other - made.captions(plain)).abs().max() > 1e-3


def test_the_first_and_the_last_token_are_known_and_padding_is_not() -> None:
    made = network()
    nothing = made.captions(torch.tensor([[PADDING, 1, 29, 50_000]]))
    for known in (0, 27):
        assert (made.captions(torch.tensor([[known]])) - nothing).abs().max() > 1e-3


def test_a_picture_is_judged_alone_as_in_a_batch() -> None:
    x = torch.randn(4, 3, 32, 32)
    assert_parity(
        lambda made, x: made.pictures(x)[1:2], lambda made, x: made.pictures(x[1:2]), network(), x
    )


def test_a_larger_picture_is_shrunk_first() -> None:
    made, x = network(), torch.randn(2, 3, 64, 64)
    assert_parity(
        lambda made, x: made.features(x),
        lambda made, x: made.features(
            x.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean(dim=(3, 5))
        ),
        made, x,
    )  # fmt: skip


def test_it_is_small() -> None:
    assert sum(weight.numel() for weight in Matcher().parameters()) < 1_000_000
