"""All figures of pictures drawn from captions: of those trained on, and of two kinds that were not.

A model that has learned what words mean draws a known thing in a style in which it has not seen
it, and has an idea of things that it has not seen at all; one that has learned pictures by heart
is good at its training captions alone. So each split has figures of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minidiffusion.data.dataset import as_floats
from minidiffusion.data.emoji import STYLES, Emoji, Pair, Split
from minidiffusion.evaluation.agreement import Agreement
from minidiffusion.evaluation.colours import coloured, named
from minidiffusion.evaluation.features import Extractor
from minidiffusion.evaluation.frechet import frechet_distance
from minidiffusion.evaluation.nearest import nearest_training_ratio
from minidiffusion.evaluation.retrieval import WAYS, Cosines, retrieval, share
from minidiffusion.shapes import Image

SPLITS: tuple[Split, ...] = tuple(one for one in get_args(Split) if one != "all")
TITLES = {
    "train": "training captions", "combination": "unseen combinations", "concept": "unseen concepts"
}  # fmt: skip


class Asked(NamedTuple):
    """What is to be drawn: these rows of a split's pairs."""

    split: Split
    pairs: list[Pair]
    rows: list[int]

    @property
    def captions(self) -> list[str]:
        return [self.pairs[row].captions()[0] for row in self.rows]


def asked(split: Split, count: int, seed: int = 0) -> Asked:
    """So many rows of a split at random, or all of a smaller one, in their order."""
    pairs = Emoji(split=split).pairs()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return Asked(split, pairs, sorted(order[:count].tolist()))


def naming(split: Split) -> Asked:
    """All rows of a split whose captions name a colour: too few to be met by chance."""
    pairs = Emoji(split=split).pairs()
    return Asked(split, pairs, [i for i, pair in enumerate(pairs) if named(pair.captions()[0])])


def real(split: Split) -> Float[Tensor, "n 3 h w"]:
    """The pictures of a split's pairs."""
    return as_floats(Emoji(split=split, captions="short").open().x)


@dataclass(frozen=True)
class Shown:
    """What is seen in pictures, as shares.

    retrieval: the own caption fits best among 100. concept, group: those of the caption that fits
    best among all of the pack are those asked for. style: the own caption fits better than those
    of its concept in the other styles. clip: mean cosine with the own caption, in the eyes of a
    CLIP; None where none was given. colour: of `naming` captions, the named one is dominant.
    """

    retrieval: Agreement
    concept: Agreement
    style: Agreement
    group: Agreement
    clip: float | None = None
    colour: Agreement | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: plain numbers, the intervals under their own names."""
        plain: dict[str, object] = {}
        for key, value in vars(self).items():
            if isinstance(value, Agreement):
                plain |= {key: value.share, f"{key}_low": value.low, f"{key}_high": value.high}
            elif value is not None:
                plain[key] = value
        return plain


@dataclass(frozen=True)
class Drawn:
    """Of one split: what is seen in the drawn pictures, and in the real ones of the same captions.

    frechet: of the features, between both; None for fewer pictures than features. floor: as many
    training pictures of other captions in place of the drawn ones. As the real pictures are those
    of the same captions, a faithful model comes below it. nearest_ratio: `nearest_training_ratio`,
    whose measure is the real pictures of the same captions; of training captions, which have none
    but copies, all that are not trained, and a model that has learned comes below 1, too.
    """

    split: Split
    count: int
    shown: Shown
    real: Shown
    nearest_ratio: float
    frechet: float | None = None
    frechet_floor: float | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: plain numbers, those of real pictures under names that begin with real."""
        apart = {"split", "shown", "real"}
        plain = {key: value for key, value in vars(self).items() if key not in apart}
        theirs = {f"real_{key}": value for key, value in self.real.as_dict().items()}
        plain |= self.shown.as_dict() | theirs
        return {key: value for key, value in plain.items() if value is not None}


