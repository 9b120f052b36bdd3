"""Stable Diffusion 3.5 medium at full size beside diffusers: the same random weights, in turns.

    python benchmarks/stable_diffusion_3.py --parts step t5
    python tests/official.py medium.safetensors --family sd3.5-medium --size full --alone --half
    minidiffusion convert medium.safetensors --to diffusers --out medium
    python benchmarks/stable_diffusion_3.py --parts load --model medium.safetensors --folder medium

step: the MMDiT at 512 px with 333 tokens of text, one picture. Ours in bf16, in int8 and with its
ladder frozen; diffusers in bf16. t5: T5-XXL on 256 tokens beside transformers. The
others' modules hold views of our weights, so that 24 GB are enough. fp32: the step in float32.
load: the denoiser of a file in fp16, cast to bf16, in fresh processes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import GEMM, in_turns, machine, notes, product, ratio, show
from stable_diffusion import LOADING, loads
from torch import Tensor, nn

from minidiffusion.checkpoints.foreign import mmdit_config
from minidiffusion.checkpoints.official import shapes_of, table_rules
from minidiffusion.checkpoints.rename import Renamed, their_shapes
from minidiffusion.layers.quantized import quantize_
from minidiffusion.models import MMDiT, MMDiTConfig, T5Config, T5Encoder, hollow
from minidiffusion.shapes import Cond

MEDIUM = MMDiTConfig(grid=384, qk_norm=True, second_attention=13)
FLOP = {"step": 2.44e12, "t5": 2.40e12}
"""Of products, counted on the meta device."""
OURS = "import torch, minidiffusion; from minidiffusion.checkpoints import parts"
THEIRS = "import torch; from diffusers import SD3Transformer2DModel as Net"
LOADS = {
    "minidiffusion": (OURS, "kept = parts.load_denoiser({model!r}, dtype=torch.bfloat16)"),
    "minidiffusion, int8": (
        OURS,
        "kept = parts.load_parts({model!r}, optional=True, dtype=torch.bfloat16, quantize='int8')",
    ),
    "diffusers, single file": (
        THEIRS,
        "kept = Net.from_single_file({model!r}, config={folder!r}, subfolder='transformer', "
        "local_files_only=True, torch_dtype=torch.bfloat16)",
    ),
    "diffusers, folder": (
        THEIRS,
        "kept = Net.from_pretrained({folder!r} + '/transformer', torch_dtype=torch.bfloat16)",
    ),
}  # fmt: skip
Row = list[str]


def drawn(make: Callable[[Any], nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    """A network with small random weights in this dtype, filled one by one."""
    network = hollow(make, config)
    torch.manual_seed(0)
    weights = {
        name: torch.empty(x.shape, dtype=dtype).normal_(0, x.shape[-1] ** -0.5)
        if x.ndim > 1 else torch.ones(x.shape, dtype=dtype) if name.endswith("norm.weight")
        else torch.zeros(x.shape, dtype=dtype)
        for name, x in network.state_dict().items()
    }  # fmt: skip
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def shared(network: nn.Module, dialect: str, peer: nn.Module) -> nn.Module:
    """The other's module, on the meta device, with views of our weights."""
    made = table_rules(network.config, dialect, shapes_of(network), "")
    theirs = Renamed(made, network.state_dict(), their_shapes(made, shapes_of(network)), "theirs")
    weights = {name: theirs[name] for name in theirs}
    peer.load_state_dict(weights, assign=True, strict=False)
    left = [name for name, p in peer.named_parameters() if p.is_meta]
    assert not left, left[:5]
    return peer.eval()


def row(name: str, works: dict[str, Callable[[], Tensor]], first: str, flop: float,
        rounds: int) -> list[Row]:  # fmt: skip
    """Each work: seconds, how often it fits into the first one's, how far its output is from it."""
    found = {key: work().float() for key, work in works.items()}
    seconds = in_turns({**works, "product": product(torch.bfloat16)}, rounds)
    floor = flop / (2 * GEMM**3 / median(seconds["product"]))
    rows = []
    for key in works:
        error = ((found[key] - found[first]).norm() / found[first].norm()).item()
        rows.append([f"{name}, {key}", f"{median(seconds[key]):.2f}",
                     str(ratio(seconds[first], seconds[key])), f"{floor:.2f}",
                     f"{100 * error:.2g} %"])  # fmt: skip
    return rows


