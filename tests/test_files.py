"""Files and folders at the edge: bounded reads, whole writes, one writer at a time."""

import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from minidiffusion import files
from minidiffusion.files import claimed, draft_of, locked, read_bounded, sweep, whole_file


def test_a_read_has_a_bound(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(ValueError, match="f: larger than 4 bytes"):
        read_bounded(file, 4)
    os.truncate(file, 10 * 2**30)  # takes no room on the disk
    with pytest.raises(ValueError, match="f: larger than 1,000 bytes"):
        read_bounded(file, 1000)


def test_a_pipe_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero", "/dev/full", "/dev/null"):
        with pytest.raises(ValueError, match="a device or a pipe, not a file"):
            read_bounded(name, 100)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none", 100)
    with pytest.raises(IsADirectoryError):
        read_bounded(tmp_path, 100)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path, fresh: bool) -> None:
    path = tmp_path / "f"
    with whole_file(path, fresh=fresh) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_fresh_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(FileExistsError), whole_file(path, fresh=True):
            pass
        # The second time as on a file system without links.
        monkeypatch.setattr(Path, "hardlink_to", Mock(side_effect=PermissionError(1, "links")))
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]
    with whole_file(tmp_path / "g", fresh=True) as file:
        file.write(b"new")
    assert (tmp_path / "g").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


def test_the_longest_name_has_a_draft(tmp_path: Path) -> None:
    with whole_file(tmp_path / ("n" * 255)) as file:
        file.write(b"x")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_drafts_of_the_dead_are_swept(tmp_path: Path) -> None:
    """Not those of the living, nor young ones, nor what only looks like one."""
    dead, folder, young = (draft_of(tmp_path / name) for name in ("dead", "folder", "young"))
    other = tmp_path / ".tmp-mine"
    folder.mkdir()
    for path in (dead, folder / "part", other, young):
        path.write_bytes(b"x")
    with whole_file(tmp_path / "alive") as file:
        file.write(b"x")
        for path in tmp_path.iterdir():
            if path != young:
                os.utime(path, (0, time.time() - 60))
        sweep(tmp_path)
        assert not dead.exists() and not folder.exists() and young.exists() and other.exists()
    assert (tmp_path / "alive").exists()
    sweep(tmp_path / "none")


def elsewhere(folder: Path) -> str:
    """What a claim of another process comes to."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with claimed(folder):
                os.write(write, b"in")
        except ValueError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return file.read()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        assert elsewhere(folder).startswith(f"{folder}: another process is writing there; ")
        with claimed(folder):  # of the same process claims nest
            pass
        (folder / "kept").touch()
        assert elsewhere(folder).startswith(f"{folder}: another process")
        assert elsewhere(tmp_path / "other") == "in"
    assert elsewhere(folder) == "in" and (folder / "kept").exists()
    assert not files._HELD and not files._CLAIMED


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_dead_writer_s_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As a data worker that outlives the training process, which was killed."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with claimed(tmp_path):
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
            signal.pause()
    child = int(os.read(read, 20))
    try:
        assert "another process" in elsewhere(tmp_path)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(child, 0)  # it lives
        assert elsewhere(tmp_path) == "in"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_new_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old"), claimed(tmp_path / "new"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.fcntl, "flock", Mock(side_effect=OSError(9, "Bad file descriptor")))
    with locked(tmp_path) as granted, whole_file(tmp_path / "f") as file:
        assert not granted
        with pytest.warns(UserWarning, match="no locks: see that nothing else"), claimed(tmp_path):
            file.write(b"x")
        (draft,) = tmp_path.glob(".tmp-*")
        os.utime(draft, (0, 0))  # of a writer that is dead, or waits: nobody can tell
        sweep(tmp_path)
        assert draft.exists()
    assert (tmp_path / "f").read_bytes() == b"x"
    monkeypatch.setattr(files.fcntl, "flock", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass
