"""Tar archives as samples: consecutive members that share a name up to its first dot.

Python's tarfile reads each block of a header; the way from one header to the next is gone here,
because tarfile itself takes a damaged header for the end of the archive, follows negative sizes
backwards, and reads names of any length. Nothing is ever extracted.
"""

import re
import tarfile
from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
MOST = 2**27
"""Bytes of a sample. The largest picture that is read, raw, is of 48 MB."""
MEMBERS_MOST = 64
"""Members of a sample."""
LONGEST = 2**16
"""Bytes of an extended header; a name in it may be as long as a path of Linux."""
NAME_MOST = 4096
RECORDS_MOST = 1000
SHOWN = 200
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")
RECORD = re.compile(rb"(\d{1,5}) ([^=]+)=")
PLAIN = {tarfile.REGTYPE, tarfile.AREGTYPE}
EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE}
LONG = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
REFUSED = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Member(NamedTuple):
    """A file in an archive. start: of its first header; offset: of its bytes; fault: why not."""

    name: str
    start: int
    offset: int
    size: int
    fault: str = ""

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // BLOCK) * BLOCK


class Span(NamedTuple):
    """A sample: where it lies, and its members by their extension, in small letters.

    Where fault is not empty it is the reason why the sample cannot be used; without a key the
    fault is the archive's own.
    """

    key: str
    start: int
    end: int
    members: dict[str, Member]
    fault: str = ""


class _DamagedError(Exception):
    """The archive cannot be followed any further."""


def spans(file: BufferedIOBase, size: int) -> Iterator[Span]:
    """The samples of an archive of so many bytes. It is cut into samples as WebDataset does."""
    current: Span | None = None
    for member in members(file, size):
        named = NAME.fullmatch(member.name)
        if member.name and (named is None or META.match(member.name)):
            if not member.fault:
                continue
            named = None
        key, extension = (named[1], named[2].lower()) if named else (member.name, "")
        if current is not None and (key != current.key or not key):
            yield current
            current = None
        if current is None:
            current = Span(key, member.start, member.end, {})
        fault = current.fault or member.fault
        if not fault and extension in current.members:
            fault = f"two members .{extension}"
        if not fault and member.end - current.start > MOST:
            fault = f"{member.end - current.start:,} bytes: {MOST:,} at most"
        if not fault and len(current.members) == MEMBERS_MOST:
            fault = f"more than {MEMBERS_MOST} members"
        together = current.members if fault else current.members | {extension: member}
        current = Span(key, current.start, member.end, together, fault)
    if current is not None:
        yield current


def members(file: BufferedIOBase, size: int) -> Iterator[Member]:
    """The files of an archive. What is wrong with it is the fault of a last, unnamed one."""
    place = 0
    try:
        while True:
            member, place = _next(file, place, size)
            if member is None:
                return
            if member.offset + member.size > size:
                member = member._replace(size=0, fault="cut short: the archive ends in it")
                yield member
                raise _DamagedError(f"cut short in {printed(member.name)}")
            if member.name:
                yield member
    except _DamagedError as error:
        yield Member("", place, place, 0, str(error))


def _next(file: BufferedIOBase, place: int, size: int) -> tuple[Member | None, int]:
    """The file whose headers begin here, unnamed if it is none, and where the next one's do."""
    start, said, fault = place, dict[str, str](), ""
    while True:
        info = _header(file, place, size, started=place > start)
        if info is None:
            return None, place
        place += BLOCK
        if info.size < 0:
            raise _DamagedError(f"a negative size at byte {place - BLOCK:,}")
        if len(said) > RECORDS_MOST:
            raise _DamagedError(f"more than {RECORDS_MOST:,} extended headers at byte {start:,}")
        if info.type not in EXTENDED | LONG:
            break
        if info.size > LONGEST:
            fault = f"a header of {info.size:,} bytes: {LONGEST:,} at most"
        elif info.type != tarfile.GNUTYPE_LONGLINK:
            file.seek(place)
            found = _said(info, file.read(info.size))
            if info.type == tarfile.XGLTYPE and {"path", "size"} & found.keys():
                raise _DamagedError("a global header names every file the same")
            said |= found if info.type != tarfile.XGLTYPE else {}
        place += -(-info.size // BLOCK) * BLOCK
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise _DamagedError(f"a sparse file at byte {start:,}")
    name = said.get("path", info.name)
    length = _number(said["size"]) if "size" in said else info.size
    fault = fault or refusal(name, info.type, length, said)
    if info.isdir():
        return Member("", start, place, 0), place
    # As tar does: a link or a device has no bytes of its own, whatever its size says.
    member = Member(name or "?", start, place, 0 if info.type in REFUSED else length, fault)
    return member, member.end


def _header(
    file: BufferedIOBase, place: int, size: int, *, started: bool
) -> tarfile.TarInfo | None:
    """One block of a header; None at the archive's end."""
    if place > size:
        raise _DamagedError("cut short in a header")
    file.seek(place)
    block = file.read(BLOCK)
    if block == bytes(BLOCK) and not started:
        if file.read(LONGEST).strip(b"\0"):
            raise _DamagedError(f"more lies behind its end at byte {place:,}")
        return None
    if not block and place == size:
        raise _DamagedError("ends without an end mark: it may be cut short")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        raise _DamagedError(
            f"no tar header at byte {place:,}; what follows is left out" if place else
            "no tar archive (a compressed one must be unpacked first)"
        ) from None  # fmt: skip


def _said(info: tarfile.TarInfo, data: bytes) -> dict[str, str]:
    """What an extended header says of the next file."""
    if len(data) < info.size:
        raise _DamagedError("cut short in a header")
    if info.type in LONG:
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    found, place = {}, 0
    while place < len(data.rstrip(b"\0")):
        head = RECORD.match(data, place)
        end = place + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _DamagedError("an extended header that cannot be read")
        key = head[2].decode("utf-8", "surrogateescape")
        found[key] = data[head.end() : end - 1].decode("utf-8", "surrogateescape")
        place = end
    return found


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise _DamagedError("a size that is no number")
    return int(text)


def refusal(name: str, kind: bytes, size: int, said: dict[str, str]) -> str:
    """Why a file of this name, type and size is not wanted; empty if it is."""
    if name.startswith("/") or ".." in name.split("/"):
        return "a name outside the archive"
    if "\0" in name or not 0 < len(name) <= NAME_MOST:
        return f"a name of {len(name)} letters: 1 to {NAME_MOST}, none of them zero"
    if any(key.startswith("GNU.sparse") for key in said):
        return "a sparse file"
    if kind != tarfile.DIRTYPE and kind not in PLAIN:
        return REFUSED.get(kind, "no plain file")
    return f"{size:,} bytes: {MOST:,} at most" if size > MOST else ""


def printed(name: str, most: int = SHOWN) -> str:
    """A name in one line of so many letters, whatever they are."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:most])
    return line if len(name) <= most else f"{line}..."
