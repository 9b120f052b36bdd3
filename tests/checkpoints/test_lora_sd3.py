"""LoRA files of Stable Diffusion 3: what diffusers and peft make of them is what we do."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from rounding import assert_near, assert_parity
from torch import Tensor, nn

from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.rename import Renamed, rules, their_shapes
from minidiffusion.checkpoints.tables import clip, mmdit, t5
from minidiffusion.checkpoints.text_encoders import Encoders
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.layers.lora import adapt, adapters
from minidiffusion.models import (
    CLIPConfig,
    CLIPText,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
)
from minidiffusion.shapes import Cond

CONFIG = MMDiTConfig(
    width=32, depth=3, heads=2, grid=8, context_width=24, pooled_width=20, qk_norm=True,
    second_attention=2,
)  # fmt: skip
WORDS = CLIPConfig(vocabulary=50, positions=8, width=16, layers=2, heads=2, feed_forward=32)
T5 = T5Config(vocabulary=50, width=24, layers=2, heads=2, head_width=8, feed_forward=32)
T = torch.tensor([3.25, 741.0])
TARGETS = ["attention", "feed_forward"]
LAYERS = 3 * 2 + 2 * 2 + 3 + 2
"""Of attention: the picture's, its second, the text's, of which the last block has no way out."""
ATTENTION = r".*(attn2?\.to_(q|k|v|out\.0)|to_add_out|add_[qkv]_proj)"
EVERYTHING = (
    ATTENTION[:-1] + r"|ff\.net\.0\.proj|ff_context\.net\.2|norm1\.linear|norm1_context\.linear"
    r"|norm_out\.linear|proj_out|context_embedder|pos_embed\.proj|linear_1)"
)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, COND = randn(2, 16, 8, 12), Cond(tokens=randn(2, 9, 24, seed=2), pooled=randn(2, 20, seed=3))


@torch.no_grad()
def random(network: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for name, p in network.state_dict().items():
        fan = p[0].numel() if p.ndim > 1 and name != "places" else 4
        p.copy_(torch.randn(p.shape, generator=draw) / fan**0.5 + name.endswith("_norm.weight"))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> MMDiT:
    return random(MMDiT(CONFIG))


@pytest.fixture
def network(base) -> MMDiT:
    return copy.deepcopy(base)


def theirs(network: nn.Module, table) -> dict[str, Tensor]:
    ours = {name: tuple(w.shape) for name, w in network.state_dict().items()}
    made = rules(table, ours)
    return dict(Renamed(made, network.state_dict(), their_shapes(made, ours), "theirs"))


@pytest.fixture
def peer(base):
    """diffusers' transformer with the same weights."""
    from diffusers import SD3Transformer2DModel

    c = CONFIG
    found = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=c.depth,
        num_attention_heads=c.heads, attention_head_dim=c.width // c.heads,
        caption_projection_dim=c.width, joint_attention_dim=c.context_width,
        pooled_projection_dim=c.pooled_width, pos_embed_max_size=c.grid, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(c.second_attention)),
    )  # fmt: skip
    found.load_state_dict(theirs(base, mmdit.table(CONFIG, "diffusers")))
    return found.eval()


@torch.no_grad()
def distance(network: MMDiT, peer) -> float:
    mine = network(X, T, COND)
    other = peer(X, COND.tokens, COND.pooled, T).sample
    return float((mine - other).abs().max())


def assert_same(network: MMDiT, peer, *files) -> None:
    """With the files merged into a copy, by float64 where the network is."""

    def run(network, _, x, t, cond):
        network = copy.deepcopy(network)
        assert not files or lora.apply(files, network) > 10
        return network(x, t, cond)

    def run_theirs(_, peer, x, t, cond):
        return peer(x, cond.tokens, cond.pooled, t).sample

    assert_parity(run, run_theirs, network, peer, X, T, COND)


def pairs(network: nn.Module, table, chosen: str, rank: int = 3) -> dict[str, tuple]:
    """Random (down, up) for the modules of theirs that a pattern chooses."""
    numbers, found = torch.Generator().manual_seed(3), {}
    for key, weight in theirs(network, table).items():
        module = key.removesuffix(".weight")
        if module != key and re.fullmatch(chosen, module):
            down = torch.randn(rank, *weight.shape[1:], generator=numbers)
            ones = [1] * (weight.ndim - 2)
            up = torch.randn(len(weight), rank, *ones, generator=numbers)
            found[module] = (down / weight[0].numel() ** 0.5, 0.3 * up)
    assert len(found) > 7
    return found


