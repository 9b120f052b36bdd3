"""One door for all containers: what a file is, sets of shards, folders, and what is no model."""

import io
import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from minidiffusion.checkpoints import weights as room
from minidiffusion.checkpoints.weights import Weights, open_weights


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b.c": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2, dtype=torch.uint8),
        "last": torch.full((1, 2, 3), 0.5, dtype=torch.float16),
    }


def as_safetensors(content: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(safetensors.torch.save(content, {"format": "pt"}))


def as_zip(content: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"state_dict": content, "epoch": 3}, path)


def as_stream(content: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = {"safetensors": as_safetensors, "zip": as_zip, "stream": as_stream}
NAMES = ("model.safetensors", "model.ckpt", "model.bin", "model", "model.json", "model.gguf")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_content_decides_and_never_the_name(tmp_path: Path, kind: str, name: str) -> None:
    wanted = tensors()
    WRITERS[kind](wanted, tmp_path / name)
    found = open_weights(tmp_path / name)
    assert set(found.names) == set(found) == set(wanted) and len(found) == 5
    assert "a" in found and "b" not in found and found.get("b") is None
    assert found.shapes == {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    assert found.dtypes == {key: tensor.dtype for key, tensor in wanted.items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert found["a"].is_contiguous() and found["last"].is_contiguous()
    assert found.files == (tmp_path / name,)
    with pytest.raises(KeyError):
        found["b"]


def test_metadata(tmp_path: Path) -> None:
    for kind, wanted in (
        ("safetensors", {"format": "pt"}),
        ("zip", {"epoch": "3"}),
        ("stream", {}),
    ):
        WRITERS[kind](tensors(), tmp_path / kind)
        assert open_weights(str(tmp_path / kind)).metadata == wanted


def test_tensors_are_mapped_and_what_is_written_into_them_reaches_no_file(tmp_path: Path) -> None:
    as_safetensors({"a": torch.zeros(9), "b": torch.ones(9)}, tmp_path / "a")
    before, found = (tmp_path / "a").read_bytes(), open_weights(tmp_path / "a")
    assert found["b"].data_ptr() - found["a"].data_ptr() == 36
    found["a"].fill_(7)
    assert (tmp_path / "a").read_bytes() == before


def test_a_header_that_leaves_tensors_unaligned(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    for blanks in range(4):
        header = text + b" " * blanks
        (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + data)
        found = open_weights(tmp_path / "f")["a"]
        assert found.tolist() == [1.5, -2.0] and found.data_ptr() % 4 == 0


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x0280)
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + b"\7")
    assert open_weights(tmp_path / "f")["a"].item() == 7
    assert open_weights(tmp_path).files == (tmp_path / "f",)


def test_hash_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    as_safetensors({"a": torch.randn(2**18, 2)}, path)  # more than one bite
    wanted = sha256(path.read_bytes()).hexdigest()[:10]
    found = open_weights(path)
    assert found.hash() == wanted
    with monkeypatch.context() as patch:
        patch.setattr(room, "sha256", None)  # read once, and remembered
        assert open_weights(path).hash() == wanted
    as_safetensors({"a": torch.randn(2**18, 1)}, path)
    assert open_weights(path).hash() == sha256(path.read_bytes()).hexdigest()[:10] != wanted


# Sharded sets

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, index: str = "model.safetensors.index.json", **changed: object) -> Path:
    """A set of two shards, as the libraries write it; its index with some entries changed."""
    whole = tensors()
    parts = [{key: whole[key] for key in ("a", "b.c", "empty")}]
    parts.append({key: whole[key] for key in ("scalar", "last")})
    for part, name in zip(parts, SHARDS, strict=True):
        as_safetensors(part, folder / name)
    table = {key: name for part, name in zip(parts, SHARDS, strict=True) for key in part}
    content = {"metadata": {"total_size": 43, "odd": [1]}, "weight_map": table, **changed}
    (folder / index).write_text(json.dumps(content))
    return folder / index


def weight_map(path: Path) -> dict[str, str]:
    return json.loads(path.read_text())["weight_map"]  # type: ignore[no-any-return]


def test_a_sharded_set_by_its_index_or_its_folder(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for path in (index, tmp_path):
        found = open_weights(path)
        assert set(found) == set(tensors()) and found.metadata == {"total_size": "43"}
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors().items())
        assert found.files == tuple(tmp_path / name for name in SHARDS)
    whole = b"".join((tmp_path / name).read_bytes() for name in SHARDS)
    assert found.hash() == sha256(whole).hexdigest()[:10]


def test_shards_may_be_of_torch(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for name in SHARDS:
        part = {key: tensor.clone() for key, tensor in open_weights(tmp_path / name).items()}
        as_zip(part, tmp_path / name)
    assert torch.equal(open_weights(index)["a"], tensors()["a"])


def extra_shard(index: Path) -> None:
    as_safetensors({"x": torch.ones(1)}, index.parent / "model-00003-of-00002.safetensors")


def moved(**names: str) -> Callable[[Path], None]:
    """An index in which tensors stand under other shards."""

    def change(index: Path) -> None:
        sharded(index.parent, weight_map=weight_map(index) | names)

    return change


def rewritten(content: bytes) -> Callable[[Path], object]:
    return lambda index: index.write_bytes(content)


def both(index: Path) -> None:
    as_safetensors(
        {"a": torch.ones(1), **{k: tensors()[k] for k in ("scalar", "last")}},
        index.parent / SHARDS[1],
    )


def unlisted(index: Path) -> None:
    table = weight_map(index)
    del table["b.c"]
    sharded(index.parent, weight_map=table)


SETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda i: (i.parent / SHARDS[1]).unlink(),
        f"the shard {SHARDS[1]} is missing",
    ),
    "shard not listed": (extra_shard, "does not list the shard model-00003-of-00002.safetensors"),
    "tensor not listed": (unlisted, f"does not list the tensor 'b.c' of {SHARDS[0]}"),
    "tensor twice": (both, f"tensor 'a' is in {SHARDS[1]} and another shard"),
    "tensor missing": (moved(new=SHARDS[0]), f"tensor 'new' is not in {SHARDS[0]}"),
    "wrong shard": (moved(a=SHARDS[1]), f"tensor 'a' is not in {SHARDS[1]}"),
    "parent": (moved(a=f"../{SHARDS[0]}"), f"the shard '../{SHARDS[0]}' is not a file beside"),
    "absolute": (moved(a="/etc/passwd"), "the shard '/etc/passwd' is not a file beside the index"),
    "dots": (moved(a=".."), "the shard '..' is not a file|is missing|a folder, not a file"),
    "backslash": (moved(a="..\\x"), "is not a file beside the index"),
    "nul": (moved(a="x\0"), "is not a file beside the index"),
    "blank": (moved(a=""), "the shard '' is not a file beside|a folder, not a file"),
    "surrogate": (moved(a="\ud800"), "surrogates not allowed|must map"),
    "folder below": (moved(a="x/y"), "the shard 'x/y' is not a file beside the index"),
    "an index in an index": (
        moved(a="model.safetensors.index.json"),
        "does not start with '{'|beyond",
    ),
    "cut json": (rewritten(b'{"weight_map": {"a'), "an index of shards that is damaged"),
    "deep json": (rewritten(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "twice in json": (
        rewritten(b'{"weight_map": {}, "weight_map": {}}'),
        "names 'weight_map' twice",
    ),
    "not utf-8": (rewritten(b'{"weight_map": "\xff"}'), "an index of shards that is damaged"),
    "another json": (rewritten(b'{"error": "Repository not found"}'), "it has no weight_map"),
    "list": (rewritten(b'{"weight_map": ["a"]}'), "must map names of tensors to files"),
    "numbers": (rewritten(b'{"weight_map": {"a": 1}}'), "must map names of tensors to files"),
    "empty": (rewritten(b'{"weight_map": {}}'), "holds no tensors"),
    "damaged shard": (
        lambda i: (i.parent / SHARDS[0]).write_bytes(b"<html>"),
        f"{SHARDS[0]}: 6 bytes are too few",
    ),
}


def complaint(path: Path | str, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_weights(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SETS)
def test_damaged_sets_get_one_line(tmp_path: Path, name: str) -> None:
    index, (change, words) = sharded(tmp_path), SETS[name]
    change(index)
    found = complaint(index)
    assert any(word in found for word in words.split("|")), found
    assert found.startswith(str(tmp_path))


# Folders

UNET, PLAIN, FP16 = "diffusion_pytorch_model", ".safetensors", ".fp16.safetensors"
CHOICES: list[tuple[list[str], str | None, str]] = [
    ([f"{UNET}.safetensors"], None, f"{UNET}.safetensors"),
    ([f"{UNET}{end}" for end in (".bin", FP16, PLAIN)], None, f"{UNET}{PLAIN}"),
    ([f"{UNET}.bin", f"{UNET}.fp16.safetensors"], None, f"{UNET}.fp16.safetensors"),
    ([f"{UNET}.fp16.safetensors", f"{UNET}.safetensors"], "fp16", f"{UNET}.fp16.safetensors"),
    ([f"{UNET}.non_ema.safetensors", f"{UNET}.safetensors"], None, f"{UNET}.safetensors"),
    ([f"{UNET}.no{PLAIN}", f"{UNET}{PLAIN}"], "no", f"{UNET}.no{PLAIN}"),
    ([f"model{FP16}", f"model{PLAIN}", "pytorch_model.bin"], None, f"model{PLAIN}"),
    (["pytorch_model.bin", "pytorch_model.fp16.bin"], None, "pytorch_model.bin"),
    (["pytorch_model.bin", "pytorch_model.fp16.bin"], "fp16", "pytorch_model.fp16.bin"),
    (["pytorch_model.fp16.bin"], None, "pytorch_model.fp16.bin"),
    (["my own name.ckpt"], None, "my own name.ckpt"),
    (["weights", ".hidden"], None, "weights"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "variant", "wanted"), CHOICES)
def test_the_file_that_stands_for_a_folder(
    tmp_path: Path, names: list[str], variant: str | None, wanted: str
) -> None:
    for name in names:
        (as_zip if name.endswith("bin") else as_safetensors)(tensors(), tmp_path / name)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "README.md").write_text("A model.")
    (tmp_path / "below").mkdir()
    assert open_weights(tmp_path, variant).files == (tmp_path / wanted,)


def test_a_sharded_variant(tmp_path: Path) -> None:
    index = sharded(tmp_path, f"{UNET}.safetensors.index.fp16.json")
    for path, variant in ((index, None), (tmp_path, None), (tmp_path, "fp16")):
        assert len(open_weights(path, variant).files) == 2
    as_safetensors(tensors(), tmp_path / f"{UNET}.safetensors")
    assert len(open_weights(tmp_path).files) == 1 and len(open_weights(tmp_path, "fp16").files) == 2


def test_a_set_under_another_name(tmp_path: Path) -> None:
    sharded(tmp_path, "own.safetensors.index.json")
    assert len(open_weights(tmp_path).files) == 2


def test_folders_without_a_choice(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path}: holds no weights"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    as_safetensors(tensors(), tmp_path / "unet" / f"{UNET}.safetensors")
    assert "holds no weights; its folders unet do: name one of them" in complaint(tmp_path)
    for name in ("x.safetensors", "y.ckpt"):
        as_zip(tensors(), tmp_path / name)
    assert "2 files of weights (x.safetensors, y.ckpt): name one of them" in complaint(tmp_path)
    assert "holds no weights 'fp16'" in complaint(tmp_path, variant="fp16")
    assert "holds no weights '../x'" in complaint(tmp_path, variant="../x")


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for n in range(1001):
        (tmp_path / f"{n}.png").touch()
    assert "1001 files, none with a name that weights have" in complaint(tmp_path)


# What is no model


def saved(thing: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


STRANGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"\x80", "the pickle is damaged or foreign"),
    "short": (b"PK", "2 bytes are too few"),
    "page": (b"<!DOCTYPE html><html>sign in</html>", "this is a web page, not a model"),
    "page with blanks": (b"\r\n  <HTML><body>404</body>", "this is a web page, not a model"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file, not safetensors"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture, not a model"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(99), "a picture, not a model"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "a gzip archive, not safetensors: unpack it first"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
    "rar": (b"Rar!\x1a\7\0" + bytes(99), "a RAR archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "numpy": (b"\x93NUMPY\1\0" + bytes(99), "a NumPy array"),
    "text": (b"Entry not found, and nothing else", "not safetensors: a header of"),
    "zeros": (bytes(4096), "the header does not start with '{'"),
    "cut safetensors": (safetensors.torch.save(tensors())[:-1], "cut short: the tensors end"),
    "no tensors": (safetensors.torch.save({}), "holds no tensors"),
    "config": (b'{"_class_name": "UNet2DConditionModel"}', "but no index of shards"),
    "cut zip": (saved(tensors())[:-10], "a zip archive cut short or damaged"),
    "a tensor": (saved(torch.ones(3)), "holds a single tensor, not tensors by name"),
    "a list": (saved([torch.ones(3)]), "holds a single list, not tensors by name"),
    "a module": (saved(torch.nn.Linear(1, 1)), "refused to call torch.nn.modules.linear Linear"),
    "no tensors either": (saved({"a": 1}), "holds no tensors by name"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_model_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    content, words = STRANGE[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    found = complaint(tmp_path / "model.safetensors")
    assert found.startswith(f"{tmp_path / 'model.safetensors'}: ") and words in found


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "nowhere: no such file" in complaint(tmp_path / "nowhere")
    assert "no such file: the name holds a NUL" in complaint("a\0b")
    assert complaint("/dev/zero") == "/dev/zero: a device, not a file"
    os.mkfifo(tmp_path / "pipe")
    assert "a device, not a file" in complaint(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ValueError, OSError), match="no such file|symbolic links"):
        open_weights(tmp_path / "loop")


def test_weights_are_a_mapping(tmp_path: Path) -> None:
    as_safetensors(tensors(), tmp_path / "a")
    found = open_weights(tmp_path / "a")
    assert isinstance(found, Weights) and sorted(dict(found)) == sorted(found.keys())
    with pytest.raises(TypeError):
        found["a"] = torch.ones(1)  # type: ignore[index]
