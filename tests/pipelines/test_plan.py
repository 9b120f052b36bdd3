"""The planner: its bytes are those of the loaded parts, and of real forward passes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import official
import pytest
import torch
from torch import nn

from minidiffusion.checkpoints import official as files
from minidiffusion.checkpoints.convert import theirs
from minidiffusion.checkpoints.official import blueprint
from minidiffusion.checkpoints.parts import Encoders, load_parts
from minidiffusion.checkpoints.reader import pieces
from minidiffusion.layers.attention import attend
from minidiffusion.layers.modulation import AdaLN
from minidiffusion.layers.quantized import quantize_
from minidiffusion.models import AutoencoderConfig, MMDiTConfig
from minidiffusion.pipelines import activations
from minidiffusion.pipelines.activations import META, Job, Ledger, Posing, working
from minidiffusion.pipelines.plan import PROGRAM, Total, Way, plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")
JOB = Job(512, 512, 1, torch.bfloat16, 1.0, CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = "sd1", "sd2-inpaint", "sd3.5-medium"
    return {name: official.make(root / f"{name}.safetensors", name) for name in families}


def size(network: nn.Module) -> int:
    return sum(x.nbytes for x in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd1", "sd2-inpaint", "sd3.5-medium"])
def test_weights_are_those_of_the_loaded_parts(
    models: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    parts = load_parts(models[family], dtype=dtype)
    text = parts.text
    encoders = [text.t5, text.clip_g, text.clip_l] if isinstance(text, Encoders) else [text]
    wanted = [size(one) for one in (*encoders, parts.denoiser.network, parts.autoencoder) if one]
    assert [need.weights for need in plan(models[family], dtype=dtype).parts] == wanted


def test_a_ledger_counts_what_lives() -> None:
    ledger = Ledger([], GPU)
    with ledger:
        a = torch.empty(1000, device=META)
        b = a.view(10, 100).mT
        a = a + 1
        assert ledger.now == 8000 and b.numel() == 1000
        del b
        a.mul_(2)
        assert ledger.now == 4000
    assert ledger.peak == 8000


def test_scores_are_held_whole_nowhere() -> None:
    n = 96 * 96
    for dtype, device in ((torch.bfloat16, CPU), (torch.float32, CPU), (torch.bfloat16, GPU)):
        q = torch.empty(1, 4, n, 32, dtype=dtype, device=META)
        ledger = Ledger([q], device)
        with torch.no_grad(), Posing(device), ledger:
            assert attend(q, q, q).shape == q.shape
        assert q.nbytes <= ledger.peak < n * n


REAL = """
import re, sys, torch
from pathlib import Path
from minidiffusion import device
from minidiffusion.layers.storage import store_slow_weights_
from minidiffusion.models import Autoencoder, AutoencoderConfig
def grown(key):
    status = Path("/proc/self/status").read_text()
    return int(re.search(key + r":\\s+(\\d+)", status)[1]) * 1024
torch.set_num_threads(1)
network = Autoencoder(AutoencoderConfig(channels=64)).to(getattr(torch, sys.argv[1]))
if sys.argv[2] == "slow":
    device.multiplies_fast = lambda dtype, where: dtype == torch.float32