def peft(found, prefix: str = "transformer.") -> dict[str, Tensor]:
    both = [{f"{prefix}{m}.lora_{'AB'[i]}.weight": p[i] for m, p in found.items()} for i in (0, 1)]
    return both[0] | both[1]


def kohya(found, prefix: str = "lora_unet_", alpha: float = 2.0) -> dict[str, Tensor]:
    tensors = {}
    for module, (down, up) in found.items():
        name = prefix + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors, metadata=None) -> Path:
    write_safetensors(tensors, path, metadata)
    return path


@pytest.fixture
def attention(base):
    return pairs(base, mmdit.table(CONFIG, "diffusers"), ATTENTION)


# --- what diffusers and peft make of the same file ------------------------------------------------


@pytest.mark.parametrize("chosen", [ATTENTION, EVERYTHING])
def test_as_diffusers_has_it(chosen, base, network, peer, tmp_path) -> None:
    """Of every kind of layer, also of those whose halves diffusers swaps."""
    found = pairs(base, mmdit.table(CONFIG, "diffusers"), chosen)
    path = write(tmp_path / "a.safetensors", peft(found))
    assert_same(network, peer)
    peer.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="transformer")
    assert distance(network, peer) > 0.05
    assert_same(network, peer, (path, 1.0))
    peer.set_adapters(["default_0"], [0.3])
    assert_same(network, peer, (path, 0.3))


@torch.no_grad()
def test_a_file_that_peft_and_diffusers_wrote(base, network, peer, tmp_path) -> None:
    """As diffusers' own training does it: an adapter by peft's config, saved by the pipeline."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    modules = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
               "to_add_out"]  # fmt: skip
    config = LoraConfig(r=2, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    peer.add_adapter(config)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(peer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert distance(network, peer) > 0.05
    assert_same(network, peer, (path, 1.0))
    assert lora.apply([(path, 1.0)], network) == LAYERS


def test_our_file_in_diffusers(network, peer, tmp_path) -> None:
    """Adapters as trained, in peft's names: alpha / rank = 2 travels in the metadata."""
    from diffusers import StableDiffusion3Pipeline

    assert_same(network, peer)
    adapt(network, 2, 4.0, TARGETS)
    for adapter in adapters(network).values():
        nn.init.normal_(adapter.up, std=0.3)
    lora.save(adapters(network), network, tmp_path / "ours.safetensors", {"recipe": "{}"})
    assert distance(network, peer) > 0.05
    state, metadata = StableDiffusion3Pipeline.lora_state_dict(
        str(tmp_path), weight_name="ours.safetensors", return_lora_metadata=True
    )
    names = {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in state}
    assert {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj",
            "transformer_blocks.1.attn2.to_out.0", "transformer_blocks.0.attn.to_add_out",
            "transformer_blocks.2.ff.net.0.proj"} <= names  # fmt: skip
    assert not [name for name in names if name.startswith("transformer_blocks.2.ff_context")]
    peer.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    assert_same(network, peer)


@pytest.mark.parametrize("names", ["peft", "kohya"])
def test_there_and_back(names, base, network, tmp_path) -> None:
    adapt(network, 2, 3.0, TARGETS)
    for adapter in adapters(network).values():
        nn.init.normal_(adapter.up, std=0.1)
    lora.save(adapters(network), network, tmp_path / "a.st", {"base": "1234"}, names)
    again = copy.deepcopy(base)
    assert lora.apply([(tmp_path / "a.st", 1.0)], again) == len(adapters(network))
    for layer, adapter in adapters(network).items():
        want = base.get_submodule(layer).weight + adapter.delta()
        assert_near(again.get_submodule(layer).weight, want, 8)
    found = open_weights(tmp_path / "a.st")
    assert found.metadata["base"] == "1234"
    assert names == "peft" or "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight" in found


# --- other names ----------------------------------------------------------------------------------


def test_every_name_says_the_same(base, attention, tmp_path) -> None:
    """peft with and without a prefix, OneTrainer's, and whole matrices as kohya's scripts train."""
    ways = [
        peft(attention), peft(attention, ""), peft(attention, "base_model.model."),
        kohya(attention, "lora_transformer_", alpha=3.0), kohya(attention, alpha=3.0),
    ]  # fmt: skip
    found = []
    for number, tensors in enumerate(ways):
        network = copy.deepcopy(base)
        assert lora.apply([(write(tmp_path / f"{number}", tensors), 1.0)], network) == LAYERS
        found.append(network.state_dict())
    first = found[0]
    assert not torch.equal(first["blocks.0.text.attention.qkv.weight"],
                           base.blocks[0].text.attention.qkv.weight)  # fmt: skip
    for number, other in enumerate(found):
        assert all(torch.equal(first[name], other[name]) for name in first), number


