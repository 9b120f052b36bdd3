"""Files and folders: read with a bound, written whole or not at all, by one writer at a time."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

DRAFT = ".tmp-"
LEFT = re.compile(r"\.tmp-[0-9a-f]{8}-.+")
"""Drafts of `whole_file` and `draft_of`; what else begins like one is not touched by `sweep`."""
YOUNG = 10.0
"""Seconds in which a draft may not be locked yet."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What a file system without hard links answers."""
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system without locks answers; NFS has none of what is opened to be read only."""


def is_endless(path: Path) -> bool:
    """A device or a pipe: reading it may wait for ever, or never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def read_bounded(path: str | Path, most: int) -> bytes:
    """A whole file. Raises ValueError for one of more than ``most`` bytes, a device or a pipe;
    OSError where it cannot be opened."""
    path = Path(path)
    if is_endless(path):
        raise ValueError(f"{path}: a device or a pipe, not a file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: larger than {most:,} bytes")
    return data


def draft_of(path: Path) -> Path:
    """Where a file or a folder is written until it is whole."""
    return path.with_name(f"{DRAFT}{secrets.token_hex(4)}-{path.name[:100]}")


@contextmanager
def whole_file(path: Path, *, sync: bool = True, fresh: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when the block ends without an error.

    sync: a power cut does not undo it either. fresh: FileExistsError, at the end, where a file of
    this name is there by then; without hard links a kill in between leaves it empty. An OSError of
    the disk, which names no file, names this one.
    """
    draft = draft_of(path)
    try:
        with draft.open("xb") as file:
            _mark(file.fileno())
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        # Closed before it takes the name: some file systems report a full disk only then.
        (_link if fresh else os.replace)(draft, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        draft.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def _link(draft: Path, path: Path) -> None:
    try:
        path.hardlink_to(draft)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        path.touch(exist_ok=False)  # a file system without links: takes the name first
        draft.replace(path)


def sync_folder(folder: Path) -> None:
    """A name in a folder survives a power cut only once the folder itself is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the drafts of writers that were killed; those of living ones are locked, or young.

    Where the file system has no locks, nobody can tell them apart: they stay.
    """
    for draft in folder.glob(f"{DRAFT}*") if folder.is_dir() else ():
        with suppress(OSError):
            if not LEFT.fullmatch(draft.name) or time.time() - draft.stat().st_mtime < YOUNG:
                continue
            with locked(draft, wait=False) as granted:
                if not granted:
                    continue
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def _mark(handle: int) -> None:
    """Says that a draft's writer lives; not where the file system knows no locks."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """One at a time in a folder or a file; BlockingIOError where another is and ``wait`` is false.

    The kernel drops the lock of a process that is killed, whatever it was doing. Yields False on a
    file system that has no locks: there nobody is kept out.
    """
    handle, granted = os.open(path, os.O_RDONLY), True
    try:
        _HELD.add(handle)
        _follow_forks()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            granted = False
        yield granted
    finally:
        if handle in _HELD:  # not in a forked child, which has closed it
            _HELD.discard(handle)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """This process writes in a folder, which is made, and no other does meanwhile; claims nest.

    Raises ValueError where another process is at work, and warns where the file system has no locks
    to tell. A new folder that stays empty goes again.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    with ExitStack() as stack:
        if place not in _CLAIMED:
            try:
                if not stack.enter_context(locked(place, wait=False)):
                    warnings.warn(
                        f"{folder}: this file system has no locks: see that nothing else writes "
                        "there", stacklevel=4,
                    )  # fmt: skip
            except BlockingIOError:
                raise ValueError(
                    f"{folder}: another process is writing there; wait for its end, or name "
                    "another folder"
                ) from None
        _CLAIMED.append(place)
        try:
            yield
        finally:
            if place in _CLAIMED:
                _CLAIMED.remove(place)
            if new:
                with suppress(OSError):
                    folder.rmdir()


_HELD: set[int] = set()
"""Handles of locks."""
_CLAIMED: list[Path] = []
"""Folders that this process has claimed, each as often as it has."""


@cache
def _follow_forks() -> None:
    """A forked child, such as a data worker, must not keep a lock that its dead parent held."""

    def close() -> None:
        for handle in _HELD:
            os.close(handle)
        _HELD.clear()
        _CLAIMED.clear()

    os.register_at_fork(after_in_child=close)
