"""Files from the Hugging Face hub, whole or not at all.

A download goes on where an earlier one was cut, is checked against the SHA-256 that the hub states,
and takes its name only then. The token is that of the environment, HF_TOKEN, and no other. The
library huggingface_hub is the optional extra "hub", and is imported only where it is needed.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minidiffusion.checkpoints.releases import GONE, MODELS, Row, choose, find

HUB = "https://huggingface.co"
KINDS = {64: "SHA-256", 40: "SHA-1"}
SPARE = 64 * 2**20
"""Bytes that a disk must keep free beside what is fetched."""


class Remote(NamedTuple):
    """A file as the hub describes it. etag: SHA-256 of a large file, git's SHA-1 of a small one."""

    url: str
    size: int
    etag: str
    target: Path


class Fetched(NamedTuple):
    """A file that is here. fresh: it was not before. checked: against which checksum, or none."""

    path: Path
    size: int
    fresh: bool
    checked: str


def fetch(name: str, folder: Path | str, *, force: bool = False) -> list[Fetched]:
    """The files of a model, in ``folder`` (or in folder/NAME where they are several), checked.

    What was fetched before and is whole is not fetched again. Raises ValueError for an unknown
    name, a licence that is not accepted, a file in the way (``force`` replaces it), a wrong
    checksum; OSError where the hub cannot be reached or the disk is too small.
    """
    row, folder = find(name), Path(folder)
    if len(row.files) == 1 and row.sha256:  # nobody need be asked
        target = folder / row.files[0]
        if target.is_file() and checksum(target, row.sha256) == row.sha256:
            return [Fetched(target, target.stat().st_size, False, "SHA-256")]
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    token = os.environ.get("HF_TOKEN", "").strip() or False
    with explained(row, endpoint):
        files = row.files or choose(row.repository, files_of(row.repository, endpoint, token))
    last = row.repository.rpartition("/")[2]
    place = folder if len(files) == 1 else folder / (name if name in MODELS else last)
    remotes = []
    for file in files:
        with explained(row, endpoint, file):
            remotes.append(ask(row, file, endpoint, token, place))
    here = {remote for remote in remotes if is_here(remote, force)}
    make_room(folder, [remote for remote in remotes if remote not in here])
    for remote in remotes:
        if remote not in here:
            with explained(row, endpoint, remote.target.name):
                download(remote, token)
    return [Fetched(r.target, r.size, r not in here, KINDS.get(len(r.etag), "")) for r in remotes]


def files_of(repository: str, endpoint: str, token: str | bool) -> list[str]:
    from huggingface_hub import HfApi

    return sorted(HfApi(endpoint=endpoint, token=token).list_repo_files(repository))


def ask(row: Row, file: str, endpoint: str, token: str | bool, place: Path) -> Remote:
    """Where a file lies on the hub, pinned to the commit of this moment."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(row.repository, file, endpoint=endpoint)
    facts = get_hf_file_metadata(url, token=token, endpoint=endpoint)
    if facts.commit_hash is None or facts.etag is None or facts.size is None:
        raise ConnectionError(f"{endpoint}: its answer is not a hub's (a login page, a proxy?)")
    etag = facts.etag.lower()
    if row.sha256 and KINDS.get(len(etag)) == "SHA-256" and etag != row.sha256:
        raise ValueError(
            f"{row.repository}: {file} is not the file that was published: SHA-256 {etag}, "
            f"expected {row.sha256}"
        )
    pinned = hf_hub_url(row.repository, file, revision=facts.commit_hash, endpoint=endpoint)
    return Remote(pinned, facts.size, etag, place / file)


def checksum(path: Path, etag: str) -> str:
    """Of a file, of the kind that the hub states; where it states none, the etag itself."""
    with path.open("rb") as file:
        if len(etag) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        if len(etag) == 40:  # git's own: of a header and the content
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            digest.update(file.read())
            return digest.hexdigest()
    return etag


def is_here(remote: Remote, force: bool) -> bool:
    target = remote.target
    if not target.exists():
        return False
    if not target.is_file():
        raise ValueError(f"{target}: a folder is in the way")
    if target.stat().st_size == remote.size and checksum(target, remote.etag) == remote.etag:
        return True
    if not force:
        raise ValueError(
            f"{target}: is there already and is another file than the hub's; --force replaces it, "
            "--out names another folder"
        )
    return False


def draft(remote: Remote) -> Path:
    """What is fetched of this very content lies here until it is whole."""
    mark = hashlib.sha256(remote.etag.encode()).hexdigest()[:8]
    return remote.target.with_name(f"{remote.target.name}.{mark}.part")


def make_room(folder: Path, remotes: Sequence[Remote]) -> None:
    parts = [(remote.size, draft(remote)) for remote in remotes]
    missing = sum(size - (part.stat().st_size if part.exists() else 0) for size, part in parts)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if missing and missing + SPARE > free:
        raise OSError(
            f"{folder}: {missing / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free; "
            "--out names a folder on another disk"
        )


def download(remote: Remote, token: str | bool) -> None:
    """Fetch, or go on, check, and only then give the file its name. The library resumes within a
    call; across calls it would start anew, so the part is kept and continued here."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part = draft(remote)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        claim(file, part)
        if file.tell() > remote.size:
            file.seek(0)
            file.truncate()
        # The address redirects to a signed one of another host, which does not get the token.
        http_get(
            remote.url, file, resume_size=file.tell(), expected_size=remote.size,
            headers=build_hf_headers(token=token), displayed_filename=remote.target.name,
        )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    found = checksum(part, remote.etag)
    if found != remote.etag:
        bad = remote.target.with_name(f"{remote.target.name}.{found[:8]}.damaged")
        part.replace(bad)
        raise ValueError(
            f"{bad}: came damaged: its {KINDS[len(found)]} is {found}, the hub states "
            f"{remote.etag}; the same command fetches it anew"
        )
    part.replace(remote.target)


def claim(file: BinaryIO, path: Path) -> None:
    """Two downloads must not write one file: the second would go on behind the first one's back."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another download is writing it") from None


@contextmanager
def explained(row: Row, endpoint: str, file: str = "") -> Iterator[None]:
    """The library's errors, of many lines, in one line that says what to do."""
    from huggingface_hub import errors

    # Of the HTTP library beneath, which has changed its name between versions.
    transport: type[BaseException] = errors.HTTPError  # type: ignore[attr-defined]

    where, page = row.repository, f"{endpoint}/{row.repository}"
    mirror = f" ({row.note})" if row.note == GONE else ""
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ConnectionError(f"{where}: HF_HUB_OFFLINE is set, so nothing is fetched") from None
    except errors.GatedRepoError:
        raise ValueError(locked(row, page)) from None
    except errors.RepositoryNotFoundError:
        if row.gated:
            raise ValueError(locked(row, page)) from None
        raise ValueError(
            f"{where}: no such repository at {endpoint}, or a private one that HF_TOKEN does not "
            f"open{mirror}"
        ) from None
    except errors.EntryNotFoundError:
        raise ValueError(f"{where}: has no file {file}; see {page}/tree/main{mirror}") from None
    except errors.HfHubHTTPError as error:
        raise ValueError(refused(where, endpoint, error.response.status_code)) from None
    except transport as error:
        what = str(error) or type(error).__name__
        raise ConnectionError(
            f"{endpoint}: not reached, or cut off ({what}); offline? The same command goes on "
            "where it stopped"
        ) from None
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, file) from error
        if "Consistency check" not in str(error):
            raise
        raise ConnectionError(
            f"{where}: {file} was cut short; the same command goes on where it stopped"
        ) from None


def locked(row: Row, page: str) -> str:
    licence = f"its licence ({row.licence})" if row.licence else "its licence"
    state = (
        "HF_TOKEN is set, but its account has not accepted it or the token may not read it"
        if os.environ.get("HF_TOKEN", "").strip()
        else "then set HF_TOKEN to a token of your account"
    )
    return f"{row.repository}: {licence} must be accepted first at {page} by signing in; {state}"


def refused(where: str, endpoint: str, status: int) -> str:
    if status == 401:
        return f"{where}: the hub does not know this HF_TOKEN; {endpoint}/settings/tokens makes one"
    if status == 403:
        return f"{where}: the hub forbids it (403): HF_TOKEN may not read this repository"
    later = "; try later, the same command goes on" if status == 429 or status >= 500 else ""
    return f"{where}: the hub answered {status}{later}"
