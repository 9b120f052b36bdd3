"""Random models in the layouts of the official files, for tests, examples and checks by hand.

    python tests/official.py OUT --family sd1 --size tiny --dialect single

OUT is a file (single, ckpt) or a folder (diffusers, fp16, sharded, parts). The numbers are drawn
from the tensor's name alone, so all dialects of a family hold the same network.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from minidiffusion.checkpoints.convert import (
    Content,
    Contents,
    diffusers_folder,
    single_file,
    theirs,
    written,
)
from minidiffusion.checkpoints.families import Trained
from minidiffusion.checkpoints.official import Config, blueprint, shapes_of
from minidiffusion.checkpoints.reader import read_safetensors, write_durably, write_safetensors
from minidiffusion.diffusion import RectifiedFlow, VariancePreserving
from minidiffusion.models import (
    AutoencoderConfig,
    CLIPConfig,
    MMDiTConfig,
    T5Config,
    UNetConfig,
)

DIALECTS = ("single", "ckpt", "diffusers", "fp16", "sharded", "parts")
FULL = {
    "sd1": UNetConfig(
        in_channels=4, out_channels=4, channels=320, multipliers=(1, 2, 4, 4),
        attention=(1, 1, 1, 0), heads=8, context_width=768,
    ),
    "sd2": UNetConfig(
        in_channels=4, out_channels=4, channels=320, multipliers=(1, 2, 4, 4),
        attention=(1, 1, 1, 0), head_width=64, context_width=1024, linear_projections=True,
    ),
}  # fmt: skip
TINY = {
    "sd1": replace(
        FULL["sd1"], channels=32, multipliers=(1, 2), attention=(1, 0), blocks=1, context_width=64
    ),
    "sd2": replace(
        FULL["sd2"], channels=64, multipliers=(1, 2), attention=(1, 0), blocks=1, context_width=64
    ),
}
TEXT = {
    ("sd1", "full"): CLIPConfig(),
    ("sd2", "full"): CLIPConfig(
        width=1024, layers=23, heads=16, feed_forward=4096, activation="gelu"
    ),
    ("sd1", "tiny"): CLIPConfig(width=64, layers=2, heads=1, feed_forward=128),
    ("sd2", "tiny"): CLIPConfig(
        width=64, layers=2, heads=1, feed_forward=128, activation="gelu"
    ),
}  # fmt: skip
VAE = {
    "full": AutoencoderConfig(),
    "tiny": AutoencoderConfig(channels=32, multipliers=(1, 1, 2, 2), blocks=1),
}
FLOW = {
    ("sd3", "full"): MMDiTConfig(),
    ("sd3.5-medium", "full"): MMDiTConfig(grid=384, qk_norm=True, second_attention=13),
    ("sd3.5-large", "full"): MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True),
}
SMALL = MMDiTConfig(
    width=128, depth=2, heads=2, grid=16, context_width=96, pooled_width=96
)  # fmt: skip
FLOW |= {
    ("sd3", "tiny"): SMALL,
    ("sd3.5-medium", "tiny"): replace(SMALL, qk_norm=True, second_attention=1),
    ("sd3.5-large", "tiny"): replace(SMALL, qk_norm=True, depth=3),
}
CLIP = CLIPConfig(skip=1, final_norm=False)
CLIP_G = replace(
    CLIP, width=1280, layers=32, heads=20, feed_forward=5120, activation="gelu", projection=1280
)
ENCODERS = {
    "full": {"text encoder": CLIP, "text encoder 2": CLIP_G, "T5": T5Config()},
    "tiny": {
        "text encoder": replace(CLIP, width=32, layers=2, heads=1, feed_forward=64),
        "text encoder 2": replace(
            CLIP_G, width=64, layers=2, heads=1, feed_forward=128, projection=64
        ),
        "T5": T5Config(width=96, layers=2, heads=2, head_width=16, feed_forward=128),
    },
}
EXTRA = {"": 0, "inpaint": 5, "depth": 1}
FAMILIES = (
    "sd1", "sd2", "sd1-inpaint", "sd2-inpaint", "sd2-depth", "sd3", "sd3.5-medium", "sd3.5-large"
)  # fmt: skip


class Random(Mapping[str, Tensor]):
    """Tensors that are drawn when they are asked for, each from its own name and the seed."""

    def __init__(self, config: Config, seed: int = 0, v: bool = False) -> None:
        self.shapes, self.seed, self.v = shapes_of(blueprint(config)), seed, v

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        draw = torch.Generator().manual_seed(crc32(f"{self.seed} {name}".encode()))
        x = torch.randn(shape, generator=draw)
        if len(shape) > 1:
            return x / math.sqrt(math.prod(shape[1:])) if "places" not in name else 0.02 * x
        if name.endswith("weight"):
            return 1 + 0.1 * x
        # By the spread of this bias the files of Stable Diffusion 2 are told apart.
        return (0.2 if self.v and name.endswith(".norm1.bias") else 0.02) * x

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def model(family: str, size: str = "tiny", prediction: str | None = None) -> Contents:
    """The parts of a model: config and random tensors under our names."""
    if family.startswith("sd3"):
        vae = replace(VAE[size], latent_channels=16, scale=1.5305, shift=0.0609, quant=False)
        configs = {"denoiser": FLOW[family, size], "autoencoder": vae, **ENCODERS[size]}
        drawn = enumerate(configs.items())
        return {kind: Content(config, Random(config, seed=n)) for n, (kind, config) in drawn}
    name, _, extra = family.partition("-")
    unet = (FULL if size == "full" else TINY)[name]
    unet = replace(unet, in_channels=4 + EXTRA[extra])
    v = (prediction or usual(family)) == "v"
    text, vae = TEXT[name, size], VAE[size]
    return {
        "denoiser": Content(unet, Random(unet, v=v)),
        "autoencoder": Content(vae, Random(vae, seed=1)),
        "text encoder": Content(text, Random(text, seed=2)),
    }


def usual(family: str) -> str:
    return "v" if family == "sd2" else "eps"


def spare(width: int, layers: int) -> dict[str, Tensor]:
    """What OpenCLIP's files hold and Stable Diffusion 2 does not use."""
    last = CLIPConfig(width=width, layers=layers + 1, heads=1, feed_forward=2 * width)
    one = theirs(Content(last, Random(last, seed=3)), "openclip", "cond_stage_model.model.")
    place = f"cond_stage_model.model.transformer.resblocks.{layers}."
    return {
        **{name: one[name] for name in one if name.startswith(place)},
        "cond_stage_model.model.text_projection": torch.randn(width, width),
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
    }


