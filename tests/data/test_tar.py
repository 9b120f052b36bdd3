"""Archives that were made to do harm, or were harmed: one line each, and nothing else is lost."""

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import GOOD, LAST, header, member, padded, tar
from webdataset.tariterators import group_by_keys, tar_file_iterator

from minidiffusion.data.tar import LONGEST, MOST, Span, printed, spans


def found(data: bytes) -> list[Span]:
    return list(spans(io.BytesIO(data), len(data)))


def packed(files: dict[str, bytes]) -> bytes:
    return b"".join(member(name, data) for name, data in files.items())


def contents(data: bytes, span: Span) -> dict[str, bytes]:
    return {k: data[m.offset : m.offset + m.size] for k, m in span.members.items()}


FIRST, END = packed(GOOD), bytes(1024)


def test_members_of_one_name_are_one_sample() -> None:
    data = packed({"./in.a/x.png": b"1", "./in.a/x.TXT": b"2", "in/x.seg.png": b"3"}) + END
    one, two = found(data)
    assert (one.key, contents(data, one)) == ("./in.a/x", {"png": b"1", "txt": b"2"})
    assert (two.key, contents(data, two)) == ("in/x", {"seg.png": b"3"})
    assert one.start == 0 and one.end == two.start == 2048 and two.end == len(data) - 1024
    assert found(END) == [] and not any(span.fault for span in (one, two))


def test_a_sample_is_the_same_cut_out_of_its_archive() -> None:
    long = "d/" * 80 + "é" * 40  # takes an extended header
    data = packed({**GOOD, f"{long}.png": b"1", f"{long}.txt": b"2", **LAST}) + END
    _, span, _ = found(data)
    assert span.key == long
    part = data[span.start : span.end]
    (again, cut) = found(part)
    assert again.key == long and contents(part, again) == contents(data, span)
    assert cut.key == "" and "end mark" in cut.fault  # of the part, not of the sample


