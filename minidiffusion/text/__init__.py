"""Words become tensors: tokenizers, windows, weights, and the encoders that they feed."""

from minidiffusion.text.bpe import BPE
from minidiffusion.text.chunks import chunks
from minidiffusion.text.conditioning import Text
from minidiffusion.text.hashed import HashedText
from minidiffusion.text.triple import TripleText
from minidiffusion.text.unigram import Unigram, t5_tokenizer
from minidiffusion.text.weighting import emphasised, weighted

__all__ = [
    "BPE",
    "HashedText",
    "Text",
    "TripleText",
    "Unigram",
    "chunks",
    "emphasised",
    "t5_tokenizer",
    "weighted",
]
