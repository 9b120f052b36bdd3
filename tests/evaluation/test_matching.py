import json

import pytest
import torch
from rounding import assert_near

from minidiffusion.checkpoints.reader import read_metadata
from minidiffusion.evaluation.matching import SHIPPED, EmojiJudge, bags, emoji_judge, judging
from minidiffusion.evaluation.prompted import SPLITS, asked, real
from minidiffusion.evaluation.retrieval import retrieval
from minidiffusion.models.matcher import PADDING, Matcher, MatcherConfig
from minidiffusion.text import BPE

TINY = MatcherConfig(widths=(4, 8, 8), features=6, width=5, words=49408, token=4)


@pytest.fixture(scope="module")
def untrained() -> EmojiJudge:
    torch.manual_seed(0)
    return judging(Matcher(TINY))


def test_captions_become_ids_without_begin_and_end() -> None:
    tokenizer = BPE()
    found = bags(tokenizer, ["dog", "a red apple, 3d style"])
    assert found[0].tolist() == tokenizer.encode("dog") + [PADDING] * (found.shape[1] - 1)
    assert found[1].tolist() == tokenizer.encode("a red apple, 3d style")


def test_cosines_are_of_every_picture_with_every_caption(untrained: EmojiJudge) -> None:
    x = torch.rand(300, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["dog, flat style", "a cat", "fish, 3d style"]
    cosines = untrained(x, captions)
    assert cosines.shape == (300, 3) and not cosines.requires_grad
    for i in (0, 299):  # in different batches
        for j, caption in enumerate(captions):
            alone = untrained(x[i : i + 1], [caption])
            assert_near(cosines[i : i + 1, j : j + 1], alone, 32, scale=1)
    assert untrained.extractor(x[:5]).shape == (5, untrained.extractor.dim) == (5, 6)


def test_what_was_shipped_says_how_good_it_is() -> None:
    assert SHIPPED.stat().st_size <= 2 * 2**20
    figures = json.loads(read_metadata(SHIPPED)["retrieval"])
    for split in SPLITS:
        assert float(figures[f"{split}, real"].split()[0]) > 0.97
        assert float(figures[f"{split}, at 32 pixels"].split()[0]) > 0.95


def test_the_shipped_judge_is_as_good_as_it_says() -> None:
    shipped = emoji_judge()
    figures = json.loads(read_metadata(SHIPPED)["retrieval"])
    one = asked("concept", 1000)
    captions = [pair.captions()[0] for pair in one.pairs]
    found = retrieval(shipped(real("concept"), captions), one.pairs, one.rows)
    # a picture of 278 may be told apart by a rounding; of 1,000 draws of these that is 0.0036
    assert abs(found.share - float(figures["concept, real"].split()[0])) < 0.002