REFUSED = [
    ("../../etc/passwd.png", "outside the archive", {}),
    ("/etc/passwd.png", "outside the archive", {}),
    ("in/../../x.png", "outside the archive", {}),
    ("x" * 5000 + ".png", "a name of 5004 letters", {}),
    ("x.png", "a link", {"kind": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    ("x.png", "a link", {"kind": tarfile.LNKTYPE, "linkname": "a.png"}),
    ("x.png", "a header of", {"kind": tarfile.SYMTYPE, "linkname": "y" * 10**5}),
    ("x.png", "a device", {"kind": tarfile.CHRTYPE}),
    ("x.png", "a device", {"kind": tarfile.BLKTYPE}),
    ("x.png", "a pipe", {"kind": tarfile.FIFOTYPE}),
    ("x.png", "no plain file", {"kind": b"Q"}),
    ("no_extension", "a link", {"kind": tarfile.SYMTYPE}),
]


@pytest.mark.parametrize(("name", "reason", "more"), REFUSED)
def test_hostile_members_are_refused_alone(name: str, reason: str, more: dict) -> None:
    data = FIRST + header(name, **more) + packed(LAST) + END
    first, bad, last = found(data)
    assert (first.key, first.fault, last.key, last.fault) == ("a", "", "z", "")
    assert contents(data, last) == {"png": LAST["z.png"], "txt": b"last"}
    assert reason in bad.fault and "\n" not in bad.fault
    assert bad.key == name.removesuffix(".png")


def pax(said: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(said), kind) + padded(said)


def record(key: str, value: str) -> bytes:
    rest = len(f" {key}={value}\n".encode())
    size = next(n for n in range(rest, rest + 9) if n == rest + len(str(n)))
    return f"{size} {key}={value}\n".encode()


def test_extended_headers() -> None:
    said = record("path", "ü/x.png") + record("mtime", "1.5") + record("comment", "a\n=b")
    data = FIRST + pax(said) + member("short.png", b"5") + END
    assert [span.key for span in found(data)] == ["a", "ü/x"]
    for said, reason in (
        (record("path", "../x.png"), "outside"),
        (record("GNU.sparse.major", "1"), "sparse"),
        (record("size", str(10**13)), "cut short"),
    ):
        assert reason in found(FIRST + pax(said) + member("x.png", b"5") + END)[1].fault


def test_bombs_in_headers_are_never_read() -> None:
    """A name of 200 kB costs its sample; one of a terabyte, the archive behind it."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        size = 3 * LONGEST
        bomb = header("bomb", size, kind) + bytes(size)
        _, bad, last = found(FIRST + bomb + member("b.png", b"1") + packed(LAST) + END)
        assert "a header of 196,608 bytes" in bad.fault and not last.fault
        file = Counting(FIRST + header("bomb", 2**40, kind) + END)
        *_, end = spans(file, len(file.getvalue()))
        assert "cut short" in end.fault and file.largest <= LONGEST


def test_headers_without_end_do_not_fill_memory() -> None:
    said = b"".join(record(f"k{n}", "v") for n in range(600))
    other = b"".join(record(f"l{n}", "v") for n in range(600))
    *_, bad = found(FIRST + pax(said) + pax(other) + member("x.png", b"1") + END)
    assert bad.fault == "more than 1,000 extended headers at byte 2,048"


class Counting(io.BytesIO):
    largest = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0
        self.largest = max(self.largest, size)
        return super().read(size)


def negative(size: int) -> bytes:
    """A header of base-256 numbers, as GNU tar writes what octal digits cannot hold."""
    return header("n.png", size)


BROKEN = [
    (negative(-512), "a negative size at byte 2,048"),
    (negative(-(2**40)), "a negative size"),
    (header("n.png", 4, tarfile.GNUTYPE_SPARSE), "a sparse file at byte 2,048"),
    (b"x" * 512, "no tar header at byte 2,048; what follows is left out"),
    (header("n.png", 5)[:300], "no tar header at byte 2,048"),
    (pax(b"9 path=x.png\n"), "cannot be read"),
    (pax(b"0 path=x.png\n"), "cannot be read"),
    (pax(b"999999 path=x.png\n"), "cannot be read"),
    (pax(record("size", "-5")) + header("n.png", 5), "a size that is no number"),
    (pax(record("size", "1" * 30)) + header("n.png", 5), "a size that is no number"),
    (pax(record("path", "x.png"), tarfile.XGLTYPE), "names every file the same"),
    (header("long", 9, tarfile.GNUTYPE_LONGNAME), "in a header"),
    (bytes(1024) + FIRST, "more lies behind its end"),
    (b"", "ends without an end mark"),
]


@pytest.mark.parametrize(("blocks", "reason"), BROKEN)
def test_a_damaged_archive_gives_what_lies_before(blocks: bytes, reason: str) -> None:
    first, bad = found(FIRST + blocks)
    assert first.key == "a" and contents(FIRST, first) == {"png": GOOD["a.png"], "txt": b"first"}
    assert bad.key == "" and reason in bad.fault


def test_cut_short_in_a_member() -> None:
    whole = FIRST + packed(LAST)
    for size in (len(whole) - 510, len(FIRST) + 512 + 1):
        first, last, end = found(whole[:size])
        assert (first.key, first.fault, last.key) == ("a", "", "z")
        assert "cut short" in last.fault and "cut short in z." in end.fault
    huge = FIRST + header("x.png", 2**60) + END
    _, bad, end = found(huge)
    assert "cut short" in bad.fault and end.key == ""


def test_sizes_and_numbers_that_are_too_large(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tar"
    with path.open("wb") as file:  # 129 MB on the paper, a few kB on the disk
        file.write(FIRST + header("x.png", MOST + 1))
        file.seek(MOST + 512, 1)
        file.write(packed(LAST) + END)
    with path.open("rb") as file:
        _, bad, last = spans(file, path.stat().st_size)
    assert bad.fault == "134,217,729 bytes: 134,217,728 at most" and last.key == "z"
    many = packed({f"a.{n}": b"" for n in range(70)}) + packed(LAST) + END
    bad, last = found(many)
    assert bad.fault == "more than 64 members" and last.key == "z" and len(bad.members) == 64
    twice = member("a.png", b"1") + member("a.PNG", b"2") + END
    assert found(twice)[0].fault == "two members .png"


def test_what_is_no_tar_at_all() -> None:
    for data in (b"\x1f\x8b" + bytes(600), b"text", b"<html>" * 200):
        (bad,) = found(data)
        assert bad.key == "" and "no tar archive" in bad.fault
    assert "end mark" in found(b"")[0].fault


def test_what_tar_itself_writes(tmp_path: Path) -> None:
    """With folders, a leading ./, and hidden files that are no samples."""
    (tmp_path / "in" / "cats").mkdir(parents=True)
    for name in ("cats/a.png", "cats/a.txt", "cats/._a.png", "b.png", "README", "__meta__"):
        (tmp_path / "in" / name).write_text(name)
    for kind in ("gnu", "pax", "ustar", "v7"):
        made = ["tar", "-cf", tmp_path / "x.tar", "--sort=name", f"--format={kind}", "."]
        subprocess.run(made, cwd=tmp_path / "in", check=True)
        data = (tmp_path / "x.tar").read_bytes()
        assert [(s.key, s.fault) for s in found(data)] == [("./b", ""), ("./cats/a", "")], kind


NAMES = st.lists(st.sampled_from(["a", "b.c", "d/e", "x.png", "y.TXT", ".h", "__m__", "z.", "é"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(NAMES.map("/".join).filter(lambda n: n and "/." not in n), max_size=8))
def test_samples_are_those_of_webdataset(names: list[str]) -> None:
    """But for hidden files in folders, of which it makes samples, while we leave them alone."""
    data = b"".join(member(name, b"%d" % n) for n, name in enumerate(names)) + END
    files = ({"__url__": "", **f} for f in tar_file_iterator(io.BytesIO(data)))
    try:
        wanted = list(group_by_keys(files))
    except ValueError:  # where one name comes twice it stops, and we leave out the sample
        assert any("two members" in span.fault for span in found(data))
        return
    ours = [{"__key__": s.key, **contents(data, s)} for s in found(data)]
    assert ours == [{k: v for k, v in one.items() if k != "__url__"} for one in wanted]


def test_damage_anywhere_never_raises(tmp_path: Path) -> None:
    """2,000 archives of one to three changed bytes, and cut at any place."""
    draw = random.Random(0)
    whole = FIRST + pax(record("path", "p.png")) + member("n.png", b"1") + packed(LAST) + END
    for _ in range(2000):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(4) if data else 0):
            data[draw.randrange(len(data))] = draw.randrange(256)
        for span in found(bytes(data)):
            assert 0 <= span.start <= span.end and "\n" not in span.fault
            for one in span.members.values():
                assert span.fault or one.offset + one.size <= len(data)


def test_names_in_one_line() -> None:
    assert printed("a\nb\x1b[31m\udce9é") == "a\\nb\\x1b[31m\\udce9é"
    assert printed("x" * 300) == "x" * 200 + "..."


def test_helpers(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", GOOD)
    with tarfile.open(path) as archive:
        assert archive.getnames() == list(GOOD)
