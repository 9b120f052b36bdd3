"""Which files a model is made of, and what needs no hub; tests/cli/test_download.py has one."""

import hashlib
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from minidiffusion.checkpoints import hub, releases
from minidiffusion.checkpoints.hub import Remote, checksum, draft, make_room
from minidiffusion.checkpoints.releases import MODELS, choose, find

DIFFUSERS = [
    ".gitattributes", "README.md", "model_index.json", "feature_extractor/config.json",
    "safety_checker/model.safetensors", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/merges.txt",
    "tokenizer/vocab.json", "unet/config.json", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]  # fmt: skip
PARTS = {
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
}  # fmt: skip


def test_the_table_is_complete_and_plausible() -> None:
    assert set(MODELS) == {
        "sd1.4", "sd1.5", "sd1.5-inpainting", "sd2.1", "sd2.1-base", "sd2-inpainting", "sd2-depth",
        "sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo",
    }  # fmt: skip
    for name, row in MODELS.items():
        assert row.files and row.licence and 4 < row.size < 30, name
        assert row.gated == name.startswith("sd3")
        assert (row.note == releases.GONE) == name.startswith("sd2")
        assert not row.sha256 or (len(row.files) == 1 and len(bytes.fromhex(row.sha256)) == 32)
        assert find(f"{row.repository}:{row.files[0]}").files == row.files[:1]


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"sd1\.6: unknown \(did you mean sd1\.5\?\); allowed: sd"):
        find("sd1.6")
    for name in ("", "a", "a/b/c", "/b", "a/", "../b", "a b/c", "a/b\n", "ä/b", "x" * 97 + "/b"):
        with pytest.raises(ValueError, match="allowed: .* or OWNER/NAME"):
            find(name)
    for file in ("/etc/passwd", "../x", "a/../../x", "a\0", "a\\b", "a\nb"):
        with pytest.raises(ValueError, match="not the name of a file"):
            find(f"a/b:{file}")
    assert find("a-b/c.d").files == () and find("a/b:c/d.safetensors").files == ("c/d.safetensors",)


def test_which_files_of_a_repository() -> None:
    assert choose("a/b", ["README.md", "x.ckpt", "x.safetensors", "vae/v.safetensors"]) == (
        "x.safetensors",
    )
    assert choose("a/b", ["x.ckpt", "y.bin"]) == ("x.ckpt",)
    with pytest.raises(ValueError, match="a/b: which file\\? a/b:FILE, FILE one of x.safet.*, y"):
        choose("a/b", ["x.safetensors", "y.safetensors"])
    assert set(choose("a/b", DIFFUSERS)) == PARTS
    for files in ([], ["README.md"], DIFFUSERS[:2], ["model_index.json", "unet/config.json"]):
        with pytest.raises(ValueError, match="a/b: holds no model that could be loaded"):
            choose("a/b", files)
    with pytest.raises(ValueError, match="not the name of a file"):
        choose("a/b", ["model_index.json", "unet/config.json", "unet/../../x.safetensors"])


def test_checksums_are_those_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"hello\n")
    assert checksum(path, "0" * 64) == hashlib.sha256(b"hello\n").hexdigest()
    done = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True)
    known = done.stdout.strip() or "ce013625030ba8dba906f756967f9e9ca394464a"
    assert checksum(path, "0" * 40) == known
    assert checksum(path, "opaque") == "opaque"


def test_room_is_asked_of_the_disk_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    asked = []

    def disk(path: Path) -> object:
        asked.append(path)
        return usage(10**9 + hub.SPARE)

    monkeypatch.setattr(hub.shutil, "disk_usage", disk)
    folder = tmp_path / "new" / "folder"
    remote = Remote("", 10**9, "e", folder / "a.safetensors")
    make_room(folder, [remote])
    assert asked == [tmp_path]
    with pytest.raises(OSError, match=r"folder: 1\.50 GB are to be fetched, 1\.07 GB are free"):
        make_room(folder, [remote, remote._replace(size=5 * 10**8, etag="f")])
    folder.mkdir(parents=True)
    larger = remote._replace(size=10**9 + 3)
    with pytest.raises(OSError, match="are free"):
        make_room(folder, [larger])
    draft(larger).write_bytes(b"abc")  # what is here already needs no room
    make_room(folder, [larger])


def test_drafts_of_two_contents_are_two_files(tmp_path: Path) -> None:
    one = Remote("", 1, "a" * 64, tmp_path / "m.ckpt")
    assert draft(one) != draft(one._replace(etag="b" * 64)) and draft(one).parent == tmp_path
    assert draft(one._replace(etag="../../x")).parent == tmp_path
