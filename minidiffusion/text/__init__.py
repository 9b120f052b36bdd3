"""Words become tensors: byte-pair encoding, windows, weights, and the encoder that they feed."""

from minidiffusion.text.bpe import BPE
from minidiffusion.text.chunks import chunks
from minidiffusion.text.conditioning import Text
from minidiffusion.text.weighting import emphasised, weighted

__all__ = ["BPE", "Text", "chunks", "emphasised", "weighted"]
