import json

import pytest
import torch
from torch import Tensor

from minidiffusion.data.fashion import FashionMNIST
from minidiffusion.evaluation.features import Extractor, Judge, judge
from minidiffusion.evaluation.report import evaluate


@pytest.fixture(scope="module")
def fashion() -> Judge:
    return judge("fashion_mnist")


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    data = FashionMNIST(split="test").open()
    batch = data.batch(range(len(data)))
    return batch.x, batch.labels


@pytest.fixture(scope="module")
def train() -> tuple[Tensor, Tensor]:
    batch = FashionMNIST(limit=3000).open().batch(range(3000))
    return batch.x, batch.labels


def test_real_pictures_as_samples_score_the_floor(
    fashion: Judge, real: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]
) -> None:
    scores = evaluate(real[0][:400], real[1][:400], train[0], real[0][400:], fashion)
    assert scores.count == 400 and scores.extractor == fashion.extractor.name
    assert 0.5 < scores.frechet / scores.frechet_floor < 2
    assert abs(scores.kid.mean) < 0.03  # noise has 2.3; its own error is a poor guide near zero
    assert min(scores.precision, scores.recall) > 0.75
    assert abs(scores.nearest_ratio - 1) < 0.1
    assert scores.agreement is not None and scores.judge_accuracy == fashion.accuracy
    assert scores.agreement.low < fashion.accuracy < scores.agreement.high


def test_copies_are_seen_and_noise_is_seen(
    fashion: Judge, real: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]
) -> None:
    copies = evaluate(train[0][:150], train[1][:150], train[0], real[0], fashion)
    assert copies.nearest_ratio == 0 and copies.frechet < 2 * copies.frechet_floor
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(150, 1, 28, 28, generator=draw).clamp(-1, 1)
    bad = evaluate(noise, train[1][:150], train[0], real[0], fashion)
    assert bad.frechet > 10 * bad.frechet_floor and bad.precision < 0.1
    assert bad.agreement is not None and bad.agreement.high < 0.3


def test_the_table_and_the_dict(
    fashion: Judge, real: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]
) -> None:
    scores = evaluate(real[0][:150], real[1][:150], train[0], real[0][150:], fashion)
    table, plain = scores.table(), scores.as_dict()
    assert f"{scores.frechet:.2f} (floor {scores.frechet_floor:.2f})" in table
    assert "150 pictures, features lenet-fashion_mnist-96" in table and "judge 92.9 %" in table
    assert json.loads(json.dumps(plain)) == plain
    assert plain["kid_error"] == scores.kid.error and "agreement_low" in plain


def test_without_a_judge_or_labels(real: tuple[Tensor, Tensor]) -> None:
    pixels = Extractor("mean-rows", 28, lambda x: x.mean(dim=(1, 2)))
    scores = evaluate(real[0][:100], None, real[0][300:400], real[0][100:300], extractor=pixels)
    assert scores.agreement is None and "agreement" not in scores.table()
    assert set(scores.as_dict()) & {"agreement", "judge_accuracy"} == set()
    with pytest.raises(ValueError, match="something must look"):
        evaluate(real[0][:100], None, real[0][300:], real[0][100:300])
    with pytest.raises(ValueError, match="100 held-out and 100 training pictures, not 90 and 200"):
        evaluate(real[0][:100], None, real[0][:200], real[0][:90], extractor=pixels)
