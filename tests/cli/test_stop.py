"""Signals and second writers: a run that is stopped goes on, one folder has one writer."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from minidiffusion.checkpoints import snapshot
from minidiffusion.cli import logs, runfolder, sample
from minidiffusion.cli.main import main
from minidiffusion.files import locked
from minidiffusion.training.loop import Report

MODEL = "model.safetensors"


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process signal itself while a step is being logged."""

    def at(step: int, *signals: signal.Signals) -> None:
        add = logs.Log.add

        def noted(log: logs.Log, report: Report) -> None:
            add(log, report)
            for one in signals if report.step == step else ():
                os.kill(os.getpid(), one)

        monkeypatch.setattr(logs.Log, "add", noted)

    return at


def steps(run: Path) -> list[int]:
    return sorted(step for step, _, _ in snapshot.listing(run / "checkpoints"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_same_end(
    shelf: Path, tmp_path: Path, signalled: Callable, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int,
) -> None:  # fmt: skip
    run, before = tmp_path / "my run", signal.getsignal(sent)
    signalled(3, sent)
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(run)]) == code
    assert signal.getsignal(sent) is before
    assert steps(run) == [2, 3] and not (run / MODEL).exists()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"minidiffusion: stopped: minidiffusion train --resume '{run}' goes on"
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / MODEL).read_bytes() == (shelf / "toy" / MODEL).read_bytes()


def test_a_signal_in_the_last_step_comes_too_late(
    shelf: Path, tmp_path: Path, signalled: Callable
) -> None:
    """The run has its length and its model: there is nothing to go on with."""
    signalled(6, signal.SIGTERM)
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / MODEL).read_bytes() == (shelf / "toy" / MODEL).read_bytes()


def test_a_run_that_stood_aside_when_its_successor_was_killed(
    shelf: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """--force had put it into a hidden folder; whatever is called next finds it in its place."""
    run, whole = tmp_path / "run", shelf / "toy"
    shutil.copytree(whole, run)
    aside = run / ".replaced-x"
    aside.mkdir()
    for path in runfolder.left(run):
        path.rename(aside / path.name)
    (run / "checkpoints").mkdir()  # of the successor, before its recipe was written
    assert "holds a run already" in refused("train", shelf / "toy.yaml", "--out", run)
    assert not aside.exists()
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert files and all(
        (run / path.relative_to(whole)).read_bytes() == path.read_bytes() for path in files
    )


def test_a_second_ctrl_c_leaves_at_once(
    shelf: Path, tmp_path: Path, signalled: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    signalled(3, signal.SIGINT, signal.SIGINT)
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(tmp_path / "run")]) == 130
    assert steps(tmp_path / "run") == [2]
    assert capfd.readouterr().err.endswith("\nminidiffusion: interrupted\n")


def test_a_run_that_was_killed_before_its_first_checkpoint(
    shelf: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """It starts over: it is a function of its recipe. Also with half a checkpoint, or none yet."""
    run = tmp_path / "run"
    for left in ([], ["checkpoints"], ["checkpoints", "checkpoints/.tmp-12345678"]):
        shutil.copytree(shelf / "toy", run)
        shutil.rmtree(run / "checkpoints")
        (run / MODEL).unlink()
        for name in left:
            (run / name).mkdir()
        assert "--resume goes on with it" in refused("train", shelf / "toy.yaml", "--out", run)
        assert main(["train", "--resume", str(run)]) == 0
        assert (run / MODEL).read_bytes() == (shelf / "toy" / MODEL).read_bytes()
        assert len((run / "log.jsonl").read_text().splitlines()) == 6
        shutil.rmtree(run)


def test_a_run_has_one_writer(shelf: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Nobody begins a run, goes on with it or replaces it while another process is at it."""
    run, toy = tmp_path / "run", shelf / "toy.yaml"
    run.mkdir()
    with locked(run):
        assert "another process is writing there" in refused("train", toy, "--out", run)
        assert not list(run.iterdir())
    assert main(["train", str(toy), "--out", str(run), "--until", "2"]) == 0
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with locked(run):
        for words in (["--resume", run], [toy, "--out", run, "--force"]):
            assert "another process is writing there" in refused("train", *words)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_sigterm_ends_every_verb(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def ended(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sample, "draw", ended)
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "grid.png"
    assert main(["sample", str(shelf / "toy"), "--out", str(out)]) == 143
    assert capsys.readouterr().err == "\nminidiffusion: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.iterdir())


def test_an_ignored_signal_stays_ignored(
    shelf: Path, tmp_path: Path, signalled: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a shell's background job, which Ctrl-C must not end."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signalled(3, signal.SIGINT)
        assert main(["train", str(shelf / "toy.yaml"), "--out", str(tmp_path / "run")]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
