"""All figures of a set of generated pictures, in one table."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiffusion.evaluation.agreement import Agreement, agreement
from minidiffusion.evaluation.features import Extractor, Judge
from minidiffusion.evaluation.frechet import frechet_distance
from minidiffusion.evaluation.kid import KID, kid
from minidiffusion.evaluation.nearest import nearest_training_ratio
from minidiffusion.evaluation.precision_recall import precision_recall


@dataclass(frozen=True)
class Scores:
    """What was measured; None where no judge or no labels were given."""

    count: int
    extractor: str
    frechet: float
    frechet_floor: float
    kid: KID
    precision: float
    recall: float
    nearest_ratio: float
    agreement: Agreement | None = None
    judge_accuracy: float | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: plain numbers, the intervals under their own names."""
        plain = {key: value for key, value in asdict(self).items() if value is not None}
        plain |= {"kid": self.kid.mean, "kid_error": self.kid.error}
        if self.agreement is not None:
            share, low, high = self.agreement
            plain |= {"agreement": share, "agreement_low": low, "agreement_high": high}
        return plain

    def table(self) -> str:
        rows = [
            ("Frechet distance", f"{self.frechet:.2f} (floor {self.frechet_floor:.2f})"),
            ("KID x 1000", f"{1e3 * self.kid.mean:.2f} +- {1e3 * self.kid.error:.2f}"),
            ("precision", f"{self.precision:.3f}"),
            ("recall", f"{self.recall:.3f}"),
            ("nearest-training ratio", f"{self.nearest_ratio:.2f}"),
            ("measured on", f"{self.count} pictures, features {self.extractor}"),
        ]
        if self.agreement is not None:
            share, low, high = (f"{100 * value:.1f}" for value in self.agreement)
            ceiling = f", judge {100 * self.judge_accuracy:.1f} %" if self.judge_accuracy else ""
            rows.insert(0, ("agreement", f"{share} % ({low} to {high}{ceiling})"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def evaluate(
    samples: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None,
    train: Float[Tensor, "k c h w"],
    held_out: Float[Tensor, "m c h w"],
    judge: Judge | None = None,
    extractor: Extractor | None = None,
    seed: int = 0,
) -> Scores:
    """Judge samples against as many real pictures that the model has not seen.

    The floor is the distance of as many training pictures to the same held-out ones: what a
    perfect model would get.
    """
    n = len(samples)
    if len(held_out) < n or len(train) < n:
        raise ValueError(
            f"{n} samples need {n} held-out and {n} training pictures, "
            f"not {len(held_out)} and {len(train)}"
        )
    if extractor is None:
        if judge is None:
            raise ValueError("give a judge or an extractor: something must look at the pictures")
        extractor = judge.extractor
    # At random: the first half of MNIST's test pictures is easier than the second.
    held_out, stand_in = _some(held_out, n, seed), extractor(_some(train, n, seed))
    features, wanted = extractor(samples), extractor(held_out)
    precision, recall = precision_recall(wanted, features)
    return Scores(
        count=n,
        extractor=extractor.name,
        frechet=frechet_distance(features, wanted),
        frechet_floor=frechet_distance(stand_in, wanted),
        kid=kid(features, wanted),
        precision=precision,
        recall=recall,
        nearest_ratio=nearest_training_ratio(samples, train, held_out),
        agreement=None if judge is None or labels is None else agreement(judge, samples, labels),
        judge_accuracy=None if judge is None else judge.accuracy,
    )


def _some(pictures: Float[Tensor, "k c h w"], n: int, seed: int) -> Float[Tensor, "n c h w"]:
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    return pictures[order[:n].to(pictures.device)]
