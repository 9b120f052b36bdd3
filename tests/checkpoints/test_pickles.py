"""Files of torch.save: every layout that it has written, and pickles that mean harm."""

import argparse
import collections
import functools
import io
import itertools
import os
import pickle
import random
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minidiffusion.checkpoints import pickles
from minidiffusion.checkpoints.pickles import Name, Thing, interpret
from minidiffusion.checkpoints.torchscript import read_torchscript
from minidiffusion.checkpoints.weights import open_weights

LAYOUTS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip, protocol 5": {"pickle_protocol": 5},
    "stream": {"_use_new_zipfile_serialization": False},
    "stream, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
DTYPES += (torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)
DTYPES += (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LAYOUTS[request.param]


def zoo() -> dict[str, Any]:
    table, tied = torch.randn(6, 4), nn.Parameter(torch.randn(3))
    remarked = nn.Parameter(torch.randn(2))
    remarked.remark = "an attribute of its own"  # type: ignore[attr-defined]
    return {
        **{str(dtype): torch.tensor([1, 0, 3, 1]).to(dtype).reshape(2, 2) for dtype in DTYPES},
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
        "transposed": table.T,
        "row": table[2],
        "strided": table[1::2, ::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "tied": tied,
        "tied again": tied,
        "remarked": remarked,
        "Überfluß": torch.zeros(1),
        "odd": torch.arange(3, dtype=torch.int8),  # what follows in a stream is not aligned
        "inner": {"deeper": {0: torch.ones(2), "weight": table}},
    }


def flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        below = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return found


def same(found: Tensor, wanted: Tensor) -> bool:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)]
    return torch.equal(*bits)


def assert_same(path: Path, wanted: dict[str, Tensor]) -> None:
    found = open_weights(path)
    assert list(found) == list(wanted)
    assert found.shapes == {name: tuple(t.shape) for name, t in wanted.items()}
    assert found.dtypes == {name: t.dtype for name, t in wanted.items()}
    assert not [name for name, tensor in wanted.items() if not same(found[name], tensor)]


def test_every_dtype_and_layout_as_torch_wrote_it(tmp_path: Path, layout: dict[str, Any]) -> None:
    tensors = zoo()
    torch.save(tensors, tmp_path / "a", **layout)
    assert_same(tmp_path / "a", flat(tensors))


def test_strides_survive_and_ties_share_their_bytes(tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "a")
    found = open_weights(tmp_path / "a")
    assert found["transposed"].stride() == (1, 4)
    assert found["tied"].data_ptr() == found["tied again"].data_ptr()
    assert found["row"].data_ptr() == found["inner.deeper.weight"].data_ptr() + 2 * 16


def test_what_is_written_into_a_tensor_reaches_no_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    open_weights(tmp_path / "a")["a"].fill_(7)
    assert (tmp_path / "a").read_bytes() == before


def lightning() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint as a trainer leaves it: classes that its reader has never heard of."""
    module = types.ModuleType("pytorch_lightning_of_old")
    source = """
import enum
class ModelCheckpoint:
    def __init__(self): self.best, self.state, self.twin = 0.5, {"monitor": [1, 2]}, self
class Slotted:
    __slots__ = ("a",)
    def __init__(self): self.a = {3}
class Reduced:
    def __reduce__(self): return make, (1, 2), {"x": 1}, iter([4]), iter([("k", self.__class__)])
    def append(self, item): pass
    def extend(self, items): pass
    def __setitem__(self, key, value): pass
def make(a, b): return Reduced()
class Named(dict): pass
class Heard(Exception): pass
class Colour(enum.Enum): RED = 1
class Keyed:
    def __new__(cls, *, key): return super().__new__(cls)
    def __getnewargs_ex__(self): return (), {"key": 1}
