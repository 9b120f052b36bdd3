"""CLIP's text encoder against transformers, from the files that it writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from faults import assert_faults_are_found
from rounding import assert_parity
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from minidiffusion.checkpoints.text_encoders import load_text_encoder
from minidiffusion.models import CLIPConfig, CLIPText

WORDS = 99
SIZES: dict[str, dict[str, Any]] = {
    "L": {"num_attention_heads": 12, "hidden_size": 96, "hidden_act": "quick_gelu"},
    "H": {"num_attention_heads": 16, "hidden_size": 128, "hidden_act": "gelu"},
    "bigG": {"num_attention_heads": 20, "hidden_size": 160, "hidden_act": "gelu"},
}
"""As many heads as the real ones have, each 8 wide."""


@torch.no_grad()
def made(size: str, projected: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=WORDS, num_hidden_layers=3, intermediate_size=200, projection_dim=24,
        bos_token_id=WORDS - 2, eos_token_id=WORDS - 1, **SIZES[size],
    )  # fmt: skip
    network = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    for name, p in network.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3
        p.copy_(torch.randn(p.shape) * scale + (p.ndim == 1 and name.endswith("weight")))
    return network


def ids() -> torch.Tensor:
    """Ends of text at different places, with other words and more ends behind them."""
    found = torch.randint(0, WORDS - 2, (3, 77), generator=torch.Generator().manual_seed(1))
    for row, place in zip(found, (5, 40, 76), strict=True):
        row[place] = WORDS - 1
    found[0, 9:] = WORDS - 1
    return found


def assert_same(reference: torch.nn.Module, folder: Path, check: Any = assert_parity) -> Any:
    """The last tokens, the pooled text, and the tokens before the last layer, bare and normed."""
    projected = isinstance(reference, CLIPTextModelWithProjection)

    def run_ours(ours: CLIPText, _: Any, bare: CLIPText, normed: CLIPText) -> Any:
        return *ours(ids())[:2], bare(ids()).tokens, normed(ids()).tokens

    def run_theirs(ours: CLIPText, reference: Any, *_: CLIPText) -> Any:
        found = reference(ids(), output_hidden_states=True)
        pooled = found.text_embeds if projected else found.pooler_output
        before = found.hidden_states[-2]
        return found.last_hidden_state, pooled, before, ours.norm(before)

    bare = load_text_encoder(folder, skip=1, final_norm=False)
    normed = load_text_encoder(folder, skip=1)
    return check(run_ours, run_theirs, load_text_encoder(folder), reference, bare, normed)


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_parity_with_transformers(size: str, projected: bool, tmp_path: Path) -> None:
    reference = made(size, projected)
    reference.save_pretrained(tmp_path)
    tokens, pooled, *_ = assert_same(reference, tmp_path)
    assert 0.5 < tokens.std() < 2 and pooled.std() > 0.5
    ours = load_text_encoder(tmp_path)
    assert ours.config.heads == SIZES[size]["num_attention_heads"]
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    skipping = load_text_encoder(tmp_path, skip=1, final_norm=False)
    assert torch.equal(skipping(ids()).pooled, ours(ids()).pooled)


def test_a_fault_of_one_part_in_10000_is_found(tmp_path: Path) -> None:
    reference = made("L", True)
    reference.save_pretrained(tmp_path)
    assert_same(reference, tmp_path, assert_faults_are_found)


@torch.no_grad()
def test_the_activation_is_what_tells_them_apart(tmp_path: Path) -> None:
    made("L", False).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    guessed = load_text_encoder(tmp_path, heads=12)
    assert guessed.config.activation == "quick_gelu" and guessed.config.heads == 12
    other = load_text_encoder(tmp_path, heads=12, activation="gelu")
    assert (guessed(ids()).tokens - other(ids()).tokens).abs().max() > 1e-3
    assert load_text_encoder(tmp_path).config.heads == 1  # 64 wide, for want of a better guess


def test_a_text_longer_than_the_positions_is_refused() -> None:
    encoder = CLIPText(CLIPConfig(vocabulary=9, positions=4, width=8, layers=1, heads=1))
    with pytest.raises(ValueError, match="text: 5 tokens, at most 4"):
        encoder(torch.zeros(1, 5, dtype=torch.int64))
