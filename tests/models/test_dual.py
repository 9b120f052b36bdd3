"""CLIP whole against transformers' CLIPModel, weight by weight."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rounding import assert_near, assert_parity
from torch import Tensor
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

from minidiffusion.models import CLIPConfig, DualEncoder, DualEncoderConfig
from minidiffusion.models.clip import CLIPPicture, PictureConfig
from minidiffusion.training.contrastive import contrast

VOCABULARY = 99
TINY = DualEncoderConfig(
    CLIPConfig(
        vocabulary=VOCABULARY, positions=16, width=24, layers=3, heads=3, feed_forward=40,
        projection=20,
    ),
    PictureConfig(size=24, patch=8, width=32, layers=2, heads=4, feed_forward=48, projection=20),
)  # fmt: skip


@torch.no_grad()
def theirs(activation: str) -> CLIPModel:
    """With random weights of a size at which every layer counts."""
    torch.manual_seed(0)
    text, picture = TINY.text, TINY.picture
    common = {"hidden_act": activation, "projection_dim": 20, "attention_dropout": 0.0}
    config = TheirConfig(
        text_config={
            "vocab_size": VOCABULARY, "max_position_embeddings": text.positions,
            "hidden_size": text.width, "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "intermediate_size": text.feed_forward,
            "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, **common,
        },
        vision_config={
            "image_size": picture.size, "patch_size": picture.patch, "hidden_size": picture.width,
            "num_hidden_layers": picture.layers, "num_attention_heads": picture.heads,
            "intermediate_size": picture.feed_forward, **common,
        },
        projection_dim=20, logit_scale_init_value=1.7,
    )  # fmt: skip
    network = CLIPModel(config).eval()
    for name, p in network.named_parameters():
        if p.ndim:
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(torch.randn(p.shape) * scale + (p.ndim == 1 and "norm" in name and "w" in name))
    return network


RENAMED = {
    "text_model.embeddings.token_embedding": "text.tokens",
    "text_model.embeddings.position_embedding": "text.places",
    "text_model.final_layer_norm": "text.norm",
    "text_projection": "text.projection",
    "vision_model.embeddings.class_embedding": "picture.whole",
    "vision_model.embeddings.patch_embedding": "picture.enter",
    "vision_model.embeddings.position_embedding": "picture.places",
    "vision_model.pre_layrnorm": "picture.norm1",
    "vision_model.post_layernorm": "picture.norm2",
    "visual_projection": "picture.projection",
    "logit_scale": "log_scale",
    "text_model.encoder.layers": "text.blocks",
    "vision_model.encoder.layers": "picture.blocks",
    ".layer_norm": ".norm",
    "mlp.fc1": "enter",
    "mlp.fc2": "leave",
    "self_attn.q_proj": "attention.q",
    "self_attn.out_proj": "attention.out",
}


def ours(reference: CLIPModel, activation: Any) -> DualEncoder:
    """With the reference's weights; keys and values are one matrix here."""
    found: dict[str, Tensor] = {}
    for name, tensor in reference.state_dict().items():
        if ".v_proj." in name or name.endswith("position_ids"):
            continue
        if ".k_proj." in name:
            values = reference.state_dict()[name.replace(".k_proj.", ".v_proj.")]
            name, tensor = (
                name.replace("self_attn.k_proj", "attention.kv"),
                torch.cat([tensor, values]),
            )
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        found[name] = tensor
    text, picture = (replace(one, activation=activation) for one in (TINY.text, TINY.picture))
    network = DualEncoder(DualEncoderConfig(text, picture)).eval()
    network.load_state_dict(found)
    return network


def given() -> tuple[Tensor, Tensor]:
    """Texts that end at different places, and pictures as both networks take them."""
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY - 2, (5, 16), generator=numbers)
    for row, place in zip(ids, (3, 9, 15, 6, 12), strict=True):
        row[place:] = VOCABULARY - 1
    return ids, torch.randn(5, 3, 24, 24, generator=numbers)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_parity_with_transformers(activation: str) -> None:
    reference = theirs(activation)
    network = ours(reference, activation)
    ids, image = given()

    def run_ours(network: DualEncoder, _: Any, image: Tensor) -> Any:
        texts, pictures, scale = network(ids, image)
        return texts, pictures, scale * texts @ pictures.T, contrast(texts, pictures, scale)

    def run_theirs(_: Any, reference: CLIPModel, image: Tensor) -> Any:
        found = reference(input_ids=ids, pixel_values=image, return_loss=True)
        return found.text_embeds, found.image_embeds, found.logits_per_text, found.loss

    assert_parity(run_ours, run_theirs, network, reference, image)
    texts, pictures, _ = network(ids, image)
    assert texts.std(dim=0).min() > 0.02 and pictures.std(dim=0).min() > 0.02  # not all alike
    assert torch.equal(network.encode_text(ids), texts)
    assert torch.equal(network.encode_picture(image), pictures)


@torch.no_grad()
def test_the_picture_encoder_alone() -> None:
    """Before vectors are made unit: against transformers' vision tower and its projection."""
    reference = theirs("quick_gelu")
    _, image = given()
    wanted = assert_parity(
        lambda network, _, image: network.picture(image),
        lambda _, it, image: it.visual_projection(it.vision_model(image).pooler_output),
        ours(reference, "quick_gelu"), reference, image,
    )  # fmt: skip
    assert wanted.std() > 0.3


def test_fresh_weights() -> None:
    """Radford et al. 2021: the scale begins at 1 / 0.07 and stops at 100 (section 2.5)."""
    torch.manual_seed(0)
    network = DualEncoder(TINY)
    ids, image = given()
    texts, pictures, scale = network(ids, image)
    # exp of a logarithm of size 2.7, each rounded
    assert_near(scale.detach(), 1 / 0.07, 4)
    for vectors in (texts, pictures):
        assert_near(vectors.norm(dim=1), torch.ones(5), 8)
    with torch.no_grad():
        network.log_scale.fill_(math.log(1e4))
    assert float(network(ids, image)[2].detach()) == 100


def test_sizes() -> None:
    for side in (16, 32):
        with pytest.raises(ValueError, match="picture: 24 pixels a side, got"):
            CLIPPicture(TINY.picture)(torch.zeros(1, 3, side, 24))
    with pytest.raises(ValueError, match="size: 25 is no multiple of patch = 8"):
        PictureConfig(size=25)
    with pytest.raises(ValueError, match="projection: text has 20, picture 256; they must"):
        DualEncoderConfig(TINY.text, PictureConfig())