"""
    exec(source, module.__dict__)
    sys.modules[module.__name__] = module
    weights = collections.OrderedDict(zoo())
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    facts = {
        "epoch": 12,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {module.ModelCheckpoint: module.ModelCheckpoint(), "s": module.Slotted()},
        "odd": [module.Reduced(), module.Named(a=1), module.Heard("x"), module.Colour.RED],
        "keyed": module.Keyed(key=1),
        "scalar": np.float64(3.5),
        "array": np.arange(3),
        "hyper": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(a=[1, (2,)])),
        "plain": [1 + 2j, {1, 2}, frozenset({3}), b"bytes", bytearray(b"x"), 2**70, -(2**40), 1e9],
        "lazily": functools.partial(print, end=""),
        "nothing": None,
        (1, 2): collections.defaultdict(list, {"a": [1]}),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "state_dict": weights,
    }
    return facts, flat(dict(weights))


def test_a_trainers_checkpoint(tmp_path: Path, layout: dict[str, Any]) -> None:
    facts, wanted = lightning()
    try:
        torch.save(facts, tmp_path / "a.ckpt", **layout)
    finally:
        del sys.modules["pytorch_lightning_of_old"]
    assert_same(tmp_path / "a.ckpt", wanted)
    assert open_weights(tmp_path / "a.ckpt").metadata == {
        "epoch": "12",
        "global_step": "470000",
        "pytorch-lightning_version": "1.4.2",
    }
    assert "pytorch_lightning_of_old" not in sys.modules


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(protocol: int) -> None:
    data = {"a": [1, -1, 300, 70000, 2**70, -(2**40)], "t": (), "n": (1, 2, 3, 4), "f": 0.5}
    data |= {"text": "é\n" * 200, "true": [True, False, None], 5: {"x": []}}
    data["again"] = data["a"]
    assert interpret(io.BytesIO(pickle.dumps(data, protocol))) == data


def test_keys_that_are_no_names_are_left_out() -> None:
    """Tuples deep enough end Python when hashed, and large numbers can all have one hash."""
    data = {(1, 2): 3, 2**61: 4, True: 5, None: 6, b"b": 7, "a": 8, -9: 10}
    assert interpret(io.BytesIO(pickle.dumps(data))) == {"a": 8, -9: 10}


def test_a_stranger_is_a_name_without_behaviour() -> None:
    found = interpret(io.BytesIO(pickle.dumps([argparse.Namespace(a=1), os.getcwd], protocol=2)))
    assert isinstance(found[0], Thing) and found[0].name == "argparse Namespace"
    assert found[0].below is None and found[1] == Name("posix getcwd")


def rezipped(
    path: Path,
    change: Callable[[str, bytes], tuple[str, bytes] | None] = lambda name, content: (
        name,
        content,
    ),
    method: int = zipfile.ZIP_STORED,
    more: dict[str, bytes] | None = None,
) -> Path:
    """The archive with its members changed, and others added."""
    with zipfile.ZipFile(path) as old:
        rows = [change(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", method) as new:
        for row in [*filter(None, rows), *(more or {}).items()]:
            new.writestr(*row)
    return path


def saved(path: Path, tensors: dict[str, Any], **layout: Any) -> Path:
    torch.save(tensors, path, **layout)
    return path


def test_compressed_or_not_aligned_members(tmp_path: Path) -> None:
    """As when somebody has unpacked and packed an archive again."""
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path = rezipped(saved(tmp_path / "a", zoo()), method=method)
        assert_same(path, flat(zoo_of(path)))


def zoo_of(path: Path) -> dict[str, Any]:
    """The tensors as torch itself reads them."""
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def test_any_name_of_the_folder(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", {"w": torch.arange(3.0)})
    rezipped(path, lambda name, content: ("über all/" + name.partition("/")[2], content))
    assert open_weights(path)["w"].tolist() == [0, 1, 2]


def test_a_big_endian_machine_wrote_it(tmp_path: Path) -> None:
    whole = {
        "a": torch.tensor([1.5, -2]),
        "b": torch.tensor([3, 70000]),
        "c": torch.tensor([7]).byte(),
    }
    whole["d"] = torch.tensor([1 + 2j, 3.5])
    wide = {"0": 4, "1": 8, "2": 1, "3": 4}

    def turned(name: str, content: bytes) -> tuple[str, bytes]:
        if name.endswith("byteorder"):
            return name, b"big"
        n = wide.get(name.rpartition("/")[2], 1) if "/data/" in name else 1
        return name, b"".join(content[i : i + n][::-1] for i in range(0, len(content), n))

    path = saved(tmp_path / "a", whole)
    assert_same(rezipped(path, turned), whole)
    rezipped(path, lambda name, c: (name, b"middle" if name.endswith("byteorder") else c))
    with pytest.raises(ValueError, match="unknown byte order b'middle'"):
        open_weights(path)


def test_torchscript_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would like another format
        torch.jit.save(torch.jit.script(module), tmp_path / "a.pt")
    assert {k: v.tolist() for k, v in open_weights(tmp_path / "a.pt").items()} == {
        k: v.tolist() for k, v in module.state_dict().items()
    }
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.find(module[0].weight.detach().numpy().tobytes())
    content[at] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
        read_torchscript(tmp_path / "a.pt")


# Pickles written by hand.

STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
"""The storage "0" of four numbers."""


def number(n: int) -> bytes:
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def row(*numbers: int) -> bytes:
    return b"(" + b"".join(map(number, numbers)) + b"t"


def tensor(offset: int, shape: bytes, strides: bytes, storage: bytes = STORAGE) -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + strides
    return call + b"\x89}tR"


def text(word: bytes) -> bytes:
    return b"\x8d" + len(word).to_bytes(8, "little") + word


def under(key: bytes, value: bytes) -> bytes:
    return b"\x80\x04}" + text(key) + value + b"s."


GOOD = tensor(0, row(2, 2), row(2, 1))
RUN = text(b"touch ran")


def paths(depth: int) -> bytes:
    """Dicts of which each holds the one before twice: 2^depth names in 30 bytes each."""
    rows = (b"}(X\1\0\0\0aj%bX\1\0\0\0bj%bu\x94" % (n, n) for n in map(four, range(depth)))
    return b"\x80\x02}\x94" + b"".join(rows) + b"."


def four(n: int) -> bytes:
    return n.to_bytes(4, "little")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "reduce": (b"\x80\x02cos\nsystem\n" + RUN + b"\x85R.", "refused to call os system"),
    "stack global": (
        b"\x80\x04" + text(b"os") + text(b"system") + b"\x93" + RUN + b"\x85R.",
        "call os",
    ),
    "new object": (b"\x80\x02cos\nsystem\n" + RUN + b"\x85\x81.", "refused to call os system"),
    "new object ex": (b"\x80\x04cos\nsystem\n" + RUN + b"\x85}\x92.", "refused to call os system"),
    "instance": (b"(" + RUN + b"ios\nsystem\n.", "refused to call os system"),
    "object": (b"(cos\nsystem\n" + RUN + b"o.", "refused to call os system"),
    "as state": (b"\x80\x02}cos\nsystem\n" + RUN + b"\x85Rb.", "holds no tensors"),
    "import": (b"\x80\x02ccanary\nsing\n)R.", "refused to call canary sing"),
    "import alone": (b"\x80\x02ccanary\nsing\n.", "holds a single Name"),
    "hidden as tensor": (under(b"a", b"cos\nsystem\n" + RUN + b"\x85R"), "holds no tensors"),
    "rebuilt": (
        under(b"a", b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + RUN + b"\x85NtR"),
        "holds no tensors",
    ),
    "extension": (b"\x80\x02\x82\x01)R.", "refused to call a made-up class"),
    "persistent text": (b"P0\n.", "PERSID is not one that torch.save writes"),
    "out of band": (b"\x80\x05\x97.", "NEXT_BUFFER is not one"),
    "no pickle": (b"hello", "damaged or foreign"),
    "empty": (b"", "exhausted before seeing STOP"),
    "no stop": (b"\x80\x02}", "exhausted before seeing STOP"),
    "underflow": (b"\x80\x02R.", "pop from empty list"),
    "short tuple": (b"\x80\x02N\x87.", "the stack is too short"),
    "no mark": (b"\x80\x02NNt.", "pop from empty list"),
    "no memo": (b"\x80\x02h\7.", "damaged or foreign: 7"),
    "odd rows": (b"\x80\x02}(Nu.", "damaged or foreign"),
    "rows for a number": (b"\x80\x02K\1(NNu.", "a row for what is no dict"),
    "items for a number": (b"\x80\x02K\1(Ne.", "to what is no list"),
    "call with a list": (b"\x80\x02cos\nsystem\n]R.", "the arguments of a call are no tuple"),
    "a list for a name": (b"\x80\x04](" + b"h\0" * 9 + b"e" + text(b"a") + b"\x93.", "damaged"),
    "text of 2^62 bytes": (
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a.",
        "expected 46116",
    ),
    "bytes of 2^62": (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"a.", "expected 46116"),
    "number of digits": (b"I" + b"9" * 10**5 + b"\n.", "Exceeds the limit (4300 digits)"),
    "odd escape": (b"\x80\x02cos\\q\nsystem\n)R.", "damaged or foreign|refused to call"),
    "cycle": (b"\x80\x02}\x94X\1\0\0\0ah\0s.", "dicts within dicts without end"),
    "cycle with tensors": (b"\x80\x02}\x94(X\1\0\0\0ah\0X\1\0\0\0b" + GOOD + b"u.", "without end"),
    "paths": (paths(60), "dicts within dicts without end, or too many"),
    "deep dicts": (b"\x80\x02" + b"}K\1" * 20000 + b"}" + b"s" * 20000 + b".", "without end"),
    "deep tuple": (b"\x80\x02)" + b"\x85" * 10**5 + b".", "holds a single tuple"),
    "deep tuple as key": (b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.", "holds no tensors"),
    "deep list": (b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".", "holds a single list"),
    "instructions": (b"\x80\x02" + b"}" * 2**18 + b".", "more than 131072 instructions"),
    "long names": (b"\x80\x04" + text(b"m" * 10**6) + b"\x94h\0\x93.", "is 8193 letters long"),
    "long key": (under(b"k" * 10**6, GOOD), "is longer than 4096 letters"),
    "same name": (
        b"\x80\x02}(" + text(b"a.b") + GOOD + text(b"a") + b"}" + text(b"b") + GOOD + b"su.",
        "two tensors are named 'a.b'",
    ),
    "number and text": (b"\x80\x02}(K\1" + GOOD + text(b"1") + GOOD + b"u.", "are named '1'"),
    "line break": (under(b"a\nb", tensor(4, row(1), row(1))), r"'a\nb': reaches beyond"),
    "offset": (under(b"a", tensor(4, row(1), row(1))), "'a': reaches beyond its 4 stored"),
    "shape": (under(b"a", tensor(0, row(5), row(1))), "'a': reaches beyond its 4 stored"),
    "strides": (under(b"a", tensor(0, row(2), row(4))), "'a': reaches beyond its 4 stored"),
    "no strides": (under(b"a", tensor(0, row(2**20 + 1), row(0))), "'a': reaches beyond its 4"),
    "negative offset": (under(b"a", tensor(-1, row(1), row(1))), "impossible shape, strides"),
    "negative shape": (under(b"a", tensor(0, row(-1), row(1))), "impossible shape, strides"),
    "negative stride": (under(b"a", tensor(3, row(4), row(-1))), "impossible shape, strides"),
    "unlike": (under(b"a", tensor(0, row(2, 2), row(1))), "impossible shape"),
    "rank": (under(b"a", tensor(0, row(*[1] * 9), row(*[1] * 9))), "impossible shape, strides"),
    "overflow": (under(b"a", tensor(0, row(2**40, 2**40, 0), row(1, 1, 1))), "impossible shape"),
    "shape of texts": (under(b"a", tensor(0, text(b"ab"), row(1))), "impossible shape"),
    "storage kind": (
        under(b"a", tensor(0, row(1), row(1), STORAGE.replace(b"Float", b"QInt8"))),
        "unknown storage torch QInt8Storage",
    ),
    "storage of another": (
        under(b"a", tensor(0, row(1), row(1), STORAGE.replace(b"torch\n", b"numpy\n"))),
        "unknown storage numpy FloatStorage",
    ),
    "storage missing": (
        under(b"a", tensor(0, row(1), row(1), STORAGE.replace(b"\x000X", b"\x007X"))),
        "the archive is incomplete: no data/7",
    ),
    "storage outside": (
        under(
            b"a", tensor(0, row(1), row(1), STORAGE.replace(b"\1\0\0\x000X", b"\7\0\0\0../../0X"))
        ),
        "the archive is incomplete: no data/../../0",
    ),
    "storage size": (
        under(b"a", tensor(0, row(1), row(1), STORAGE.replace(b"K\4", b"K\5"))),
        "data/0: 16 bytes, expected 20",
    ),
    "storage of -4": (
        under(b"a", tensor(0, row(1), row(1), STORAGE.replace(b"K\4", number(-4)))),
        "data/0: 16 bytes, expected -16",
    ),
    "view of a storage": (
        under(
            b"a",
            tensor(0, row(1), row(1), STORAGE.replace(b"K\4", b"K\4(" + text(b"v") + b"K\3K\2t")),
        ),
        "unknown kind of storage",
    ),
    "not a storage": (under(b"a", tensor(0, row(1), row(1), b"K\1Q")), "unknown kind of storage"),
    "conjugate": (
        under(b"a", GOOD.replace(b"\x89}tR", b"\x89}}" + text(b"conj") + b"\x88stR")),
        "the conjugate or the negative",
    ),
    "claims": (
        b"\x80\x02}\x94("
        + b"".join(text(b"%d" % n) + tensor(0, row(2**20), row(0)) for n in range(40))
        + b"u.",
        "its tensors claim 167772160 bytes in a file of",
    ),
}
"""What a pickle may try, and the one line that it gets."""


def packed(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", bytes(16))
    return file.getvalue()


def streamed(content: bytes) -> bytes:
    begin = b"".join(pickle.dumps(n, 2) for n in (0x1950A86A20F9469CFC6C, 1001, {}))
    return begin + content + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16)


@pytest.fixture
def nest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that shows afterwards that nothing was run in it, or imported from it."""
    (tmp_path / "canary.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert not Path("ran").exists() and "canary" not in sys.modules


def complaint(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 4600
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_get_one_line(
    nest: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, words = HOSTILE[name]
    path = nest / "model.ckpt"
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 2**17)  # checking types makes them slow here
    for whole in (packed(content), streamed(content))[: 1 if len(content) > 20000 else 2]:
        path.write_bytes(whole)
        found = complaint(path)
        if whole[:2] == b"PK":  # a stream stumbles over its storages before its tensors
            assert any(word in found for word in words.split("|")), found


def test_the_canary_can_sing(nest: Path) -> None:
    """The pickles above do harm where they are believed."""
    for name in ("reduce", "stack global", "instance", "object", "import"):
        code = "import pickle, sys; pickle.load(sys.stdin.buffer)"
        subprocess.run(
            [sys.executable, "-c", code], input=HOSTILE[name][0], cwd=nest, capture_output=True
        )
        (nest / "ran").unlink()


def test_a_view_of_good_bytes_is_read() -> None:
    """The hand-written parts are right, so that each fault above is the only one."""
    assert interpret(io.BytesIO(under(b"a", GOOD)))["a"].shape == (2, 2)


def test_part_of_a_storage(tmp_path: Path) -> None:
    part = STORAGE.replace(b"K\4", b"K\4(" + text(b"v") + b"K\1K\2t")
    content = under(b"a", tensor(0, row(2), row(1), part))
    whole = streamed(content)
    (tmp_path / "a").write_bytes(whole[:-16] + torch.arange(4.0).numpy().tobytes())
    assert open_weights(tmp_path / "a")["a"].tolist() == [1, 2]
    (tmp_path / "a").write_bytes(streamed(content.replace(number(2), number(3))))
    assert "reaches beyond its 2 stored numbers" in complaint(tmp_path / "a")


def test_every_cut_of_a_file_is_named(tmp_path: Path, layout: dict[str, Any]) -> None:
    path = saved(tmp_path / "a", {"w": torch.randn(5), "v": torch.ones(2)}, **layout)
    whole = path.read_bytes()
    for size in itertools.chain(range(1, len(whole), 7), range(len(whole) - 30, len(whole))):
        path.write_bytes(whole[:size])
        assert complaint(path)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_changed_byte_is_survived(tmp_path: Path, kind: str) -> None:
    """Fuzzing: a ValueError, or tensors that lie in the file; never anything else."""
    path = saved(tmp_path / "a", zoo(), **LAYOUTS[kind])
    whole, draw = path.read_bytes(), random.Random(kind)
    hot = [
        at for word in (b"data.pkl", b"PK\1\2", b"PK\5\6", b"\x80") if (at := whole.find(word)) >= 0
    ]
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            at = (draw.choice(hot) + draw.randrange(2000)) % len(content)
            content[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(4))
        path.write_bytes(content)
        try:
            found = {name: tensor.clone() for name, tensor in open_weights(path).items()}
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert sum(tensor.nbytes for tensor in found.values()) <= 4 * len(content) + 2**26


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no pickle": (
        lambda p: rezipped(p, lambda n, c: None if "pkl" in n else (n, c)),
        "no data.pkl",
    ),
    "two folders": (lambda p: rezipped(p, more={"b/data.pkl": b""}), "several folder"),
    "no storage": (
        lambda p: rezipped(p, lambda n, c: None if "data/0" in n else (n, c)),
        "no data/0",
    ),
    "short storage": (
        lambda p: rezipped(p, lambda n, c: (n, c[:8] if "data/0" in n else c)),
        "data/0: 8 bytes, expected 16",
    ),
    "another method": (lambda p: rezipped(p, method=zipfile.ZIP_LZMA), "oddly compressed"),
    "encrypted": (lambda p: patch(p, b"PK\x03\x04", 6, b"\1"), "encrypted, or of two names"),
    "two names": (lambda p: patch(p, b"PK\x03\x04", 30, b"x"), "encrypted, or of two names"),
    "list of members": (lambda p: patch(p, b"PK\1\2", 0, b"XX"), "cut short or damaged: Bad magic"),
    "place": (lambda p: patch(p, b"PK\1\2", 42, b"\5"), "not where the list of members says"),
    "size": (lambda p: patch(p, b"PK\1\2", 20, b"\xff\xff\xff\x7f"), "reaches beyond the file"),
    "two sizes": (lambda p: patch(p, b"PK\1\2", 24, b"\xff\xff\xff\x7f"), "bytes in "),
    "version": (lambda p: patch(p, b"PK\1\2", 6, b"\xff"), "zip file version"),
    "huge pickle": (
        lambda p: rezipped(
            p, lambda n, c: (n, bytes(2**25 + 1) if "pkl" in n else c), zipfile.ZIP_DEFLATED
        ),
        "data.pkl is larger than 32 MB",
    ),
    "zip bomb": (
        lambda p: p.write_bytes(bomb()),
        "its tensors claim 100000000 bytes in a file of ",
    ),
}


