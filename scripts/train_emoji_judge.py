"""Train the shipped judge of emoji, on all of them: those that a model must not have seen, too.

    OMP_NUM_THREADS=1 python scripts/train_emoji_judge.py

The weights go to minidiffusion/assets/judges, with the share of real pictures of every split whose
caption is found among 100, measured on the weights as they are stored: of the pictures as they
are, of softer ones, and of shifted and discoloured ones. About 20 minutes on one core.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.data.dataset import as_floats
from minidiffusion.data.emoji import SIDE, Emoji, Pair, Split
from minidiffusion.evaluation.fidelity import resized
from minidiffusion.evaluation.matching import SHIPPED, EmojiJudge, bags, judging
from minidiffusion.evaluation.retrieval import retrieval
from minidiffusion.models.matcher import PADDING, Matcher, MatcherConfig
from minidiffusion.shapes import Image
from minidiffusion.text import BPE
from minidiffusion.training.optimizers import Muon, Schedule, set_rate

SPLITS: tuple[Split, ...] = ("train", "combination", "concept")
SIDED = {"left", "right", "clockwise", "counterclockwise", "facing"}
MIRRORED = {"smileys & emotion", "people & body", "animals & nature", "food & drink"}
"""Groups whose pictures mean the same in a mirror, where their names are of no side."""


@dataclass(frozen=True)
class Recipe:
    """toned: the share of the skin tones' pictures that an epoch takes; of the others, all."""

    epochs: int = 24
    rate: float = 2e-3
    decay: float = 0.05
    batch: int = 128
    toned: float = 0.05
    seed: int = 7


def mirrored(pair: Pair) -> bool:
    return pair.group in MIRRORED and not SIDED & set(pair.label.replace("-", " ").split())


def augmented(x: Image, flips: Tensor, draw: torch.Generator) -> Image:
    """What a drawn picture may get wrong without showing another thing.

    Mirrored where it may be, turned, stretched and shifted on white, softened, discoloured, noisy.
    """

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=draw)

    x = torch.where((flips & (between(0, 1) < 0.5))[:, None, None, None], x.flip(3), x)
    angle, size = between(-0.14, 0.14), between(0.88, 1.15)
    wide, shift = between(0.93, 1.07), between(-0.14, 0.14, 2)
    rows = (size * wide * angle.cos(), -size * angle.sin(), shift[:, 0],
            size * angle.sin(), size / wide * angle.cos(), shift[:, 1])  # fmt: skip
    field = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), False)
    x = F.grid_sample(x - 1, field, align_corners=False) + 1
    side = int(torch.randint(11, 30, (1,), generator=draw))
    soft = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    soft = F.interpolate(soft, tuple(x.shape[2:]), mode="bilinear")
    x = torch.where(between(0, 1, 1, 1, 1) < 0.5, soft, x)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + between(0.8, 1.2, 1, 1, 1) * (x - grey)
    x = x * between(0.9, 1.1, 3, 1, 1) + between(-0.08, 0.08, 3, 1, 1)
    noise = torch.randn(x.shape, generator=draw)
    return (x + between(0, 0.1, 1, 1, 1) * noise).clamp(-1, 1)


def caption(pair: Pair, draw: torch.Generator) -> str:
    """The short one, or with some of its tags."""
    short = pair.captions()[0]
    if torch.rand(1, generator=draw) < 0.6:
        return short
    kept = torch.rand(len(pair.tags), generator=draw) < 0.5
    return ", ".join([short, *(tag for tag, keep in zip(pair.tags, kept, strict=True) if keep)])


def vocabulary(pairs: Sequence[Pair]) -> Tensor:
    """Every token of every caption."""
    ids = bags(BPE(), [one for pair in pairs for one in pair.captions()])
    return ids.unique()[1:] if (ids == PADDING).any() else ids.unique()


