import pytest
import torch
from rounding import SHORT, assert_near

from minidiffusion.data.emoji import Pair, Style
from minidiffusion.evaluation.agreement import wilson
from minidiffusion.evaluation.retrieval import candidates, retrieval, retrieved, share

STYLES: tuple[Style, ...] = ("3d", "flat", "noto")


def made(concepts: int) -> list[Pair]:
    """Three pairs of every concept."""
    return [
        Pair(f"{i:x}", style, f"thing {i}", [], "objects", False, "train")
        for i in range(concepts) for style in STYLES
    ]  # fmt: skip


def test_candidates_are_of_different_concepts_the_own_first() -> None:
    pairs = made(120)
    found = candidates(pairs, [0, 7, 359])
    assert found.shape == (3, 100) and found[:, 0].tolist() == [0, 7, 359]
    for row in found.tolist():
        assert len({pairs[place].concept for place in row}) == 100
    drawn = {pairs[place].style for place in found[0].tolist()}
    assert drawn == set(STYLES)


def test_candidates_are_a_function_of_the_row_and_the_seed() -> None:
    pairs = made(40)
    whole = candidates(pairs, range(60), ways=10)
    assert torch.equal(candidates(pairs, [33, 5], ways=10), whole[[33, 5]])
    assert not torch.equal(candidates(pairs, range(60), ways=10, seed=1), whole)
    others = whole[:, 1:].flatten().bincount(minlength=120)
    assert others.max() < 20  # 540 draws from 120 pairs: no one is offered to all


def test_all_concepts_may_be_offered_but_no_more() -> None:
    pairs = made(10)
    assert {pairs[i].concept for i in candidates(pairs, [4], ways=10)[0].tolist()} == {
        f"{i:x}" for i in range(10)
    }
    for ways in (1, 11):
        with pytest.raises(ValueError, match=f"{ways} ways: must be 2..10"):
            candidates(pairs, [4], ways=ways)


def test_the_own_caption_must_fit_better_than_all_others() -> None:
    among = torch.tensor([[2, 0, 1]] * 4)
    cosines = torch.tensor(
        [[0.1, 0.2, 0.3], [0.1, 0.4, 0.3], [0.3, 0.1, 0.3], [0.1, 0.2, torch.nan]]
    )
    assert retrieved(cosines, among).tolist() == [True, False, False, False]


def test_retrieval_of_the_right_of_the_wrong_and_of_chance() -> None:
    pairs = made(200)
    concepts = torch.arange(200).repeat_interleave(3)
    same = (concepts[:, None] == concepts).float()
    rows = range(0, 600, 2)
    right = retrieval(same[rows], pairs, rows)
    assert right.share == 1 and right[1:] == wilson(300, 300)
    assert retrieval(-same[rows], pairs, rows).share == 0
    noise = torch.rand(300, 600, generator=torch.Generator().manual_seed(0))
    chance = retrieval(noise, pairs, rows, ways=20, draws=10)
    assert abs(chance.share - 0.05) < 3 * (0.05 * 0.95 / 300) ** 0.5 / 2.5  # 3,000 draws of 300
    assert chance.low < 0.05 < chance.high


def test_draws_sharpen_the_share_but_count_no_more_pictures() -> None:
    part = share(torch.tensor([0.2, 1.0, 0.6, 1.0]))
    assert_near(part, (0.7, *wilson(2.8, 4)), 4, eps=SHORT)
    with pytest.raises(ValueError, match="no pictures"):
        share(torch.tensor([]))
