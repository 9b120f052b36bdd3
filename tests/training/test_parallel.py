"""One process that accumulates, DDP's ranks and FSDP2's ranks: the same run, to the bit."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun
from rounding import assert_near

from minidiffusion.checkpoints import snapshot
from minidiffusion.training import parallel

SCRIPT = Path(__file__).with_name("rank.py")
spec = importlib.util.spec_from_file_location("rank", SCRIPT)
assert spec is not None and spec.loader is not None
rank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rank)
HALVES = {"micro_batch": 4}
FSDP = {"strategy": "fsdp"}


def launch(folder: Path, cases: dict[str, dict[str, Any]]) -> tuple[int, dict[str, list[str]]]:
    """Run the cases on two ranks; the exit code, and what the first rank found."""
    code, found, error = torchrun.launch(SCRIPT, folder, cases)
    assert code == 0 or any("kill" in c for c in cases.values()), error
    return code, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def case(folder: Path, name: str, model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "out": str(folder / name), **more}


@pytest.fixture(scope="module")
def alone(folder, one_thread):
    """The same runs by this process: halves of each batch, accumulated."""
    found = {
        name: rank.run(case(folder, f"{name}_alone", name, run=HALVES)) for name in ("unet", "dit")
    }
    found["muon"] = rank.run(case(folder, "muon_alone", "dit", run=HALVES, muon=True))
    # Half a run, to be finished by the ranks.
    rank.run(case(folder, "dit_moved_in", "dit", run=HALVES, until=8))
    return found


@pytest.fixture(scope="module")
def ranks(folder, alone):
    """Every run of this file that needs two ranks, in one launch."""
    cases = {
        "unet_ddp": case(folder, "unet_ddp", "unet"),
        "unet_fsdp": case(folder, "unet_fsdp", "unet", run=FSDP),
        "dit_ddp": case(folder, "dit_ddp", "dit"),
        "dit_fsdp": case(folder, "dit_fsdp", "dit", run=FSDP),
        "muon_fsdp": case(folder, "muon_fsdp", "dit", run=FSDP, muon=True),
        "dit_moved_in": case(folder, "dit_moved_in", "dit", run=FSDP, resume=True),
        "unet_moved_out": case(folder, "unet_moved_out", "unet", run=FSDP, until=8),
        "unet_stopped": case(folder, "unet_stopped", "unet", run=FSDP, stop=4),
        "auto": case(folder, "auto", "dit", run={"batch_size": "auto"}, free=[1e7, 5e7], until=2),
    }
    return launch(folder, cases)[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_two_ranks_are_one_process(name, strategy, alone, ranks) -> None:
    assert ranks[f"{name}_{strategy}"] == alone[name]


def test_muon_on_two_ranks(alone, ranks) -> None:
    """A matrix is orthogonalised whole, whoever holds its pieces."""
    assert ranks["muon_fsdp"] == alone["muon"]


def test_the_shipped_file_is_the_same(folder, alone, ranks) -> None:
    for name in ("unet", "dit"):
        files = [folder / f"{name}_{how}/model.safetensors" for how in ("alone", "ddp", "fsdp")]
        assert len({file.read_bytes() for file in files}) == 1
        stored = [
            {path.name: path.read_bytes() for path in (file.parent / "averages").iterdir()}
            for file in files
        ]
        assert len(stored[0]) == 6 and stored[0] == stored[1] == stored[2]


def test_a_run_moves_to_more_or_fewer_ranks(folder, alone, ranks) -> None:
    assert ranks["dit_moved_in"] == alone["dit"]
    moved = case(folder, "unet_moved_out", "unet", run=HALVES, resume=True)
    assert rank.run(moved) == alone["unet"]


def test_ranks_stop_together(folder, alone, ranks) -> None:
    """The second one alone is asked to stop, at step 4, and every rank takes part in saving."""
    (last,) = (folder / "unet_stopped" / "checkpoints").iterdir()
    assert last.name == "step_00000004" and ranks["unet_stopped"]
    assert rank.run(case(folder, "unet_stopped", "unet", run=HALVES, resume=True)) == alone["unet"]


@pytest.mark.long
def test_the_other_way_round(folder, alone) -> None:
    rank.run(case(folder, "unet_moved_in", "unet", run=HALVES, until=11))
    cases = {
        "unet_moved_in": case(folder, "unet_moved_in", "unet", run=FSDP, resume=True),
        "dit_moved_out": case(folder, "dit_moved_out", "dit", run=FSDP, until=11),
    }
    assert launch(folder, cases)[1]["unet_moved_in"] == alone["unet"]
    moved = case(folder, "dit_moved_out", "dit", run=HALVES, resume=True)
    assert rank.run(moved) == alone["dit"]


def test_ranks_agree_on_a_batch_size(folder, ranks) -> None:
    """Each sees other free memory; the first one's word counts, times the ranks."""
    facts = snapshot.load(folder / "auto" / "checkpoints" / "step_00000002").facts
    size = facts["recipe"]["run"]["batch_size"]
    assert ranks["auto"] and size % 2 == 0 and size // 2 & (size // 2 - 1) == 0


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_launch_and_loses_no_step(strategy, folder, alone) -> None:
    """SIGKILL at step 9; the snapshot of step 5 carries on."""
    how = {"strategy": strategy}
    broken = case(folder, f"killed_{strategy}", "unet", run=how, kill=9)
    code, found = launch(folder, {"broken": broken})
    assert code != 0 and not found
    again = case(folder, f"killed_{strategy}", "unet", run=how, resume=True)
    assert launch(folder, {"again": again})[1]["again"] == alone["unet"]


@pytest.mark.long
def test_accumulation_on_every_rank(folder) -> None:
    """With two micro-batches a rank the sums pair up otherwise: DDP and FSDP2 still agree."""
    run = {"micro_batch": 2}
    cases = {
        "ddp": case(folder, "two_ddp", "unet", run=run),
        "fsdp": case(folder, "two_fsdp", "unet", run={**run, **FSDP}),
    }
    _, found = launch(folder, cases)
    assert found["ddp"] == found["fsdp"]


def test_alone_nothing_is_exchanged() -> None:
    world = parallel.World()
    value = torch.tensor(3.5)
    assert parallel.mean(value, world) is value
    assert parallel.first(2.5, world, torch.device("cpu")) == 2.5
    assert parallel.local(value) is value and parallel.whole(value, value) is value
    assert parallel.piece(value, value) is value


def test_the_norm_is_that_of_all_together() -> None:
    parts = [torch.randn(5, 3), torch.randn(7), torch.randn(())]
    together = torch.cat([part.flatten() for part in parts]).double()
    found = parallel.norm(parts)
    assert found.dtype == torch.float64
    assert_near(found, together.square().sum().sqrt(), 16)
    assert torch.isnan(parallel.norm([*parts, torch.tensor([torch.nan])]))
