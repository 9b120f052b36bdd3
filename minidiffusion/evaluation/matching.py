"""The shipped judge of emoji: which of many captions does a picture show?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minidiffusion.checkpoints.reader import read_metadata, read_safetensors
from minidiffusion.evaluation.features import JUDGES, Extractor
from minidiffusion.evaluation.retrieval import Cosines
from minidiffusion.models import DualEncoder
from minidiffusion.models.matcher import PADDING, Matcher, MatcherConfig
from minidiffusion.shapes import Image
from minidiffusion.text import BPE
from minidiffusion.text.bpe import shortened
from minidiffusion.typed import build

SHIPPED = JUDGES / "emoji.safetensors"
BATCH = 250


@dataclass(frozen=True, eq=False)
class EmojiJudge:
    """Asked for pictures (b, 3, 64, 64) in [-1, 1] and captions, it gives all their cosines.

    Words that it has not met are passed over; their order says nothing to it.
    """

    network: Matcher
    extractor: Extractor
    tokenizer: BPE = field(default_factory=BPE)

    @torch.no_grad()
    def __call__(self, pictures: Image, captions: Sequence[str]) -> Float[Tensor, "b k"]:
        parts = pictures.split(self.extractor.batch)
        looks = torch.cat([self.network.pictures(part) for part in parts])
        ids = bags(self.tokenizer, captions).to(looks.device)
        return looks @ self.network.captions(ids).T


def bags(tokenizer: BPE, captions: Sequence[str]) -> Int[Tensor, "b n"]:
    """The ids of captions, neither begun nor ended, filled up with PADDING."""
    rows = [torch.tensor(tokenizer.encode(one), dtype=torch.int64) for one in captions]
    return pad_sequence(rows, batch_first=True, padding_value=PADDING)


def emoji_judge(device: torch.device | str = "cpu") -> EmojiJudge:
    """Trained on all pictures of the pack, so it knows what a model must not have seen."""
    config = build(MatcherConfig, json.loads(read_metadata(SHIPPED)["config"]), str(SHIPPED))
    network = Matcher(config)
    network.load_state_dict(read_safetensors(SHIPPED))  # stored in half, used in single precision
    return judging(network.to(device))


def judging(network: Matcher) -> EmojiJudge:
    network = network.eval().requires_grad_(False)
    return EmojiJudge(network, Extractor("emoji judge", network.config.features, network.features))


def clip_cosines(clip: DualEncoder) -> Cosines:
    """What a CLIP of our own says of pictures and captions, on the device where it lies."""
    config, device = clip.config.text, next(clip.parameters()).device
    tokenizer = shortened(config.vocabulary)

    @torch.no_grad()
    def cosines(pictures: Image, captions: Sequence[str]) -> Float[Tensor, "b k"]:
        ids = tokenizer.tokenize(captions, length=config.positions, warn=False).to(device)
        looks = torch.cat([clip.encode_picture(x.to(device)) for x in pictures.split(BATCH)])
        return looks @ torch.cat([clip.encode_text(part) for part in ids.split(BATCH)]).T

    return cosines