def patch(path: Path, word: bytes, at: int, change: bytes) -> None:
    content = bytearray(path.read_bytes())
    begin = content.find(word) + at
    content[begin : begin + len(change)] = change
    path.write_bytes(content)


def bomb() -> bytes:
    """100 MB of zeros in 100 kB."""
    storage = STORAGE.replace(b"K\4", number(25_000_000))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        content = under(b"a", tensor(0, row(25_000_000), row(1), storage))
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", bytes(100_000_000))
    return file.getvalue()


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives_get_one_line(tmp_path: Path, name: str) -> None:
    change, words = ARCHIVES[name]
    path = saved(tmp_path / "a", {"w": torch.randn(4)})
    change(path)
    assert words in complaint(path)


def test_two_members_of_one_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", {"w": torch.randn(4)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(16))
    assert complaint(path) == "the zip archive has two members named 'a/data/0'"


def test_a_damaged_compressed_storage_is_named_when_it_is_read(tmp_path: Path) -> None:
    tensors = {"v": torch.zeros(9), "w": torch.randn(99)}
    path = rezipped(saved(tmp_path / "a", tensors), method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("a/data/1").header_offset + 30 + len("a/data/1")
    content = bytearray(path.read_bytes())
    content[at : at + 9] = b"\xff" * 9
    path.write_bytes(content)
    weights = open_weights(path)
    assert weights["v"].sum() == 0
    with pytest.raises(ValueError, match="a: data/1 is damaged"):
        weights["w"]


STREAMS: dict[str, tuple[bytes, str]] = {
    "another pickle": (pickle.dumps({"a": [0.0] * 9}, 4), "a pickle, but not one of torch.save"),
    "keys": (streamed(under(b"a", GOOD)).replace(b"]q\0", b"Nq\0"), "damaged or foreign"),
    "stray key": (
        streamed(under(b"a", GOOD)).replace(b"\0\x000q", b"\0\x001q"),
        "of no known dtype",
    ),
    "count": (streamed(under(b"a", GOOD))[:-24] + b"\3" + bytes(23), "data/0: 12 bytes"),
    "huge count": (
        streamed(under(b"a", GOOD))[:-24] + b"\xff" * 8 + bytes(16),
        "ends beyond the file",
    ),
    "no count": (streamed(under(b"a", GOOD))[:-20], "cut short: storage '0' ends beyond the file"),
    "two keys": (
        streamed(under(b"a", GOOD))[: -24 - len(pickle.dumps(["0"], 2))]
        + pickle.dumps(["0", "0"], 2)
        + ((4).to_bytes(8, "little") + bytes(16)) * 2,
        "two storages have the key '0'",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_hostile_streams_get_one_line(tmp_path: Path, name: str) -> None:
    content, words = STREAMS[name]
    (tmp_path / "a").write_bytes(content)
    found = complaint(tmp_path / "a")
    assert any(word in found for word in words.split("|")), found


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts as Linux does")
def test_memory_stays_small(tmp_path: Path) -> None:
    """A file of 256 MB is opened and every tensor mapped within 10 MB; bombs stay below 300 MB."""
    torch.save({f"w{n}": torch.zeros(2**24) for n in range(4)}, tmp_path / "large")
    huge = b"\x80\x04" + text(b"a" * (2**25 - 200) + "😀".encode()) + b"."
    (tmp_path / "bomb 1").write_bytes(packed(huge))
    (tmp_path / "bomb 2").write_bytes(packed(b"\x80\x02" + b"}" * 2**20 + b"."))
    (tmp_path / "bomb 3").write_bytes(packed(paths(60)))
    code = """
import resource, sys
from minidiffusion.checkpoints.weights import open_weights

def anonymous():
    rows = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Anonymous"))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = anonymous()
weights = open_weights("large")
tensors = dict(weights)
spent = anonymous() - before
before = peak()
for n in (1, 2, 3):
    try:
        open_weights(f"bomb {n}")
    except ValueError:
        continue
    sys.exit(1)
print(len(tensors), spent // 1024, (peak() - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    count, spent, bombs = map(int, done.stdout.split())
    assert count == 4 and spent < 10 and bombs < 300
