"""`minidiffusion convert`: official weights from one layout into another."""

import argparse
import json
import lzma
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from minidiffusion.checkpoints.convert import (
    INDEX,
    Contents,
    contents_of,
    diffusers_folder,
    single_file,
)
from minidiffusion.checkpoints.families import Trained, trained_for
from minidiffusion.checkpoints.foreign import t5_tokenizer_config, tokenizer_configs
from minidiffusion.checkpoints.official import FOLDERS, Source, pick, sources
from minidiffusion.cli.main import fail
from minidiffusion.diffusion import VariancePreserving
from minidiffusion.files import sweep
from minidiffusion.models import CLIPConfig, MMDiTConfig, UNetConfig
from minidiffusion.text.bpe import clip_table
from minidiffusion.text.unigram import t5_json
from minidiffusion.text.words import ASSETS, EOS
from minidiffusion.typed import plain

EXAMPLES = """examples:
  minidiffusion convert v1-5-pruned.ckpt --to single-file --out sd15.safetensors --dtype fp16
  minidiffusion convert sd15.safetensors --to diffusers --out sd15/
  minidiffusion convert sd15/ --to single-file --out again.safetensors
"""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WRITTEN = {INDEX, *FOLDERS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"}
"""What a folder of ours holds; --force removes nothing else."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("file", metavar="FILE", help="an official file or folder, in any layout")
    verb.add_argument("--to", choices=("diffusers", "single-file"), required=True)
    verb.add_argument("--out", required=True, help="the new folder, or the new .safetensors file")
    verb.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as they are)")
    verb.add_argument("--ema", action="store_true", help="take a .ckpt's averaged weights")
    verb.add_argument("--prediction", choices=("eps", "v"), help="where the file cannot say")
    verb.add_argument("--force", action="store_true", help="replace what is in the way")


def run(arguments: argparse.Namespace) -> None:
    path, out = Path(arguments.file), Path(arguments.out)
    found = sources(path)
    check_free(out, found, folder=arguments.to == "diffusers", force=arguments.force)
    began, dtype = time.monotonic(), DTYPES.get(arguments.dtype)
    contents = contents_of(found, path, ema=arguments.ema)
    trained = purpose(found, contents, path, arguments.prediction)
    if arguments.to == "single-file":
        single_file(contents, trained.family, out, dtype, fresh=not arguments.force)
        for lost in unsaid(contents, trained, out):
            warnings.warn(f"{out}: a single file cannot say {lost}", stacklevel=1)
    else:
        words = tokenizers(contents, trained.family)
        diffusers_folder(contents, trained, out, dtype, words, fresh=not arguments.force)
    print(f"{out}  ({', '.join(contents)}; {time.monotonic() - began:.1f} s)")


def purpose(found: list[Source], contents: Contents, path: Path, prediction: str | None) -> Trained:
    """What the denoiser was trained for; of a text encoder alone, whose family it is."""
    if "denoiser" in contents:
        config = contents["denoiser"].config
        assert isinstance(config, UNetConfig | MMDiTConfig)
        return trained_for(pick(found, "denoiser", path), config, prediction)
    text = contents["text encoder"].config if "text encoder" in contents else None
    first = isinstance(text, CLIPConfig) and text.activation == "quick_gelu"
    return Trained("sd1" if first else "sd2", VariancePreserving(), "eps", (4, 64, 64))


def unsaid(contents: Contents, trained: Trained, out: Path) -> Iterator[str]:
    """What will be taken for something else when the file is read again."""
    found = sources(out)
    there = contents_of(found, out)
    for kind, one in contents.items():
        again = plain(there[kind].config)
        for name, value in plain(one.config).items():
            if again[name] != value:
                yield f"that the {kind} has {name} {value}: it will be taken for {again[name]}"
    if "denoiser" in contents:
        config = contents["denoiser"].config
        assert isinstance(config, UNetConfig | MMDiTConfig)
        read = trained_for(pick(found, "denoiser", out), config)
        if read.target != trained.target:
            yield f"what the denoiser predicts: load it with --prediction {trained.target}"
        if read.path != trained.path:
            yield "the denoiser's own noise schedule: it will be taken for the usual one"


def check_free(out: Path, found: list[Source], *, folder: bool, force: bool) -> None:
    """Nothing is lost that --force does not name, and never what is being read."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        fail(f"{out.parent}: no folder that can be written to")
    sweep(out.parent)
    if any(out.resolve() in (file.resolve(), *file.resolve().parents)
           for source in found for file in source.weights.files):  # fmt: skip
        fail(f"{out}: holds what is to be converted; --out must name another place")
    if not out.exists():
        return
    if not force:
        fail(f"{out}: exists already; --force replaces it, --out names another place")
    strange = [e.name for e in out.iterdir() if e.name not in WRITTEN] if out.is_dir() else []
    if out.is_dir() != folder or strange:
        what = "model folders" if folder else "files"
        holds = f": it holds {strange[0]}" if strange else ""
        fail(f"{out}: --force replaces {what} and nothing else{holds}")


def tokenizers(contents: Contents, family: str) -> dict[str, dict[str, bytes]]:
    """The folders of tokenizers that transformers reads, for the encoders that there are."""
    found = {}
    if "text encoder" in contents:
        found["tokenizer"] = tokenizer_files(family)
    if "text encoder 2" in contents:
        found["tokenizer_2"] = tokenizer_files("sd2")
    if "T5" in contents:
        facts = json.dumps(t5_tokenizer_config(), indent=2).encode()
        found["tokenizer_3"] = {"tokenizer.json": t5_json(), "tokenizer_config.json": facts}
    return found


def tokenizer_files(family: str) -> dict[str, bytes]:
    """The files that transformers' CLIPTokenizer reads, from the merges that ship with us."""
    vocabulary = {token: number for number, token in enumerate(clip_table().tokens)}
    merges = lzma.decompress((ASSETS / "merges.txt.xz").read_bytes())
    pad = EOS if family.startswith(("sd1", "sd3")) else next(iter(vocabulary))
    small = {name: json.dumps(values, indent=2) for name, values in tokenizer_configs(pad).items()}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": b"#version: 0.2\n" + merges,
        **{name: text.encode() for name, text in small.items()},
    }