def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Ours, diffusers' with the same weights, and inputs: x, t, words, the pooled prompt."""
    from diffusers import SD3Transformer2DModel

    ours = drawn(MMDiT, MEDIUM, dtype)
    with torch.device("meta"):
        sizes = mmdit_config(MEDIUM, side=128)
        made = SD3Transformer2DModel(**{k: v for k, v in sizes.items() if k[0] != "_"})
    peer = shared(ours, "diffusers", made)
    peer.pos_embed.pos_embed = ours.places
    x, words = torch.randn(1, 16, 64, 64, dtype=dtype), torch.randn(1, 333, 4096, dtype=dtype)
    return ours, peer, [x, torch.tensor([500.0]), words, torch.randn(1, 2048, dtype=dtype)]


def exact(rounds: int) -> list[Row]:
    ours, peer, (x, t, words, pooled) = pair(torch.float32)
    works = {
        "diffusers fp32": lambda: peer(x, words, pooled, t, return_dict=False)[0],
        "ours fp32": lambda: ours(x, t, Cond(tokens=words, pooled=pooled)),
    }
    theirs, mine = (work() for work in works.values())
    notes.print(f"largest difference {(theirs - mine).abs().max():.1e} of {theirs.abs().max():.1f}")
    return row("MMDiT step", works, "diffusers fp32", FLOP["step"], rounds)


def step(rounds: int) -> list[Row]:
    ours, peer, (x, t, words, pooled) = pair(torch.bfloat16)
    cond = Cond(tokens=words, pooled=pooled)
    works = {
        "diffusers bf16": lambda: peer(x, words, pooled, t, return_dict=False)[0],
        "ours bf16": lambda: ours(x, t, cond),
    }
    rows = row("MMDiT step", dict(works), "diffusers bf16", FLOP["step"], rounds)
    notes.print("beside diffusers: done")
    weights = ours.state_dict()
    fast, frozen = drawn_again(weights), drawn_again(weights)
    quantize_(fast, "int8-dynamic")
    frozen.freeze(t, pooled, weights)
    works = {
        "ours bf16": lambda: ours(x, t, cond),
        "ours int8": lambda: fast(x, t, cond),
        "ours bf16, frozen": lambda: frozen(x, t, cond),
    }
    return rows + row("MMDiT step", works, "ours bf16", FLOP["step"], rounds)


def drawn_again(weights: dict[str, Tensor]) -> MMDiT:
    network = hollow(MMDiT, MEDIUM)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def t5(rounds: int) -> list[Row]:
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel

    ours = drawn(T5Encoder, T5Config(), torch.bfloat16)
    with torch.device("meta"):
        made = T5EncoderModel(TheirConfig(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        ))  # fmt: skip
    made.shared = made.encoder.embed_tokens
    peer = shared(ours, "transformers", made)
    ids = torch.randint(2, 32000, (1, 256))
    works = {
        "transformers bf16": lambda: peer(ids).last_hidden_state, "ours bf16": lambda: ours(ids)
    }  # fmt: skip
    return row("T5-XXL, 256 tokens", works, "transformers bf16", FLOP["t5"], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", default=["step", "t5"], choices=("step", "t5", "fp32", "load")
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--model", type=Path, help="for load: a single file of full size")
    parser.add_argument("--folder", type=Path, help="for load: the same as a folder of diffusers'")
    given = parser.parse_args()
    if "load" in given.parts and None in (given.model, given.folder):
        parser.error("load: --model and --folder, see above")
    header = ["work", "s", "times faster than the first", "floor in bf16, s", "distance from it"]
    with torch.no_grad():
        for name, work in (("step", step), ("t5", t5), ("fp32", exact)):
            if name in given.parts:
                show("Stable Diffusion 3.5 medium, 512 px", header, work(given.rounds))
    if "load" in given.parts:
        found = loads(LOADS, given.model, given.folder, given.rounds)
        show("Loading 4.5 GB in fp16", LOADING, list(found))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
