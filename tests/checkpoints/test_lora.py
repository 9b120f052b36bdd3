"""LoRA files do to our weights what diffusers and peft make of them, by any of their names."""

import copy
import json
import re
import warnings

import pytest
import torch
from rounding import assert_near, assert_parity
from torch import nn

from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.rename import Renamed, rules, their_shapes
from minidiffusion.checkpoints.tables import clip, unet
from minidiffusion.layers.lora import adapt, adapters
from minidiffusion.models import CLIPConfig, CLIPText, DiT, DiTConfig, UNet, UNetConfig
from minidiffusion.shapes import Cond

CONFIG = UNetConfig(
    in_channels=4, channels=32, multipliers=(1, 2), blocks=1, attention=(1, 0), heads=2,
    context_width=16,
)  # fmt: skip
WORDS = CLIPConfig(vocabulary=50, positions=8, width=16, layers=2, heads=2, feed_forward=32)
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3.0, 700.0])
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


def random(network: nn.Module) -> nn.Module:
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def base() -> UNet:
    torch.manual_seed(0)
    return random(UNet(CONFIG))


@pytest.fixture
def network(base) -> UNet:
    return copy.deepcopy(base)


def theirs(network: nn.Module, table) -> dict[str, torch.Tensor]:
    ours = {name: tuple(w.shape) for name, w in network.state_dict().items()}
    made = rules(table, ours)
    return dict(Renamed(made, network.state_dict(), their_shapes(made, ours), "theirs"))


@pytest.fixture
def peer(base):
    """diffusers' UNet with the same weights."""
    from diffusers import UNet2DConditionModel

    found = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
        cross_attention_dim=16,
    )  # fmt: skip
    found.load_state_dict(theirs(base, unet.table(CONFIG, "diffusers")))
    return found.eval()


@torch.no_grad()
def distance(network: UNet, peer) -> float:
    mine, other = network(X, T, Cond(tokens=TOKENS)), peer(X, T, TOKENS).sample
    return float((mine - other).abs().max())


def assert_same(network: UNet, peer, *files) -> None:
    """With the files merged into a copy, by float64 where the network is."""

    def run(network, _, x, t, tokens):
        network = copy.deepcopy(network)
        assert not files or lora.apply(files, network) > 10
        return network(x, t, Cond(tokens=tokens))

    assert_parity(
        run, lambda _, peer, x, t, tokens: peer(x, t, tokens).sample, network, peer, X, T, TOKENS
    )


ATTENTION = r".*attn\d\.to_(q|k|v|out\.0)"
EVERYTHING = r".*(to_(q|k|v|out\.0)|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv)"


def pairs(network: nn.Module, table, chosen: str, rank: int = 3) -> dict[str, tuple]:
    """Random (down, up) for the modules of theirs that a pattern chooses; kernels as LoCon's."""
    numbers, found = torch.Generator().manual_seed(3), {}
    for key, weight in theirs(network, table).items():
        module = key.removesuffix(".weight")
        if module != key and re.fullmatch(chosen, module):
            down = torch.randn(rank, *weight.shape[1:], generator=numbers)
            ones = [1] * (weight.ndim - 2)
            found[module] = (down, torch.randn(len(weight), rank, *ones, generator=numbers) * 0.1)
    assert len(found) > 7
    return found


def kohya(found, prefix: str = "lora_unet_", alpha: float = 2.0) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, (down, up) in found.items():
        name = prefix + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(found, prefix: str = "unet.", words=("lora_A", "lora_B")) -> dict[str, torch.Tensor]:
    both = [{f"{prefix}{m}.{words[i]}.weight": p[i] for m, p in found.items()} for i in (0, 1)]
    return both[0] | both[1]


def write(path, tensors, metadata=None):
    write_safetensors(tensors, path, metadata)
    return path


@pytest.fixture
def attention(base):
    return pairs(base, unet.table(CONFIG, "diffusers"), ATTENTION)