store_slow_weights_(network, torch.device("cpu"))
before = grown("VmRSS")
for side in (24, 48):
    Path("/proc/self/clear_refs").write_text("5")
    with torch.no_grad():
        network.decode(torch.zeros(1, 4, side, side))
    print(grown("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a program's peak")
@pytest.mark.parametrize(
    ("dtype", "speed"),
    [("float32", "own"), ("bfloat16", "own"), ("bfloat16", "slow")],
    ids=["float32", "bfloat16", "stored"],
)
def test_a_real_pass_takes_what_was_planned(
    dtype: str, speed: str, request: pytest.FixtureRequest
) -> None:
    """Of two sizes the difference: what libraries keep for themselves is in both.

    speed: of this machine, or as if bf16 were slow on it.
    """
    if speed == "slow":
        request.getfixturevalue("slow")
    run = [sys.executable, "-W", "ignore", "-c", REAL, dtype, speed]
    # What malloc would keep for later is not what the pass needs.
    plainly = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(
        run, capture_output=True, text=True, check=True, timeout=300, env=plainly
    )
    small, large = map(int, found.stdout.split())
    job = replace(JOB, dtype=getattr(torch, dtype))
    network = blueprint(AutoencoderConfig(channels=64)).to(job.dtype)
    jobs = [replace(job, width=8 * side, height=8 * side) for side in (24, 48)]
    less, more = (working(network, None, job, None, None) for job in jobs)
    assert 0.75 * (more - less) < large - small < 1.35 * (more - less)
    assert more < large < more + 250_000_000


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("tile", [None, 16])
def test_large_pictures_are_reckoned_as_if_they_were_run(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tile: int | None
) -> None:
    network = blueprint(AutoencoderConfig(channels=32)).to(torch.bfloat16)
    job = Job(384, 320, 3, torch.bfloat16, 1.0, device)
    run = activations.measured(network, None, job, None, tile)
    monkeypatch.setattr(activations, "LARGEST", 24)
    assert working(network, None, job, None, tile) == pytest.approx(run, rel=0.05)


def test_few_blocks_take_what_many_do(models: dict[str, Path]) -> None:
    row = load_parts(models["sd3.5-medium"], device=META).denoiser.row
    assert isinstance(row.model, MMDiTConfig)
    config = replace(row.model, depth=6, second_attention=4)
    network = blueprint(config)
    ledger = Ledger([*network.parameters(), *network.buffers()], CPU)
    job = replace(JOB, dtype=torch.float32, width=256, height=256)
    with torch.no_grad(), Posing(CPU), ledger:
        activations.task(network, row, job, None)()
    assert working(network, row, job, None, None) == ledger.peak


@pytest.mark.parametrize("family", ["sd1", "sd3.5-medium"])
def test_weights_that_are_stored_and_not_multiplied(
    models: dict[str, Path], family: str, slow: None
) -> None:
    """Two bytes a weight, the activations of float32, and a layer's weight in float32 beside it."""
    stored = plan(models[family], width=64, height=64)
    exact = plan(models[family], width=64, height=64, dtype=torch.float32)
    card = plan(models[family], width=64, height=64, device="cuda")
    for here, whole, there in zip(stored.parts, exact.parts, card.parts, strict=True):
        assert here.weights == there.weights <= whole.weights // 2 + 1000
        assert whole.activations <= here.activations < whole.activations + here.weights
    texts = [need for need in stored.parts if need.part in ("T5", "text encoder")]
    table = {"sd1": 49408 * 32, "sd3.5-medium": 32128 * 96}[family]
    assert texts and texts[0].activations < 4 * table  # which is looked up, not cast


def test_a_frozen_ladder_is_as_wide_as_it_is_computed(models: dict[str, Path], slow: None) -> None:
    row = load_parts(models["sd3.5-medium"], device=META).denoiser.row
    norms = [layer for layer in blueprint(row.model).modules() if isinstance(layer, AdaLN)]
    numbers = (1 + 2 * row.sampling.steps) * sum(norm.linear.out_features for norm in norms)
    here, there = (
        next(need.weights for need in found.parts if need.part == "denoiser")
        for found in (
            plan(models["sd3.5-medium"], width=64, height=64, way=Way(freeze=True), device=place)
            for place in ("cpu", "cuda")
        )
    )
    assert here - there == 2 * numbers


def test_ways_and_the_first_that_fits(models: dict[str, Path], fast: None) -> None:
    found = plan(models["sd3.5-medium"], width=256, height=256, device="cuda")
    peaks = {total.way: total.peak for total in found.totals}
    weights = sum(need.weights for need in found.parts)
    assert peaks[Way()] == PROGRAM + weights + max(need.activations for need in found.parts)
    assert peaks[Way(offload=True)] == PROGRAM + max(need.peak for need in found.parts)
    assert next(t for t in found.totals if t.way.offload).host == weights
    on_cpu = plan(models["sd3.5-medium"], width=256, height=256).totals
    *others, autoencoder = found.parts
    most = max(need.peak + autoencoder.weights for need in others)
    assert Total(Way(offload=True), PROGRAM + max(most, autoencoder.peak), 0) in on_cpu
    t5 = next(need for need in found.parts if need.part == "T5")
    assert peaks[Way(t5=False)] == peaks[Way()] - t5.weights
    assert found.choice(peaks[Way()]) == found.totals[0]
    sparing = found.choice(peaks[Way()] - 1)
    assert sparing is not None and sparing.peak < peaks[Way()]
    assert found.choice(PROGRAM) is None
    asked = plan(models["sd3.5-medium"], width=256, height=256, way=Way(t5=False, tile=16))
    assert "T5" not in [need.part for need in asked.parts]
    assert all(not total.way.t5 and total.way.tile == 16 for total in asked.totals)


def test_guidance_and_batch_are_rows_of_the_denoiser(models: dict[str, Path]) -> None:
    def denoiser(**how: float) -> int:
        made = plan(models["sd1"], width=256, height=256, **how)  # type: ignore[arg-type]
        return next(need.activations for need in made.parts if need.part == "denoiser")

    assert denoiser(guidance=7.5) == denoiser(guidance=1.0, batch=2)
    assert denoiser(guidance=7.5, batch=4) == pytest.approx(4 * denoiser(guidance=7.5), rel=0.1)


def test_full_size_files_are_planned_without_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "joined", None)  # what reads a weight
    config = official.FLOW["sd3.5-large", "full"]
    made = theirs(
        official.Content(config, official.Random(config)), "ldm", "model.diffusion_model."
    )
    lying = {n: torch.empty(s, dtype=torch.float16, device=META) for n, s in made.shapes.items()}
    header = bytes(next(pieces(lying, {"format": "pt"})))
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(x.nbytes for x in lying.values()))
    found = plan(tmp_path / "large.safetensors", width=1024, height=1024, device="cuda")
    (need,) = found.parts
    assert need.weights == sum(x.nbytes for x in lying.values())
    frozen = next(t for t in found.totals if t.way.freeze and not t.way.quantize)
    assert 0.6 < (frozen.peak - PROGRAM) / need.peak < 0.72
    small = blueprint(config).to(torch.bfloat16)
    quantize_(small, "int8")
    int8 = plan(tmp_path / "large.safetensors", way=Way(quantize="int8")).parts[0]
    assert int8.weights == size(small) < 0.7 * need.weights


def test_what_cannot_be_planned_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    bad = [
        ({"width": 20}, "multiple of 8"), ({"batch": 0}, "batch size"),
        ({"way": Way(t5=False)}, "only for Stable Diffusion 3"),
        ({"way": Way(freeze=True)}, "only for Stable Diffusion 3"),
    ]  # fmt: skip
    for how, words in bad:
        with pytest.raises(ValueError, match=words):
            plan(models["sd1"], **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 16"):
        plan(models["sd3.5-medium"], width=264, height=256)
    alone = official.make(tmp_path / "alone.safetensors", "sd3.5-medium", alone=True)
    assert [need.part for need in plan(alone).parts] == ["denoiser", "autoencoder"]
