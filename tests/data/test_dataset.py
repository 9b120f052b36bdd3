"""Sets in memory, and sets seen through a function of the user's own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidiffusion.data import DATASETS, Batch, Dataset, Tensors, Toy, load_function, mapped
from minidiffusion.data.dataset import as_floats

BYTES = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2)


def test_bytes_become_floats_and_come_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    x = as_floats(every)
    assert x[0] == -1 and x[255] == 1 and ((x + 1) * 127.5).round().to(torch.uint8).equal(every)


def test_rows_come_as_asked() -> None:
    labels = torch.arange(6)
    data = Tensors(BYTES, labels, ("a",) * 6, tuple("uvwxyz"))
    assert isinstance(data, Dataset) and len(data) == 6 and data.shape == (1, 2, 2)
    batch = data.batch([4, 1, 1])
    assert batch.x.equal(as_floats(BYTES[[4, 1, 1]]))
    assert batch.labels.tolist() == [4, 1, 1] and batch.captions == ("y", "v", "v")
    plain = Tensors(BYTES.double()).batch([2])
    assert plain.x.dtype == torch.float32 and plain.x.equal(BYTES[2:3].float())
    assert plain.labels.tolist() == [0] and plain.captions == ()


def test_several_captions_for_each_sample() -> None:
    """First everyone's first, then everyone's second; the samples themselves lie there once."""
    labels = torch.arange(6)
    data = Tensors(BYTES, labels, ("a",) * 6, tuple("uvwxyzUVWXYZ"))
    assert len(data) == 12 and data.shape == (1, 2, 2)
    batch = data.batch([1, 7, 11, 5, 0])
    assert batch.captions == ("v", "V", "Z", "z", "u")
    assert batch.labels.tolist() == [1, 1, 5, 5, 0]
    assert batch.x.equal(as_floats(BYTES[[1, 1, 5, 5, 0]]))
    turned = replace(data, captions=tuple("UVWXYZuvwxyz"))
    prints = {one.fingerprint() for one in (data, turned, replace(data, captions=tuple("uvwxyz")))}
    assert len(prints) == 3
    for count in (5, 7, 13):
        with pytest.raises(ValueError, match=f"6 samples need as many captions each, not {count}"):
            Tensors(BYTES, captions=("x",) * count)


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="6 samples need as many labels, not 5"):
        Tensors(BYTES, torch.arange(5))
    with pytest.raises(ValueError, match="6 samples need as many captions each, not 1"):
        Tensors(BYTES, captions=("x",))


def test_the_fingerprint_is_of_the_content() -> None:
    labels = torch.arange(6)
    data = Tensors(BYTES, labels, ("a", "b"), tuple("uvwxyz"))
    other = BYTES.clone()
    other[3, 0, 1, 1] += 1
    changed = [
        replace(data, x=other),
        replace(data, x=BYTES.view(6, 2, 2)),
        replace(data, x=BYTES.float()),
        replace(data, labels=labels.flip(0)),
        replace(data, labels=None),
        replace(data, classes=("a", "c")),
        replace(data, captions=tuple("uvwxy!")),
        replace(data, captions=()),
    ]
    prints = {one.fingerprint() for one in [data, *changed]}
    assert len(prints) == 9
    assert replace(data, x=BYTES.clone()).fingerprint() == data.fingerprint()


def mine(tmp_path: Path, body: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(body)
    return f"{path}:flipped"


FLIPPED = "def flipped(batch):\n    return batch._replace(x=batch.x.flip(-1){})\n"


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    data = Tensors(BYTES, classes=("a",))
    seen = mapped(data, load_function(mine(tmp_path, FLIPPED.format("[..., :1]"))))
    assert isinstance(seen, Dataset) and len(seen) == 6
    assert seen.shape == (1, 2, 1) and seen.classes == ("a",)
    assert seen.batch([3, 0]).x.equal(as_floats(BYTES[[3, 0]][..., 1:]))


def test_another_function_is_another_fingerprint(tmp_path: Path) -> None:
    data = Tensors(BYTES)
    prints = [data.fingerprint()]
    for number, end in enumerate(("", "[..., :1]", "")):
        (tmp_path / str(number)).mkdir()
        function = load_function(mine(tmp_path / str(number), FLIPPED.format(end)))
        prints.append(mapped(data, function).fingerprint())
    assert len(set(prints)) == 3 and prints[1] == prints[3]


def test_a_function_that_breaks_the_batch(tmp_path: Path) -> None:
    for body in ("return batch.x", "return batch._replace(x=batch.x[:1])"):
        function = load_function(mine(tmp_path, f"def flipped(batch):\n    {body}\n"))
        with pytest.raises(ValueError, match="flipped: must return a Batch of as many samples"):
            mapped(Tensors(BYTES), function).batch([0, 1])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def other(batch): return batch", "no function 'flipped'; it has other"),
        ("flipped = 3", "no function 'flipped'; it has none"),
        ("import no_such_module_xyz", "does not import: ModuleNotFoundError: No module named"),
        ("def flipped(", "does not import: SyntaxError"),
    ],
)
def test_files_that_do_not_hold_the_function(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        load_function(mine(tmp_path, body))
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)


def test_addresses_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write it as my_file\.py:my_function"):
        load_function("flipped")
    for place in (tmp_path / "gone.py", tmp_path):
        with pytest.raises(ValueError, match="no such Python file"):
            load_function(f"{place}:flipped")


def test_every_row_of_the_table_opens_into_a_dataset() -> None:
    assert set(DATASETS) == {"fashion_mnist", "mnist", "emoji", "folder", "shards", "toy"}
    assert all(config.name == name for name, config in DATASETS.items())
    data = DATASETS["toy"]().open()
    assert isinstance(data, Dataset) and data == data
    assert isinstance(data.batch([0]), Batch) and len(data) == Toy().count