# --- what diffusers and peft make of the same file ------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dialect", ["kohya", "peft"])
@pytest.mark.parametrize("chosen", [ATTENTION, EVERYTHING])
def test_as_diffusers_has_it(chosen, dialect, base, network, peer, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline

    found = pairs(base, unet.table(CONFIG, "diffusers"), chosen)
    tensors = kohya(found) if dialect == "kohya" else peft(found)
    path = write(tmp_path / "a.safetensors", tensors)
    assert_same(network, peer)
    state, alphas = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name=path.name, unet_config=peer.config
    )
    peer.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    assert distance(network, peer) > 0.01
    assert_same(network, peer, (path, 1.0))
    peer.set_adapters(["default_0"], [0.3])
    assert_same(network, peer, (path, 0.3))


def test_our_file_in_diffusers(network, peer, tmp_path) -> None:
    """Adapters as trained, in peft's names: alpha / rank = 2 travels in the metadata."""
    adapt(network, 2, 4.0, ["attention", "feed_forward", "convolution"])
    for adapter in adapters(network).values():
        nn.init.normal_(adapter.up, std=0.1)
    lora.save(adapters(network), network, tmp_path / "ours.safetensors", {"recipe": "{}"})
    peer.load_lora_adapter(str(tmp_path), weight_name="ours.safetensors", prefix="unet")
    assert_same(network, peer)


@pytest.mark.parametrize("names", ["peft", "kohya"])
def test_there_and_back(names, base, network, tmp_path) -> None:
    adapt(network, 2, 3.0, ["attention", "feed_forward", "convolution"])
    for adapter in adapters(network).values():
        nn.init.normal_(adapter.up, std=0.1)
    lora.save(adapters(network), network, tmp_path / "a.st", {"base": "1234"}, names)
    again = copy.deepcopy(base)
    assert lora.apply([(tmp_path / "a.st", 1.0)], again) == len(adapters(network))
    for layer, adapter in adapters(network).items():
        want = base.get_submodule(layer).weight + adapter.delta()
        assert_near(again.get_submodule(layer).weight, want, 8)
    assert lora.open_weights(tmp_path / "a.st").metadata["base"] == "1234"


# --- other names ----------------------------------------------------------------------------------


def test_every_name_says_the_same(base, attention, tmp_path) -> None:
    """LDM's modules, bare peft, peft's own folder, the two older dialects of diffusers."""
    ldm = dict(zip(
        theirs(base, unet.table(CONFIG, "diffusers")), theirs(base, unet.table(CONFIG, "ldm")),
        strict=True,
    ))  # fmt: skip
    of_ldm = {ldm[f"{m}.weight"].removesuffix(".weight"): p for m, p in attention.items()}
    assert all(name.startswith(("input", "middle", "output")) for name in of_ldm)
    old = {
        re.sub(r"\.to_(\w+)(\.0)?\.lora\.", r".processor.to_\1_lora.", key): tensor
        for key, tensor in peft(attention, "unet.", ("lora.down", "lora.up")).items()
    }
    assert any("processor.to_out_lora.down" in key for key in old)
    ways = [
        kohya(attention, alpha=3.0), kohya(of_ldm, alpha=3.0), peft(attention, ""),
        peft(attention, "base_model.model."), peft(attention, "base_model.model.unet."), old,
        peft(attention, "unet.", ("lora.down", "lora.up")),
        peft(attention, "unet.", ("lora_A.default", "lora_B.default")),
    ]  # fmt: skip
    found = []
    for number, tensors in enumerate(ways):
        network = copy.deepcopy(base)
        assert lora.apply([(write(tmp_path / f"{number}", tensors), 1.0)], network) == 24
        found.append(network.state_dict())
    first = found[0]
    assert not torch.equal(first["up.2.attention.blocks.0.self_attention.kv.weight"],
                           base.up[2].attention.blocks[0].self_attention.kv.weight)  # fmt: skip
    for number, other in enumerate(found):
        assert all(torch.equal(first[name], other[name]) for name in first), number