@pytest.mark.parametrize("way", ["kohya", "diffusion_model"])
def test_whole_matrices(way, base, network, tmp_path) -> None:
    """Stability's modules hold queries, keys and values in one."""
    table = mmdit.table(CONFIG, "ldm")
    found = pairs(base, table, r"joint_blocks.*(attn2?\.(qkv|proj)|mlp\.fc[12])")
    tensors = kohya(found, alpha=3.0) if way == "kohya" else peft(found, "diffusion_model.")
    assert any("x_block" in key and "attn2" in key for key in tensors)
    assert lora.apply([(write(tmp_path / "a", tensors), 0.5)], network) == len(found)
    changed = theirs(network, table)
    for name, weight in theirs(base, table).items():
        module = name.removesuffix(".weight")
        down, up = found.get(module, (torch.zeros(1, 1), torch.zeros(1, 1)))
        want = weight + 0.5 * up @ down if module in found else weight
        assert_near(changed[name], want, 8)


def test_the_text_encoders(base, network, attention, tmp_path) -> None:
    """CLIP-L's, bigG's and T5's, by diffusers' names and by kohya's; T5 may be left out."""
    clip_l, clip_g = random(CLIPText(WORDS)), random(CLIPText(WORDS))
    encoders = Encoders(clip_l, clip_g, random(T5Encoder(T5)))
    tables = [clip.table(WORDS, "transformers")] * 2 + [t5.table(T5, "transformers")]
    chosen = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2|wi_[01]|Attention\.[qkvo])"
    found = [pairs(one, table, chosen) for one, table in zip(encoders, tables, strict=True)]
    before = [theirs(one, table) for one, table in zip(encoders, tables, strict=True)]
    before = [{k: w.clone() for k, w in one.items()} for one in before]
    tensors = peft(attention) | peft(found[0], "text_encoder.") | peft(found[1], "text_encoder_2.")
    path = write(tmp_path / "a", tensors | kohya(found[2], "lora_te3_", alpha=3.0))
    with pytest.warns(UserWarning, match="12 adapters of a text encoder are not used"):
        lora.apply([(path, 1.0)], copy.deepcopy(base), encoders._replace(t5=None))
    for one, old in zip(encoders[:2], before, strict=False):  # changed by the first call
        state = theirs(one, tables[0])
        assert not torch.equal(state["text_model.encoder.layers.0.mlp.fc1.weight"],
                               old["text_model.encoder.layers.0.mlp.fc1.weight"])  # fmt: skip
    fresh = Encoders(random(clip_l), random(clip_g), encoders.t5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.apply([(path, 1.0)], network, fresh)
    for one, table, old, wanted in zip(fresh, tables, before, found, strict=True):
        for name, weight in theirs(one, table).items():
            zero = (torch.zeros(1, 1), torch.zeros(1, 1))
            down, up = wanted.get(name.removesuffix(".weight"), zero)
            assert_near(weight, (old[name] + up @ down).view_as(weight), 8)
    with pytest.warns(UserWarning, match="36 adapters of a text encoder are not used"):
        lora.apply([(path, 1.0)], copy.deepcopy(base))


# --- mistakes -------------------------------------------------------------------------------------


def test_what_fits_nothing_is_named(network, attention, tmp_path) -> None:
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    pair = attention["transformer_blocks.0.attn.to_q"]
    deeper = peft(attention | {"transformer_blocks.9.attn.to_q": pair})
    only_read = peft(attention | {"transformer_blocks.2.attn.to_add_out": pair})
    for tensors, name in ((deeper, "blocks.9.attn.to_q"), (only_read, "blocks.2.attn.to_add_out")):
        with pytest.raises(ValueError, match=f"1 adapters fit nothing in this model: .*{name}"):
            lora.apply([(write(tmp_path / "a", tensors), 1.0)], network)
    wide = {m: (torch.cat([down, down], 1), up) for m, (down, up) in attention.items()}
    with pytest.raises(ValueError, match=r"\[32, 64\], the layer is \[32, 32\]: a LoRA for anoth"):
        lora.apply([(write(tmp_path / "a", peft(wide)), 1.0)], network)
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())


def test_no_two_modules_share_a_flat_name(base) -> None:
    for dialect in mmdit.DIALECTS:
        state = theirs(base, mmdit.table(CONFIG, dialect))
        names = [key for key in state if key.endswith("weight")]
        assert len({lora.flat(name) for name in names}) == len(names)
