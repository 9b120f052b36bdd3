"""Safetensors: agreement with the official library, and one line for each malformed file."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiffusion.checkpoints.reader import (
    DTYPES,
    parse_header,
    read_metadata,
    read_safetensors,
    write_safetensors,
)


def zoo() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, and every awkward shape and layout."""
    bits = torch.arange(48, dtype=torch.uint8)
    table = torch.randn(6, 4)
    return {
        **{name: (bits % 2).to(dtype).reshape(6, 8) for name, dtype in DTYPES.items()},
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 5, dtype=torch.bfloat16),
        "transposed": table.T,
        "row": table[2],
        "strided": table[::2, ::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "Überfluß": torch.zeros(1),
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and raw(found[name]) == raw(tensor)
        for name, tensor in expected.items()
    )


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, **other: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **other}


def test_round_trip(tmp_path: Path) -> None:
    tensors, path = zoo(), tmp_path / "a.bin"  # the extension says nothing
    write_safetensors(tensors, path, {"kind": "zoo", "emoji": "🦓"})
    assert same(read_safetensors(path), tensors)
    assert same(safetensors.torch.load_file(path), tensors)
    assert read_metadata(path) == {"kind": "zoo", "emoji": "🦓"}


@pytest.mark.parametrize("metadata", [None, {"kind": "zoo"}])
def test_files_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in zoo().items()}
    write_safetensors(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors, metadata)
    write_safetensors({}, tmp_path / "none")
    assert read_safetensors(tmp_path / "none") == {}


def test_tensors_that_share_memory_are_each_whole(tmp_path: Path) -> None:
    weight = torch.randn(5, 5)
    write_safetensors({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "f")
    found = read_safetensors(tmp_path / "f")
    assert same(found, {"a": weight, "b": weight, "c": weight[1:]})


def test_header_rows_in_another_order_than_the_data(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(file_of({"b": entry(1, 3), "a": entry(0, 1)}, b"\x01\x02\x03"))
    assert {name: tensor.tolist() for name, tensor in read_safetensors(path).items()} == {
        "a": [1],
        "b": [2, 3],
    }


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"weight": [0.0] * 50}, protocol=protocol)


def zipped() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, file)
    assert zipfile.is_zipfile(file)
    return file.getvalue()


def legacy() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