def test_several_at_once(base, network, attention, tmp_path) -> None:
    """w1 d1 + w2 d2, rounded once: in bf16 as well, and in either order."""
    second = {module: (2 * down, up.flip(0)) for module, (down, up) in attention.items()}
    one, two = write(tmp_path / "1", peft(attention)), write(tmp_path / "2", kohya(second))
    lora.apply([(one, 0.5), (two, -0.25)], network.bfloat16())
    name = "down.0.attention.blocks.0.cross_attention.kv"
    change = torch.cat([
        0.5 * up @ down - 0.25 * 2 / 3 * up.flip(0) @ (2 * down)
        for down, up in (attention[f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{x}"]
                         for x in "kv")
    ])  # fmt: skip
    want = (base.get_submodule(name).weight.bfloat16().float() + change).bfloat16()
    assert torch.equal(network.get_submodule(name).weight, want)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "text_encoder."])
def test_the_text_encoder(prefix, base, network, attention, tmp_path) -> None:
    torch.manual_seed(0)
    encoder = random(CLIPText(WORDS))
    table = clip.table(WORDS, "transformers")
    found = pairs(encoder, table, r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)")
    of_text = peft(found, prefix) if prefix.endswith(".") else kohya(found, prefix, alpha=3.0)
    path = write(tmp_path / "a", peft(attention) | of_text)
    with pytest.warns(UserWarning, match=f"{path}: 12 adapters of a text encoder are not used"):
        lora.apply([(path, 1.0)], network)
    before = {name: weight.clone() for name, weight in theirs(encoder, table).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lora.apply([(path, 1.0)], copy.deepcopy(base), encoder) == 24 + 10
    for name, weight in theirs(encoder, table).items():
        down, up = found.get(name.removesuffix(".weight"), (torch.zeros(1, 1), torch.zeros(1, 1)))
        assert_near(weight, (before[name] + up @ down).view_as(weight), 8)


def test_alpha_of_peft(base, attention, tmp_path) -> None:
    """In diffusers' metadata, in peft's own file beside it, or with exceptions by name."""
    layer = "middle.0.attention.blocks.0.self_attention.q"
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = attention[module]

    def check(scale, path) -> None:
        network = copy.deepcopy(base)
        lora.apply([(path, 1.0)], network)
        want = base.get_submodule(layer).weight + scale * (up @ down)
        assert_near(network.get_submodule(layer).weight, want, 8)

    said = {"unet.lora_alpha": 6, "unet.r": 3, "text_encoder.lora_alpha": 99}
    path = write(tmp_path / "a", peft(attention), {lora.METADATA: json.dumps(said)})
    check(2, path)
    said["unet.alpha_pattern"] = {module: 9}
    path = write(tmp_path / "b", peft(attention), {lora.METADATA: json.dumps(said)})
    check(3, path)
    (tmp_path / lora.CONFIG).write_text(json.dumps({"lora_alpha": 12, "r": 3}))
    check(1, write(tmp_path / "c", peft(attention)))
    path = write(tmp_path / "d", peft(attention, "base_model.model."))
    check(4, path)


# --- mistakes -------------------------------------------------------------------------------------


def refused(tensors, network, tmp_path, metadata=None) -> str:
    """One line, and not a bit of the network changed."""
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    path = write(tmp_path / "bad", tensors, metadata)
    with pytest.raises(ValueError) as error:
        lora.apply([(path, 1.0)], network)
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (".hada_w1_a", "LoHa"), (".lokr_w1", "LoKr"), (".dora_scale", "DoRA"),
        (".lora_magnitude_vector.weight", "DoRA"), (".oft_blocks", "OFT"), (".diff", "whole diff"),
        (".lora_mid.weight", "LoCon in Tucker's form"), (".diff_b", "whole diff"),
    ],
)  # fmt: skip
def test_relatives_are_refused_by_name(ending, kind, network, attention, tmp_path) -> None:
    tensors = kohya(attention)
    key = next(iter(tensors)).split(".")[0] + ending
    assert f"this is {kind}" in refused(tensors | {key: torch.ones(2)}, network, tmp_path)


