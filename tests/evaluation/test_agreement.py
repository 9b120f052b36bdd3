import pytest
import torch
from rounding import assert_near
from scipy.stats import binomtest

from minidiffusion.data.fashion import FashionMNIST
from minidiffusion.evaluation.agreement import agreement, wilson
from minidiffusion.evaluation.features import Judge, judge


@pytest.fixture(scope="module")
def fashion() -> Judge:
    return judge("fashion_mnist")


def test_the_shipped_judge_is_as_good_as_it_says(fashion: Judge) -> None:
    data = FashionMNIST(split="test").open()
    batch = data.batch(range(len(data)))
    found = agreement(fashion, batch.x, batch.labels)
    assert found.share >= fashion.accuracy >= 0.92
    assert found.low < fashion.accuracy < found.high
    assert fashion.classes == data.classes


def test_the_judge_of_digits() -> None:
    mnist = judge("mnist")
    assert mnist.accuracy >= 0.993 and mnist.classes == tuple("0123456789")
    assert mnist.extractor.name != judge("fashion_mnist").extractor.name


def test_the_features_are_those_behind_the_verdict(fashion: Judge) -> None:
    x = torch.rand(300, 1, 28, 28) * 2 - 1
    features = fashion.extractor(x)
    assert features.shape == (300, fashion.extractor.dim) and not features.requires_grad
    assert torch.equal(fashion.network.head(features).argmax(dim=1), fashion(x))


def test_agreement_counts(fashion: Judge) -> None:
    x = torch.rand(50, 1, 28, 28) * 2 - 1
    verdicts = fashion(x)
    assert agreement(fashion, x, verdicts).share == 1
    half = torch.where(torch.arange(50) < 20, verdicts, (verdicts + 1) % 10)
    assert agreement(fashion, x, half).share == 0.4
    with pytest.raises(ValueError, match=r"0\.\.9"):
        agreement(fashion, x, verdicts + 10)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (3, 10), (1980, 2000)])
def test_the_interval_of_wilson(hits: int, count: int) -> None:
    wanted = binomtest(hits, count).proportion_ci(method="wilson")
    assert_near(wilson(hits, count), (wanted.low, wanted.high), 16, scale=1)
