"""The download verb and a stand-in of the hub on loopback: whole, cut, damaged, locked, away."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants

from minidiffusion.checkpoints import hub, releases
from minidiffusion.cli.main import main

COMMIT, TOKEN = "c0ffee" * 6 + "abcd", "hf_secret"
REPOSITORY, FILE, KEPT = "someone/tiny", "tiny.safetensors", 128 * 1024
DATA = b"".join(hashlib.sha256(b"%d" % k).digest() for k in range(20_000))  # 640 kB
SHA = hashlib.sha256(DATA).hexdigest()


class Request(NamedTuple):
    method: str
    path: str
    start: int
    token: str | None
    sent: int


class Hub(ThreadingHTTPServer):
    """One repository. What is set on it makes it misbehave; ``requests`` is what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {FILE: DATA}
        self.requests: list[Request] = []
        self.etag = self.cdn = ""
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.cut, self.broken = 0, 0  # bytes until the line is cut; status of what follows
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def served(self) -> int:
        return sum(request.sent for request in self.requests if request.method == "GET")


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply(self.server)

    do_GET = do_HEAD  # noqa: N815

    def head(self, status: int, sent: int = 0, **fields: object) -> None:
        token = self.headers.get("Authorization")
        request = Request(self.command, self.path, self.start(), token, sent)
        self.server.requests.append(request)  # before an answer: the client may be done with it
        self.send_response(status)
        for name, value in {"Content_Length": 0, **fields}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def start(self) -> int:
        return int(re.sub(r"\D", "", self.headers.get("Range", "0")))

    def reply(self, hub: Hub) -> None:
        path = self.path.split("?")[0]
        found = re.fullmatch(rf"/(?:cdn|{REPOSITORY}/resolve/(?:main|{COMMIT}))/(.+)", path)
        if hub.refusal:
            self.head(hub.refusal[0], **hub.refusal[1])
        elif path == f"/api/models/{REPOSITORY}/tree/main":
            rows = [{"type": "file", "oid": "0", "size": 1, "path": file} for file in hub.files]
            text = json.dumps(rows).encode()
            self.head(200, Content_Type="application/json", Content_Length=len(text))
            self.wfile.write(text)
        elif not path.startswith((f"/{REPOSITORY}/", "/cdn/")):
            self.head(404, X_Error_Code="RepoNotFound")
        elif not found or found[1] not in hub.files:
            self.head(404, X_Error_Code="EntryNotFound")
        else:
            self.content(hub, found[1])

    def content(self, hub: Hub, name: str) -> None:
        data, start, body = hub.files[name], self.start(), self.command == "GET"
        etag = hub.etag or hashlib.sha256(data).hexdigest()
        facts = {"X_Repo_Commit": COMMIT, "X_Linked_Etag": f'"{etag}"', "X_Linked_Size": len(data)}
        if hub.cdn:
            return self.head(302, Location=f"{hub.cdn}/cdn/{name}", **facts)
        if body and hub.broken:
            return self.head(hub.broken)
        facts |= {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        facts |= {"ETag": '"own"', "Content_Length": len(data) - start}
        rest = data[start:] if body else b""
        if body and hub.cut:
            rest, hub.cut, hub.broken = rest[: hub.cut], 0, 503
            self.close_connection = True
        self.head(206 if start else 200, len(rest), **facts)
        self.wfile.write(rest)
        return None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", KEPT)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    yield server
    server.shutdown()
    server.server_close()


Words = Callable[..., str]
NAME = f"{REPOSITORY}:{FILE}"
PATH = Path("models") / FILE


def left() -> list[str]:
    """What stands below the working folder."""
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_whole_file(stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", NAME]) == 0
    said = capsys.readouterr()
    assert PATH.read_bytes() == DATA and left() == [str(PATH)]
    assert said.out.splitlines() == [
        REPOSITORY,
        f"{PATH}  640,000 bytes, SHA-256 fits",
        f'next: minidiffusion generate "a cat in a hat" --model {PATH}',
    ]
    assert stand_in.served() == len(DATA)
    assert f"/{REPOSITORY}/resolve/{COMMIT}/{FILE}" in {r.path for r in stand_in.requests}
    assert {request.token for request in stand_in.requests} == {None}


def test_the_one_file_of_a_repository(stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.files["README.md"] = b"words"
    assert main(["download", REPOSITORY, "--out", "a b/c"]) == 0
    assert left() == [f"a b/c/{FILE}"]
    assert f"--model 'a b/c/{FILE}'\n" in capsys.readouterr().out


def test_a_folder_of_parts(stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("model_index.json", "unet/config.json", "unet/model.safetensors", "vae/config.json")
    stand_in.files = {part: f"the content of {part}".encode() for part in parts}
    assert main(["download", REPOSITORY]) == 0
    assert left() == sorted(f"models/tiny/{part}" for part in parts)
    assert all(Path("models/tiny", p).read_bytes() == d for p, d in stand_in.files.items())
    assert capsys.readouterr().out.endswith("--model models/tiny\n")


def test_the_token_goes_to_the_hub_and_no_further(
    stand_in: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    store = Hub()
    stand_in.cdn = store.address
    assert main(["download", NAME]) == 0 and PATH.read_bytes() == DATA
    assert {request.token for request in stand_in.requests} == {f"Bearer {TOKEN}"}
    assert [request.token for request in store.requests] == [None]
    store.shutdown()
    store.server_close()


def test_a_token_on_the_disk_is_not_used(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "token")
    assert main(["download", NAME]) == 0
    assert {request.token for request in stand_in.requests} == {None}


def test_a_cut_line_is_taken_up_by_the_next_call(stand_in: Hub, refused: Words) -> None:
    stand_in.cut = 3 * KEPT + 1000
    line = refused("download", NAME)
    assert "the hub answered 503; try later, the same command goes on" in line
    (part,) = left()
    assert part.endswith(".part") and Path(part).read_bytes() == DATA[: 3 * KEPT]
    stand_in.broken = 0
    stand_in.requests.clear()
    assert main(["download", NAME]) == 0
    assert PATH.read_bytes() == DATA and left() == [str(PATH)]
    assert stand_in.served() == len(DATA) - 3 * KEPT
    assert [r.start for r in stand_in.requests if r.method == "GET"] == [3 * KEPT]


def test_a_cut_line_is_taken_up_within_a_call(
    stand_in: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mended(seconds: float) -> None:
        stand_in.broken = 0

    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", mended)
    stand_in.cut = 3 * KEPT
    assert main(["download", NAME]) == 0 and PATH.read_bytes() == DATA
    assert [r.start for r in stand_in.requests if r.method == "GET"] == [0, 3 * KEPT]


def test_a_part_of_another_version_is_not_continued(stand_in: Hub, refused: Words) -> None:
    stand_in.cut = 3 * KEPT
    refused("download", NAME)
    stand_in.broken, stand_in.files[FILE] = 0, DATA[::-1]
    assert main(["download", NAME]) == 0 and PATH.read_bytes() == DATA[::-1]


@pytest.mark.parametrize("begun", [0, 1000, len(DATA), len(DATA) + 1])
def test_a_part_that_is_too_long_or_wrong(stand_in: Hub, refused: Words, begun: int) -> None:
    part = hub.draft(hub.Remote("", len(DATA), SHA, PATH))
    part.parent.mkdir()
    part.write_bytes(b"x" * begun)
    if begun in (1000, len(DATA)):
        line = refused("download", NAME)
        assert f"{FILE}." in line and ".damaged: came damaged: its SHA-256 is" in line
        assert f"the hub states {SHA}" in line and not PATH.exists()
    assert main(["download", NAME]) == 0 and PATH.read_bytes() == DATA


def test_a_wrong_checksum_is_named_and_nothing_is_removed(stand_in: Hub, refused: Words) -> None:
    stand_in.etag = "0" * 64
    PATH.parent.mkdir()
    PATH.write_bytes(b"mine")
    line = refused("download", NAME, "--force")
    bad = f"{PATH}.{SHA[:8]}.damaged"
    assert line == (
        f"{bad}: came damaged: its SHA-256 is {SHA}, the hub states {'0' * 64}; "
        "the same command fetches it anew"
    )
    assert left() == [str(PATH), bad]
    assert Path(bad).read_bytes() == DATA and PATH.read_bytes() == b"mine"


def test_a_small_file_has_git_s_checksum(
    stand_in: Hub, refused: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.etag = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
    assert main(["download", NAME]) == 0 and "bytes, SHA-1 fits" in capsys.readouterr().out
    stand_in.files[FILE] = b"x" * len(DATA)
    assert "is another file than the hub's" not in refused("download", NAME, "--out", "other")
    stand_in.etag = "opaque"
    assert main(["download", NAME, "--out", "third"]) == 0
    assert "bytes, the hub states no checksum: its size fits" in capsys.readouterr().out


def test_what_is_here_is_not_fetched_again(
    stand_in: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", NAME]) == main(["download", NAME, "--force"]) == 0
    assert "640,000 bytes, is there already, SHA-256 fits" in capsys.readouterr().out
    assert stand_in.served() == len(DATA)


@pytest.mark.parametrize("content", [b"mine", DATA[::-1]])
def test_what_is_in_the_way_stays_without_force(
    stand_in: Hub, refused: Words, content: bytes
) -> None:
    PATH.parent.mkdir()
    PATH.write_bytes(content)
    line = refused("download", NAME)
    assert line == (
        f"{PATH}: is there already and is another file than the hub's; --force replaces it, "
        "--out names another folder"
    )
    assert PATH.read_bytes() == content and left() == [str(PATH)] and stand_in.served() == 0
    assert main(["download", NAME, "--force"]) == 0 and PATH.read_bytes() == DATA


def test_a_known_checksum(
    stand_in: Hub, refused: Words, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = releases.Row(REPOSITORY, (FILE,), "Some Licence", 4.2, sha256="1" * 64)
    monkeypatch.setitem(releases.MODELS, "tiny", row)
    line = refused("download", "tiny")
    assert line.endswith(f"not the file that was published: SHA-256 {SHA}, expected {'1' * 64}")
    assert stand_in.served() == 0 and not left()
    monkeypatch.setitem(releases.MODELS, "tiny", row._replace(sha256=SHA))
    assert main(["download", "tiny"]) == 0
    stand_in.refusal = (500, {})  # not even asked
    assert main(["download", "tiny"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{REPOSITORY}, 4.2 GB, Some Licence\n") and "is there already" in said


GATED = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model is restricted."}
INVALID = {"X_Error_Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("refusal", "token", "words"),
    [
        ((403, GATED), TOKEN, "HF_TOKEN is set, but its account has not accepted it"),
        ((401, GATED), "", "then set HF_TOKEN to a token of your account"),
        ((401, INVALID), TOKEN, "the hub does not know this HF_TOKEN"),
        ((401, {"X_Error_Code": "RepoNotFound"}), "", "no such repository at http://127.0.0.1"),
        ((403, {}), TOKEN, "the hub forbids it (403)"),
        ((404, {"X_Error_Code": "RevisionNotFound"}), "", "the hub answered 404"),
        ((500, {}), "", "the hub answered 500; try later"),
    ],
)
def test_closed_doors(
    stand_in: Hub, refused: Words, monkeypatch: pytest.MonkeyPatch,
    refusal: tuple[int, dict[str, str]], token: str, words: str,
) -> None:  # fmt: skip
    stand_in.refusal = refusal
    monkeypatch.setenv("HF_TOKEN", token)
    for name in (NAME, REPOSITORY):
        line = refused("download", name)
        assert line.startswith(f"{REPOSITORY}: ") and words in line
        assert ("must be accepted first at" in line) == (refusal[1] == GATED)
        assert f"{stand_in.address}/{REPOSITORY}" in line or refusal[1] != GATED
        assert TOKEN not in line and not left() and not Path("models").exists()


def test_a_licence_that_is_known_is_named(
    stand_in: Hub, refused: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.refusal = (401, {"X_Error_Code": "RepoNotFound"})  # as the hub hides some
    line = refused("download", "sd3.5-medium")
    assert "its licence (Stability AI Community License) must be accepted first at" in line
    assert "no such repository" in refused("download", "sd2.1") and "withdrawn" in refused(
        "download", "sd2.1"
    )


def test_what_the_hub_does_not_have(stand_in: Hub, refused: Words) -> None:
    line = refused("download", f"{REPOSITORY}:other.safetensors")
    assert line.startswith(f"{REPOSITORY}: has no file other.safetensors; see {stand_in.address}")
    assert "no such repository" in refused("download", "some/other:a.ckpt")
    stand_in.files["b.safetensors"] = b"b"
    assert f"which file? {REPOSITORY}:FILE, FILE one of b.safe" in refused("download", REPOSITORY)
    stand_in.files = {"README.md": b""}
    assert "holds no model that could be loaded" in refused("download", REPOSITORY)
    stand_in.files = {"../../evil.safetensors": b"", "../evil.ckpt": b""}
    assert refused("download", REPOSITORY) and not left()


def test_no_hub_behind_the_address(
    stand_in: Hub, refused: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.refusal = (200, {"Content_Type": "text/html"})
    assert "its answer is not a hub's" in refused("download", NAME)
    with socket.socket() as free:  # bound and not listening: nobody answers there
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}/")
        line = refused("download", NAME)
        assert "not reached, or cut off" in line and "offline?" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused("download", NAME)
    assert line == f"{REPOSITORY}: HF_HUB_OFFLINE is set, so nothing is fetched"
    assert not left()


def test_no_space(stand_in: Hub, refused: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: Usage())
    line = refused("download", NAME)
    assert line.startswith("models: 0.00 GB are to be fetched, 0.00 GB are free")
    assert stand_in.served() == 0 and not Path("models").exists()


def test_a_disk_that_is_full_all_the_same(
    stand_in: Hub, refused: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert refused("download", NAME) == f"{FILE}: No space left on device"


def test_two_downloads_do_not_write_one_file(stand_in: Hub, refused: Words) -> None:
    fcntl = pytest.importorskip("fcntl")
    part = hub.draft(hub.Remote("", len(DATA), SHA, PATH))
    part.parent.mkdir()
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refused("download", NAME) == f"{part}: another download is writing it"
    assert main(["download", NAME]) == 0


def test_mistakes_that_need_no_hub(refused: Words, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "give a model, such as sd1.5" in refused("download")
    assert "did you mean sd1.5?" in refused("download", "sd15")
    assert "a file is in the way" in refused("download", NAME, "--out", tmp_path / "file")
    assert "not the name of a file" in refused("download", "a/b:../../c")


def test_the_extra_is_named_where_it_is_missing(
    refused: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    line = refused("download", "sd1.5")
    assert line == "download needs huggingface_hub: pip install 'minidiffusion[hub]'"


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(releases.MODELS)
    assert all(
        row.repository in line for row, line in zip(releases.MODELS.values(), lines, strict=True)
    )


def test_as_a_user_runs_it(stand_in: Hub, tmp_path: Path) -> None:
    """In a process of its own, where the library reads the environment at its import."""
    stand_in.files[FILE] = data = DATA * 40  # two and a half of the pieces that the library writes
    stand_in.cut = 24 * 2**20
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "minidiffusion", "download", NAME]
        return subprocess.run(
            words, env={**environment, **more}, capture_output=True, text=True, cwd=tmp_path
        )

    away = run(HF_HUB_OFFLINE="1")
    assert (away.returncode, away.stderr.count("\n")) == (2, 1) and "HF_HUB_OFFLINE" in away.stderr
    cut = run()
    assert cut.returncode == 2 and "the hub answered 503" in cut.stderr
    assert "Traceback" not in cut.stderr and cut.stderr.count("\n") == 1
    stand_in.broken = 0
    stand_in.requests.clear()
    done = run()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / PATH).read_bytes() == data
    assert stand_in.served() == len(data) - 20 * 2**20