ARCHIVE = "a PyTorch pickle/zip archive, not safetensors"
BAD: list[tuple[str, bytes, str]] = [
    ("empty", b"", "the file is empty"),
    ("short", b"1234567", "7 bytes are too few"),
    ("length beyond the file", (99).to_bytes(8, "little") + b"{}", "cut short: a header of 99"),
    ("huge length", (1 << 62).to_bytes(8, "little") + b"{}", "beyond 100 MB"),
    ("no header", bytes(8), "does not start with '{'"),
    ("leading blank", file_of(b" {}"), "does not start with '{'"),
    ("a list", file_of(b"[]"), "does not start with '{'"),
    ("utf-8", file_of(b'{"\xff": 1}'), "not UTF-8"),
    ("json", file_of(b'{"a": }'), "Expecting value"),
    ("after the json", file_of(b"{}\0"), "Extra data"),
    ("deep", file_of(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    ("duplicate", file_of(b'{"a": 1, "a": 2}'), "names 'a' twice"),
    ("duplicate field", file_of(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "names 'dtype' twice"),
    ("metadata number", file_of({"__metadata__": {"a": 1}}), "must map text to text"),
    ("metadata list", file_of({"__metadata__": []}), "must map text to text"),
    ("row", file_of({"a": 3}), "expected dtype, shape, data_offsets, got 3"),
    ("extra field", file_of({"a": entry(0, 1, more=1)}, b"1"), "got ['data_offsets', 'dtype', 'm"),
    ("dtype", file_of({"a": entry(0, 1, dtype="Q9")}, b"1"), "unknown dtype 'Q9'; allowed: BOOL"),
    ("dtype list", file_of({"a": entry(0, 1, dtype=[])}, b"1"), "unknown dtype []"),
    ("negative", file_of({"a": entry(0, 1, shape=[-1, -1])}, b"1"), "impossible shape [-1, -1]"),
    ("fraction", file_of({"a": entry(0, 1, shape=[1.0])}, b"1"), "impossible shape [1.0]"),
    ("true", file_of({"a": entry(0, 1, shape=[True])}, b"1"), "impossible shape [True]"),
    ("rank 9", file_of({"a": entry(0, 1, shape=[1] * 9)}, b"1"), "impossible shape [1, 1, 1"),
    ("overflow", file_of({"a": entry(0, 0, shape=[0, 2**40, 2**40])}), "impossible shape [0,"),
    ("size", file_of({"a": entry(0, 1, shape=[2])}, b"1"), "U8 [2] takes 2 bytes, not [0, 1]"),
    ("backwards", file_of({"a": entry(0, 1, data_offsets=[1, 0])}, b"1"), "data_offsets [1, 0]"),
    ("offsets", file_of({"a": entry(0, 1, data_offsets=[0])}, b"1"), "data_offsets [0]"),
    ("overlap", file_of({"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "'b' overlaps another"),
    ("same bytes", file_of({"a": entry(0, 2), "b": entry(0, 2)}, b"12"), "'b' overlaps another"),
    ("hole", file_of({"a": entry(0, 1), "b": entry(2, 3)}, b"123"), "'b' leaves a hole"),
    ("hole at the start", file_of({"a": entry(1, 2)}, b"12"), "'a' leaves a hole"),
    ("trailing", file_of({"a": entry(0, 1)}, b"12"), "bytes after the last tensor"),
    ("truncated", file_of({"a": entry(0, 3)}, b"12"), "cut short: the tensors end"),
    ("text", file_of(b'"a"'), "does not start with '{'"),
    ("null", file_of(b"null"), "does not start with '{'"),
    ("mark of order", file_of(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    ("largest length", b"\xff" * 8 + b"{}", "beyond 100 MB"),
    ("length too small", file_of({})[:8].replace(b"\2", b"\1") + b"{}", "double quotes"),
    ("length too large", file_of(b"{}")[:8].replace(b"\2", b"\4") + b"{}\0\0", "Extra data"),
    ("single quotes", file_of(b"{'a': 1}"), "Expecting property name"),
    ("comma at the end", file_of(b'{"__metadata__": {},}'), "double quotes"),
    (
        "metadata twice",
        file_of(b'{"__metadata__": {}, "__metadata__": {}}'),
        "'__metadata__' twice",
    ),
    ("metadata deep", file_of({"__metadata__": {"a": {"b": "c"}}}), "must map text to text"),
    ("metadata null", file_of({"__metadata__": None}), "must map text to text"),
    ("half a letter", file_of(b'{"\\ud800": {}}'), "surrogates not allowed"),
    ("half in metadata", file_of(b'{"__metadata__": {"a": "\\udfff"}}'), "surrogates not allowed"),
    (
        "missing field",
        file_of({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
        "got ['dtype', 'shape']",
    ),
    ("row null", file_of({"a": None}), "expected dtype, shape, data_offsets, got None"),
    ("dtype null", file_of({"a": entry(0, 1, dtype=None)}, b"1"), "unknown dtype None"),
    ("dtype small", file_of({"a": entry(0, 1, dtype="u8")}, b"1"), "unknown dtype 'u8'"),
    ("shape null", file_of({"a": entry(0, 1, shape=None)}, b"1"), "impossible shape None"),
    ("shape text", file_of({"a": entry(0, 1, shape="1")}, b"1"), "impossible shape '1'"),
    ("shape in shape", file_of({"a": entry(0, 1, shape=[[1]])}, b"1"), "impossible shape [[1]]"),
    ("shape 2^64", file_of({"a": entry(0, 1, shape=[2**64 + 1])}, b"1"), "impossible shape [18446"),
    (
        "not a number",
        file_of(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}'),
        "nan",
    ),
    (
        "infinite",
        file_of(b'{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 1]}}'),
        "inf",
    ),
    ("digits", file_of(b'{"a": ' + b"9" * 5000 + b"}"), "Exceeds the limit (4300 digits)"),
    ("offsets null", file_of({"a": entry(0, 1, data_offsets=None)}, b"1"), "data_offsets None"),
    (
        "offsets true",
        file_of({"a": entry(0, 1, data_offsets=[0, True])}, b"1"),
        "data_offsets [0, T",
    ),
    ("offsets real", file_of({"a": entry(0, 1, data_offsets=[0, 1.0])}, b"1"), "offsets [0, 1.0]"),
    (
        "offsets negative",
        file_of({"a": entry(0, 1, data_offsets=[-1, 0])}, b"1"),
        "offsets [-1, 0]",
    ),
    (
        "offsets three",
        file_of({"a": entry(0, 1, data_offsets=[0, 1, 1])}, b"1"),
        "offsets [0, 1, 1]",
    ),
    (
        "into the header",
        file_of({"a": entry(0, 2**61, data_offsets=[2**64 - 8, 2**64 - 7])}),
        "shape",
    ),
    ("scalar of two", file_of({"a": entry(0, 2, shape=[])}, b"12"), "U8 [] takes 1 bytes"),
    ("nothing of one", file_of({"a": entry(0, 1, shape=[0])}, b"1"), "U8 [0] takes 0 bytes"),
    (
        "nothing inside",
        file_of({"a": entry(0, 2), "b": entry(1, 1)}, b"12"),
        "'b' overlaps another",
    ),
    ("nothing beyond", file_of({"a": entry(0, 1), "b": entry(9, 9)}, b"1"), "'b' leaves a hole"),
    ("page", b"\n<!DOCTYPE html><html>not found</html>", "this is a web page, not a model"),
    ("page 2", b"\xef\xbb\xbf<html><body>sign in to download", "this is a web page, not a model"),
    ("zip", zipped(), ARCHIVE),
    ("legacy", legacy(), ARCHIVE),
    *((f"pickle {protocol}", pickled(protocol), ARCHIVE) for protocol in (2, 3, 4, 5)),
    ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
    ("gguf", b"GGUF\x03\0\0\0" + bytes(20), "a GGUF file"),
]


@pytest.mark.parametrize(("content", "message"), [row[1:] for row in BAD], ids=[r[0] for r in BAD])
def test_malformed_files_get_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (read_safetensors, read_metadata):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """A length of 0x0280 starts with the two bytes of a pickle, and is no pickle."""
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x0280)
    (tmp_path / "f").write_bytes(file_of(text, b"\x07"))
    assert read_safetensors(tmp_path / "f")["a"].item() == 7


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file"):
        read_safetensors(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a folder, not a file"):
        read_safetensors(tmp_path)


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_safetensors({"a": torch.zeros(1)}, path)
    for name, dtype in (("a", torch.complex64), ("__metadata__", torch.float32)):
        with pytest.raises(ValueError, match="cannot be stored as safetensors"):
            write_safetensors({name: torch.zeros(1, dtype=dtype)}, path)
    assert read_safetensors(path)["a"].item() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_safetensors({"a": torch.ones(1)}, path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/f'"):
        write_safetensors({"a": torch.zeros(1)}, path)
    assert read_safetensors(path)["a"].item() == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_a_changed_header_is_refused_or_read_alike(at: int, value: int, cut: int) -> None:
    """Fuzzing: never anything but a ValueError, and nothing passes that the library refuses."""
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6, dtype=torch.int16).reshape(2, 3)}
    data = bytearray(safetensors.torch.save(tensors, {"k": "v"}))
    data[at % len(data)] = value
    content = bytes(data[: len(data) - cut] if cut < 30 else data)
    try:
        header = parse_header(content, "file")
    except ValueError:
        return
    found = safetensors.torch.load(content)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: entry.shape for name, entry in header.entries.items()
    }