def trained(pixels: Tensor, pairs: Sequence[Pair], recipe: Recipe) -> Matcher:
    torch.manual_seed(recipe.seed)
    draw, tokenizer, known = torch.Generator().manual_seed(recipe.seed), BPE(), vocabulary(pairs)
    network = Matcher(MatcherConfig(words=len(known)))
    network.vocabulary.copy_(known)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = torch.tensor([not pair.tone for pair in pairs]).nonzero()[:, 0]
    toned = torch.tensor([pair.tone for pair in pairs]).nonzero()[:, 0]
    some = round(recipe.toned * len(toned))
    steps = (len(plain) + some) // recipe.batch
    optimizers = Muon(recipe.rate, weight_decay=recipe.decay).build(network)
    schedule, total = Schedule(warmup=20, decay="linear"), recipe.epochs * steps
    small = F.avg_pool2d(as_floats(pixels), SIDE // network.config.side)  # as it would itself
    flips, began = torch.tensor([mirrored(pair) for pair in pairs]), time.monotonic()
    step = 0
    for epoch in range(recipe.epochs):
        picked = torch.randperm(len(toned), generator=draw)[:some]
        order = torch.cat([plain, toned[picked]])
        order = order[torch.randperm(len(order), generator=draw)]
        for rows in order[: steps * recipe.batch].view(steps, recipe.batch):
            x = augmented(small[rows], flips[rows], draw)
            ids = bags(tokenizer, [caption(pairs[row], draw) for row in rows.tolist()])
            with torch.autocast("cpu", torch.bfloat16):
                cosines = network(x.to(memory_format=torch.channels_last), ids).float()
            logits = cosines * network.temperature.clamp(max=4.6).exp()
            wanted = torch.arange(len(rows))
            loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
            network.zero_grad()
            loss.backward()
            set_rate(optimizers, recipe.rate * schedule.factor(step, total))
            for optimizer in optimizers:
                optimizer.step()
            step += 1
        spent = time.monotonic() - began
        print(f"epoch {epoch + 1} of {recipe.epochs}: {loss.item():.3f}, {spent:.0f} s", flush=True)
    return network.eval()


def shaken(x: Image) -> Image:
    draw = torch.Generator().manual_seed(99)
    flips = torch.zeros(128, dtype=torch.bool)
    x = F.avg_pool2d(x, 2)
    return torch.cat([augmented(part, flips[: len(part)], draw) for part in x.split(128)])


WAYS_TO_SEE: dict[str, Callable[[Image], Image]] = {
    "real": lambda x: x, "at 32 pixels": lambda x: resized(x, (32, 32)), "shaken": shaken,
}  # fmt: skip


def figures(judge: EmojiJudge) -> dict[str, str]:
    """Of every split: the share of pictures whose caption is found among 100, and its interval."""
    found = {}
    for split in SPLITS:
        data, pairs = Emoji(split=split, captions="short").open(), Emoji(split=split).pairs()
        x = data.batch(range(len(data))).x
        for name, change in WAYS_TO_SEE.items():
            cosines = judge(change(x), [pair.captions()[0] for pair in pairs])
            share, low, high = retrieval(cosines, pairs, range(len(pairs)))
            found[f"{split}, {name}"] = f"{share:.4f} ({low:.4f} to {high:.4f})"
            print(f"{split}, {name}: {found[f'{split}, {name}']}", flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)  # sums in one order: the same weights on every machine of a kind
    whole, recipe = Emoji(split="all", tones=True, captions="short"), Recipe()
    data, pairs = whole.open(), whole.pairs()
    network = trained(data.x, pairs, recipe)
    stored = {
        key: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in network.state_dict().items()
    }
    write_safetensors(stored, SHIPPED.with_suffix(".partial"), {})
    network.load_state_dict(stored)
    metadata = {
        "data": f"emoji: all {len(pairs)} pictures, skin tones included",
        "features": "emoji judge",
        "config": json.dumps(asdict(network.config)),
        "retrieval": json.dumps(figures(judging(network))),
        "recipe": json.dumps(asdict(recipe)),
        "license": "MIT",
    }
    write_safetensors(stored, SHIPPED, metadata)
    SHIPPED.with_suffix(".partial").unlink()
    print(f"{SHIPPED}: {SHIPPED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