@dataclass(frozen=True)
class Prompted:
    """What was measured. features: the name of their space; concepts: how many were offered."""

    features: str
    concepts: int
    splits: tuple[Drawn, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON: the splits' figures under their names."""
        return {"features": self.features} | {one.split: one.as_dict() for one in self.splits}

    def table(self) -> str:
        """Each share with its interval, and behind the stroke that of real pictures."""
        names = {"retrieval": f"found among {WAYS}", "concept": f"concept of {self.concepts}",
                 "style": "style", "group": "group", "colour": "colour"}  # fmt: skip
        rows = [["", *(TITLES[one.split] for one in self.splits)]]
        for key, name in names.items():
            rows.append([name, *(_against(one, key) for one in self.splits)])
        rows.append(["Frechet distance", *(_distance(one) for one in self.splits)])
        if any(one.shown.clip is not None for one in self.splits):
            rows.append(["CLIP score", *(_clip(one) for one in self.splits)])
        rows.append(["nearest-training ratio", *(f"{o.nearest_ratio:.2f}" for o in self.splits)])
        rows.append(["pictures", *(str(one.count) for one in self.splits)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        note = f"% (95 % interval) / real pictures; Frechet distance (floor), {self.features}"
        return "\n".join([*lines, note])


def _against(one: Drawn, key: str) -> str:
    ours, theirs = getattr(one.shown, key), getattr(one.real, key)
    if ours is None or theirs is None:
        return "-"
    share, low, high = (f"{100 * value:.1f}" for value in ours)
    return f"{share} ({low} to {high}) / {100 * theirs.share:.1f}"


def _distance(one: Drawn) -> str:
    if one.frechet is None or one.frechet_floor is None:
        return "-"
    return f"{one.frechet:.2f} ({one.frechet_floor:.2f})"


def _clip(one: Drawn) -> str:
    return "-" if one.shown.clip is None else f"{one.shown.clip:.3f} / {one.real.clip:.3f}"


class Eyes(NamedTuple):
    """Who looks. judge: of captions; extractor: of distances; clip: another judge, for its score.

    Each takes pictures where they lie.
    """

    judge: Cosines
    extractor: Extractor
    clip: Cosines | None = None


Samples = Sequence[tuple[Asked, Float[Tensor, "_ 3 h w"]]]
"""Captions of some splits, and the pictures that were drawn for them."""


def evaluate(samples: Samples, eyes: Eyes, seed: int = 0, hues: Samples = ()) -> Prompted:
    """Judge pictures by their captions. hues: those of the same splits' `naming` captions, if any.

    Raises ValueError for a number of pictures that is not that of the captions.
    """
    colours = {wanted.split: (wanted, pictures) for wanted, pictures in hues}
    everything = Emoji(split="all").pairs()
    train, unseen = real("train"), torch.cat([real("combination"), real("concept")])
    found = []
    for wanted, pictures in samples:
        if len(pictures) != len(wanted.rows):
            raise ValueError(f"{len(wanted.rows)} captions, but {len(pictures)} pictures")
        pictures = pictures.cpu().clamp(-1, 1)
        truth = real(wanted.split)[wanted.rows]
        ours, theirs = (shown(x, wanted, eyes, everything, seed) for x in (pictures, truth))
        if wanted.split in colours:
            ours, theirs = _coloured(ours, theirs, *colours[wanted.split])
        ratio = nearest_training_ratio(
            pictures, train, unseen if wanted.split == "train" else truth
        )
        distances = _frechet(pictures, truth, _others(wanted, train, seed), eyes.extractor)
        found.append(Drawn(wanted.split, len(pictures), ours, theirs, ratio, *distances))
    return Prompted(eyes.extractor.name, len({one.concept for one in everything}), tuple(found))


def shown(
    pictures: Image, wanted: Asked, eyes: Eyes, everything: Sequence[Pair], seed: int = 0
) -> Shown:
    """What is seen in one split's pictures; everything: the pairs whose captions are offered."""
    cosines = eyes.judge(pictures, [pair.captions()[0] for pair in everything])
    places = [i for i, pair in enumerate(everything) if pair.split == wanted.split]
    best = [everything[i] for i in cosines.argmax(dim=1).tolist()]
    true = [wanted.pairs[row] for row in wanted.rows]

    def same(key: str) -> Agreement:
        both = zip(best, true, strict=True)
        return share(torch.tensor([getattr(a, key) == getattr(b, key) for a, b in both]))

    return Shown(
        retrieval=retrieval(cosines[:, places], wanted.pairs, wanted.rows, seed=seed),
        concept=same("concept"),
        style=share(_styled(pictures, true, eyes.judge)),
        group=same("group"),
        clip=None if eyes.clip is None else clip_score(eyes.clip, pictures, wanted.captions),
    )


def _coloured(ours: Shown, theirs: Shown, wanted: Asked, pictures: Image) -> tuple[Shown, Shown]:
    """With the colours of drawn and of real pictures."""
    truth = real(wanted.split)[wanted.rows]
    first, second = (share(coloured(x.cpu(), wanted.captions)) for x in (pictures, truth))
    return replace(ours, colour=first), replace(theirs, colour=second)


def _styled(pictures: Image, pairs: Sequence[Pair], judge: Cosines) -> Bool[Tensor, " b"]:
    """Whether of a concept's captions in all styles the own one fits best."""
    count, offered = len(pairs), [pair._replace(style=s) for pair in pairs for s in STYLES]
    cosines = judge(pictures, [pair.captions()[0] for pair in offered])
    own = cosines.view(count, count, len(STYLES))[range(count), range(count)]
    wanted = torch.tensor([STYLES.index(pair.style) for pair in pairs])
    return own.argmax(dim=1).cpu() == wanted


def clip_score(clip: Cosines, pictures: Image, captions: Sequence[str], batch: int = 32) -> float:
    """The mean cosine of each picture with its own caption."""
    own = [
        clip(part, captions[i * batch : i * batch + batch]).diagonal()
        for i, part in enumerate(pictures.split(batch))
    ]
    return float(torch.cat(own).mean())


def _others(wanted: Asked, train: Float[Tensor, "n c h w"], seed: int) -> Image:
    """As many training pictures, of other captions than those that were asked for."""
    mine = set(wanted.rows) if wanted.split == "train" else set()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + 1))
    return train[[row for row in order.tolist() if row not in mine][: len(wanted.rows)]]


def _frechet(
    pictures: Image, truth: Image, others: Image, extractor: Extractor
) -> tuple[float | None, float | None]:
    if min(len(pictures), len(others)) <= extractor.dim:
        return None, None
    wanted = extractor(truth)
    ours, floor = (frechet_distance(extractor(x), wanted) for x in (pictures, others))
    return ours, floor
