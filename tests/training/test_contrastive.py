"""CLIP's loss against loops over pairs, its groups, and the captions as it reads them."""

import math
from dataclasses import replace
from pathlib import Path

import encoders
import pytest
import torch
from rounding import assert_near, peak
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.checkpoints.own import load_clip
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.data import Tensors
from minidiffusion.data.dataset import Batch
from minidiffusion.models import CLIPConfig, DualEncoder
from minidiffusion.text.bpe import shortened
from minidiffusion.training.contrastive import Contrasting, contrast, fitted, found
from minidiffusion.training.loop import train
from minidiffusion.training.objectives import Contrastive
from minidiffusion.typed import ConfigError

CPU = torch.device("cpu")


def vectors(count: int = 6) -> tuple[Tensor, Tensor]:
    texts, pictures = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(0))
    return F.normalize(texts, dim=1), F.normalize(pictures, dim=1)


def task(group: int = 4) -> Contrasting:
    data = encoders.captioned()
    recipe = replace(encoders.recipe("clip"), objective=Contrastive(group=group))
    return Contrasting(fitted(recipe, data), data, CPU, "fp32")


def number(x: Tensor) -> float:
    return float(x.detach())


def network(made: Contrasting) -> DualEncoder:
    torch.manual_seed(0)
    return made.network()


def test_a_pair_among_others_by_hand() -> None:
    """Each text must choose its picture, and each picture its text."""
    texts, pictures = vectors()
    products = [[5.0 * number(t @ p) for p in pictures] for t in texts]
    total = 0.0
    for i in range(6):
        for rivals in (products[i], [row[i] for row in products]):
            total -= math.log(math.exp(products[i][i]) / sum(map(math.exp, rivals)))
    assert_near(contrast(texts, pictures, torch.tensor(5.0)), total / 12, 16)
    wanted = [max(range(6), key=lambda j, row=row: row[j]) == i for i, row in enumerate(products)]
    assert found(texts, pictures).tolist() == wanted and found(texts, texts).all()


@pytest.mark.parametrize(("group", "groups"), [(4, 2), (2, 4), (8, 1), (128, 1)])
def test_pairs_are_told_apart_in_groups(group: int, groups: int) -> None:
    made = task(group)
    dual, batch = network(made), made.dataset.batch(range(8))
    loss, parts = made.loss(dual, 0, 0, batch)
    texts, pictures, scale = dual(made.ids(batch.captions), batch.x)
    size = 8 // groups
    cuts = [slice(start, start + size) for start in range(0, 8, size)]
    wanted = sum(contrast(texts[cut], pictures[cut], scale) for cut in cuts) / groups
    assert_near(loss, wanted, 16)
    right = sum(int(found(texts[cut], pictures[cut]).sum()) for cut in cuts)
    assert parts["accuracy"].tolist() == [right, 8]


def test_a_batch_that_groups_do_not_divide() -> None:
    made = task()
    with pytest.raises(ConfigError, match=r"objective.group: the micro-batch of 6 is no multiple"):
        made.loss(network(made), 0, 0, made.dataset.batch(range(6)))
    with pytest.raises(ConfigError, match="micro-batch of 6"):
        run = replace(encoders.recipe("clip"), run=replace(made.recipe.run, micro_batch=6))
        next(train(run, dataset=made.dataset))


def test_two_micro_batches_are_the_batch() -> None:
    """With groups as large as a micro-batch the sum of their gradients is the whole's."""
    made = task()
    dual, gradients = network(made), []
    for size in (8, 4):
        dual.zero_grad()
        for start in range(0, 8, size):
            batch = made.dataset.batch(range(start, start + size))
            loss, _ = made.loss(dual, 0, start, batch)
            (loss * size / 8).backward()
        gradients.append([p.grad.clone() for p in dual.parameters() if p.grad is not None])
    for whole, halves in zip(*gradients, strict=True):
        assert_near(whole, halves, 64, scale=max(map(peak, gradients[0])))


def test_captions_are_read_as_text_encoders_do_and_cut_silently() -> None:
    made = task()
    text = shortened(600)
    short, long = "an apple", "apple " * 30
    ids = made.ids((short, long, ""))
    assert ids.shape == (3, 12)
    assert torch.equal(ids[0], text.tokenize(short, length=12)[0])
    assert ids[1].tolist() == [text.bos, *text.encode(long)[:10], text.eos]
    assert ids[2].tolist() == [text.bos, *[text.eos] * 11]


def test_it_learns_and_its_file_opens(tmp_path: Path) -> None:
    data = encoders.captioned(8)
    recipe = encoders.recipe("clip", tmp_path, steps=60, ema=0.9)
    reports = [(r, r.loss, r.parts["accuracy"]) for r in train(recipe, dataset=data)]
    assert reports[-1][1] < 0.5 * reports[0][1]
    assert sum(a for _, _, a in reports[-20:]) > 1.4 * sum(a for _, _, a in reports[:20])
    made = reports[-1][0].average()
    assert isinstance(made, DualEncoder)
    weights = open_weights(tmp_path / "model.safetensors")
    read = load_clip(weights)
    assert read.config == made.config and read.config.picture.size == 16
    texts, batch = shortened(600).tokenize(data.captions, length=12), data.batch(range(8))
    for mine, theirs in zip(made(texts, batch.x), read(texts, batch.x), strict=True):
        assert torch.equal(mine, theirs)


def test_what_does_not_fit() -> None:
    recipe, data = encoders.recipe("clip"), encoders.captioned()
    grey = Tensors(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), captions=("a",) * 4)
    flat = Tensors(torch.zeros(4, 3, 16, 24, dtype=torch.uint8), captions=("a",) * 4)
    for bad in (grey, flat, Tensors(data.x)):
        with pytest.raises(ConfigError, match="data: CLIP wants square colour pictures with capt"):
            fitted(recipe, bad)
    odd = Tensors(torch.zeros(4, 3, 20, 20, dtype=torch.uint8), captions=("a",) * 4)
    with pytest.raises(ConfigError, match="model: size: 20 is no multiple of patch = 8"):
        fitted(recipe, odd)
    few = replace(encoders.CLIP, text=replace(encoders.CLIP.text, vocabulary=500))
    with pytest.raises(ConfigError, match=r"model: vocabulary: must be 514\.\.49408, got 500"):
        fitted(replace(recipe, model=few), data)
    assert isinstance(encoders.CLIP.text, CLIPConfig)


def test_an_empty_batch_of_captions_is_tried_for_its_memory() -> None:
    made = task()
    texts, pictures, _ = made.trial(network(made), 3)  # type: ignore[misc]
    assert texts.shape == pictures.shape == (3, 8)
    assert isinstance(made.dataset.batch([0]), Batch)