@pytest.mark.parametrize("key", ["use_dora", "use_rslora"])
def test_relatives_by_their_settings(key, network, attention, tmp_path) -> None:
    said = {lora.METADATA: json.dumps({f"unet.{key}": True})}
    assert "only LoRA and LoCon" in refused(peft(attention), network, tmp_path, said)


def test_a_model_is_no_lora(network, base, tmp_path) -> None:
    of_ldm = theirs(base, unet.table(CONFIG, "ldm"))
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in of_ldm.items()}
    assert "not a LoRA: none of its" in refused(whole, network, tmp_path)


def test_what_fits_nothing_is_named(network, attention, tmp_path) -> None:
    tensors = kohya(attention)
    ghost = {"lora_unet_down_blocks_7_to_q": next(iter(attention.values()))}
    said = refused(tensors | kohya(ghost, ""), network, tmp_path)
    assert "1 adapters fit nothing in this model: lora_unet_down_blocks_7_to_q.lora_up" in said
    said = refused(tensors | {"emb_params": torch.ones(2, 2)}, network, tmp_path)
    assert "1 unknown keys: emb_params" in said
    only_text = kohya({"text_model.encoder.layers.0.mlp.fc1": next(iter(attention.values()))}, "")
    both = refused(kohya(ghost, "") | only_text, network, tmp_path)
    assert "2 adapters fit nothing" in both


def test_another_model_s(network, attention, tmp_path) -> None:
    wide = {m: (torch.cat([down, down], 1), up) for m, (down, up) in attention.items()}
    assert "[32, 64], the layer is [32, 32]: a LoRA for another model" in refused(
        peft(wide), network, tmp_path
    )


def test_broken_pairs(network, attention, tmp_path) -> None:
    tensors = peft(attention)
    key = next(key for key in tensors if "lora_B" in key)
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    assert "has no up beside it" in refused(rest, network, tmp_path)
    assert "do not fit together" in refused(rest | {key: torch.ones(32, 4)}, network, tmp_path)
    assert "do not fit together" in refused(rest | {key: torch.ones(())}, network, tmp_path)
    whole = torch.ones(32, 3, dtype=torch.int32)
    assert "expected numbers" in refused(rest | {key: whole}, network, tmp_path)
    alpha = next(key for key in kohya(attention) if key.endswith("alpha"))
    for value in (torch.tensor(torch.nan), torch.ones(2)):
        assert "expected a number" in refused(kohya(attention) | {alpha: value}, network, tmp_path)
    for text in ("[", "[]", '{"lora_alpha": "much"}'):
        assert refused(tensors, network, tmp_path, {lora.METADATA: text})


def test_only_a_unet(tmp_path) -> None:
    with pytest.raises(ValueError, match="this is a DiT"):
        lora.apply([], DiT(DiTConfig(width=16, depth=1, heads=2)))


def test_the_words_of_the_command_line(tmp_path) -> None:
    assert lora.parse("a/b.st") == (lora.Path("a/b.st"), 1.0)
    assert lora.parse("a/b.st:0.8") == (lora.Path("a/b.st"), 0.8)
    assert lora.parse("a:b.st:-1") == (lora.Path("a:b.st"), -1.0)
    (tmp_path / "x:2").touch()
    assert lora.parse(f"{tmp_path}/x:2") == (tmp_path / "x:2", 1.0)
    for wrong in ("a.st:", "a.st:much", "a.st:nan", ":0.5", "a.st:inf", "a.st:1e300"):
        with pytest.raises(ValueError, match="expected FILE or FILE:WEIGHT"):
            lora.parse(wrong)


def test_no_two_modules_share_a_flat_name(base) -> None:
    for dialect in unet.DIALECTS:
        names = [key for key in theirs(base, unet.table(CONFIG, dialect)) if key.endswith("weight")]
        assert len({lora.flat(name) for name in names}) == len(names)