def make(
    out: Path, family: str = "sd1", size: str = "tiny", dialect: str = "single",
    prediction: str | None = None, alone: bool = False, half: bool = False,
) -> Path:  # fmt: skip
    """Write a model; the path is returned. alone: without text encoders, as Stability's 3.5."""
    dtype = torch.float16 if half or dialect == "fp16" else None
    contents = model(family, size, prediction)
    if alone:
        contents = {kind: contents[kind] for kind in ("denoiser", "autoencoder")}
    target = prediction or usual(family)
    side = {"tiny": 8, "full": 96 if target == "v" else 64}[size]
    trained = Trained(family, VariancePreserving(), target, (4, side, side))
    if family.startswith("sd3"):
        trained = Trained(family, RectifiedFlow(3.0), "flow", (16, 32, 32))
    out.parent.mkdir(parents=True, exist_ok=True)
    if dialect == "single":
        single_file(contents, family, out, dtype)
    elif dialect == "ckpt":
        ckpt(contents, family, out)
    elif dialect == "parts":
        parts(contents, family, out, dtype)
    else:
        variant = "fp16" if dialect == "fp16" else ""
        diffusers_folder(contents, trained, out, dtype, tokenizers(contents, family), variant)
        if dialect == "sharded":
            for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
                shard(out / f"{name}.safetensors")
    return out


def ckpt(contents: Contents, family: str, out: Path) -> None:
    """A .ckpt as training left it: constants, averages, what is never used, under state_dict."""
    plain = out.with_name(f"{out.name}.plain")
    single_file(contents, family, plain)
    tensors = read_safetensors(plain)
    place = "model.diffusion_model."
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(place).replace(".", ""): 0.5 * tensor
        for name, tensor in tensors.items()
        if name.startswith(place)
    }
    junk = {name: torch.ones(1000) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod")}
    junk |= {"posterior_variance": torch.ones(1000), "log_one_minus_alphas_cumprod": torch.ones(9)}
    junk |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    if family.startswith("sd1"):
        places = torch.arange(77)[None]
        junk["cond_stage_model.transformer.text_model.embeddings.position_ids"] = places
    else:
        text = contents["text encoder"].config
        junk |= spare(text.width, text.layers)
    state = {**tensors, **averages, **junk}
    torch.save({"epoch": 3, "global_step": 470000, "state_dict": state}, out)
    plain.unlink()


def parts(contents: Contents, family: str, out: Path, dtype: torch.dtype | None) -> None:
    """A folder of stand-alone files, each in the dialect that people pass around."""
    out.mkdir(parents=True)
    if family.startswith("sd3"):
        encoders = {"text encoder": "clip_l", "text encoder 2": "clip_g", "T5": "t5xxl_fp16"}
        for kind, file in encoders.items():
            made = written([theirs(contents[kind], "transformers")], dtype)
            write_durably(out / f"{file}.safetensors", made)
        return
    text = "transformers-bare" if family.startswith("sd1") else "openclip"
    names = {"denoiser": ("unet", "diffusers"), "autoencoder": ("vae", "ldm"),
             "text encoder": ("clip", text)}  # fmt: skip
    for kind, one in contents.items():
        file, dialect = names[kind]
        write_durably(out / f"{file}.safetensors", written([theirs(one, dialect)], dtype))


def shard(file: Path, count: int = 3) -> None:
    """A file of weights as a sharded set with its index."""
    tensors = read_safetensors(file)
    table = {}
    for number in range(count):
        name = f"{file.stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        some = dict(sorted(tensors.items())[number::count])
        write_safetensors(some, file.parent / name, {"format": "pt"})
        table |= dict.fromkeys(some, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": table}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


def tokenizers(contents: Contents, family: str) -> dict[str, dict[str, bytes]]:
    from minidiffusion.cli import convert

    return convert.tokenizers(contents, family)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--family", choices=FAMILIES, default="sd1")
    ask.add_argument("--size", choices=("tiny", "full"), default="tiny")
    ask.add_argument("--dialect", choices=DIALECTS, default="single")
    ask.add_argument("--prediction", choices=("eps", "v"))
    ask.add_argument("--alone", action="store_true", help="no text encoders in the file")
    ask.add_argument("--half", action="store_true", help="fp16 (single and parts)")
    given = ask.parse_args()
    print(make(**vars(given)))


if __name__ == "__main__":
    main()
