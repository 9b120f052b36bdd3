"""The MMDiT from scratch: prompted with the names of classes, through hashed words."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun
import yaml
from rounding import assert_near, peak

from minidiffusion.checkpoints.catalog import MODEL_FILE, load_denoiser
from minidiffusion.cli.main import main
from minidiffusion.data import Tensors, Toy
from minidiffusion.models import MMDiT, MMDiTConfig
from minidiffusion.pipelines.load import load, pipeline
from minidiffusion.shapes import Cond
from minidiffusion.text.hashed import HashedText
from minidiffusion.training.latents import condition
from minidiffusion.training.loop import train
from minidiffusion.training.objectives import Objective
from minidiffusion.training.optimizers import AdamW, Muon, Schedule
from minidiffusion.training.prompts import ROOM, Named, room
from minidiffusion.training.recipe import Finetune, Recipe, fitted, load_recipe
from minidiffusion.typed import ConfigError

TINY = MMDiTConfig(width=16, depth=2, heads=2, qk_norm=True)
NAMES = ("ankle boot", "bag", "coat")


def named(data: Tensors) -> Tensors:
    return replace(data, classes=NAMES)


def test_sizes_follow_the_data(pictures, tiny) -> None:
    model = fitted(tiny(TINY), pictures(channels=3)).model
    assert model == replace(TINY, in_channels=3, grid=4, context_width=64, pooled_width=64)
    said = replace(TINY, grid=9, context_width=12, pooled_width=20, patch=4)
    assert fitted(tiny(said), pictures()).model == replace(said, in_channels=1)
    with pytest.raises(ConfigError, match=r"model: this mmdit takes .* multiples of 3 up to"):
        fitted(tiny(replace(TINY, patch=3)), pictures())
    with pytest.raises(ConfigError, match=r"model: this mmdit takes"):
        fitted(tiny(TINY), Toy().open())


def test_labels_become_the_names_prompts(pictures, tiny, trainer_of) -> None:
    """Where the label is dropped, the empty prompt: what sampling leads away from."""
    report = next(train(tiny(TINY), dataset=named(pictures())))
    data, row = trainer_of(report).dataset, trainer_of(report).task.begun.row
    assert isinstance(data, Named) and row.words == ROOM == room(NAMES)
    text = HashedText(row.words, 64, 64)
    batch = data.batch(range(6))
    kept = torch.tensor([True, False, True, True, False, True])
    found = condition(data, batch, kept, torch.device("cpu"))
    texts = [NAMES[n] if keep else "" for n, keep in zip(batch.labels, kept, strict=True)]
    wanted = text.encode(texts)
    assert found.tokens is not None and wanted.tokens is not None
    assert torch.equal(found.tokens, wanted.tokens) and found.labels is None
    assert found.pooled is not None and wanted.pooled is not None
    assert torch.equal(found.pooled, wanted.pooled)
    assert room(["long " * 20]) == 22


def test_without_classes_every_prompt_is_empty(pictures, tiny, tmp_path) -> None:
    data = replace(pictures(), labels=None, classes=())
    list(train(tiny(TINY, tmp_path, steps=1), dataset=data))
    assert len(load(tmp_path).generate(num_steps=2)) == 1


def test_the_label_drop_is_what_the_recipe_says(pictures, tiny, trainer_of) -> None:
    recipe = tiny(TINY, batch_size=500, steps=1)
    report = next(train(recipe, dataset=named(pictures(600))))
    trainer = trainer_of(report)
    empty = trainer.dataset.names.pooled[-1]
    batch = trainer.dataset.batch(range(600))
    cond = trainer.task.inputs(0, 0, batch)[3]
    share = float((cond.pooled == empty).all(dim=1).double().mean())
    assert abs(share - 0.1) < 4 * (0.09 / 600) ** 0.5


# Resume: a run that was interrupted and resumed is, to the bit, the run that was not.


def cut(whole: Path, step: int) -> Path:
    place = whole.parent / f"cut_{step}"
    name = f"step_{step:08d}"
    shutil.copytree(whole / "checkpoints" / name, place / "checkpoints" / name)
    return place


def check_cuts(recipe: Recipe, dataset: Any, digest: Any, cuts: Any, **changed: Any) -> None:
    whole = Path(str(recipe.out))
    often = replace(recipe, run=replace(recipe.run, save_every=1))
    states = [digest(report) for report in train(often, dataset=dataset)]
    assert len(states) == len(set(states)) == 13
    model = (whole / MODEL_FILE).read_bytes()
    for step in cuts:
        place = cut(whole, step)
        again = replace(recipe, out=str(place), run=replace(recipe.run, **changed))
        end = 13 if step in (1, 6, 12) else step + 1
        found = [digest(r) for r in train(again, place, until=end, dataset=dataset)]
        assert found == states[step:end], step
        assert end < 13 or (place / MODEL_FILE).read_bytes() == model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twelve_cuts(precision, pictures, tiny, digest, tmp_path) -> None:
    recipe = tiny(TINY, tmp_path / "whole", precision=precision)
    check_cuts(recipe, named(pictures()), digest, range(1, 13))


def test_cuts_with_muon_odd_micro_batches_and_checkpointing(
    pictures, tiny, digest, tmp_path
) -> None:
    """8 pictures as 3 + 3 + 2; the second half of the run with another number of workers."""
    recipe = tiny(TINY, tmp_path / "whole", micro_batch=3, checkpointing=True)
    recipe = replace(recipe, optimizer=Muon())
    check_cuts(recipe, named(pictures()), digest, (2, 6), workers=2)


def test_other_names_are_another_run(pictures, tiny, tmp_path) -> None:
    data = named(pictures())
    list(train(tiny(TINY, tmp_path), until=1, dataset=data))
    other = replace(data, classes=("ankle boot", "bag", "dress"))
    with pytest.raises(ConfigError, match="not the same run"):
        next(train(tiny(TINY, tmp_path), tmp_path, dataset=other))


# What must not change the numbers.


def gradients(report: Any, trainer_of: Any, checkpointing: bool) -> list[torch.Tensor]:
    trainer = trainer_of(report)
    trainer.network.checkpointing = checkpointing
    trainer.network.zero_grad(set_to_none=True)
    trainer.accumulate(0, trainer.dataset.batch(range(8)))
    return [p.grad.clone() for p in trainer.network.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(precision, pictures, tiny, trainer_of) -> None:
    reports = train(tiny(TINY, precision=precision), dataset=named(pictures()))
    for report in reports:
        if report.step == 5:  # the gates have opened
            plain, saving = (gradients(report, trainer_of, how) for how in (False, True))
            break
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))
    assert sum(float(g.abs().sum()) > 0 for g in plain) > 0.9 * len(plain)


def test_micro_batches_change_no_gradient(pictures, tiny, trainer_of) -> None:
    """Beyond rounding: 8 pictures at once, and as 3 + 3 + 2."""
    found = []
    for micro in (None, 3):
        for report in train(tiny(TINY, micro_batch=micro), until=5, dataset=named(pictures())):
            last = report
        found.append(gradients(last, trainer_of, False))
    for whole, pieces in zip(*found, strict=True):
        assert_near(whole, pieces, 256, scale=max(map(peak, found[0])))


def test_masters_are_fp32_where_the_arithmetic_is_bf16(pictures, tiny, trainer_of) -> None:
    for report in train(tiny(TINY, precision="bf16"), until=2, dataset=named(pictures())):
        state = trainer_of(report).state
    for part, tensors in state.tensors().items():
        assert all(x.dtype == torch.float32 for x in tensors.values() if x.is_floating_point()), (
            part
        )


def test_a_batch_size_of_its_own(pictures, tiny, monkeypatch) -> None:
    from minidiffusion.training import memory

    monkeypatch.setattr(memory.devices, "free_bytes", lambda where: 3e7)
    recipe = replace(tiny(TINY, steps=1), run=replace(tiny(TINY).run, batch_size="auto", steps=1))
    report = next(train(recipe, dataset=named(pictures())))
    assert report.samples in (2, 4, 8, 16)


# Two ranks: DDP and FSDP2 are accumulation, to the bit.

SCRIPT = Path(__file__).with_name("rank.py")
ODD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("rank", {script!r})
rank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rank)
from minidiffusion.models import MMDiTConfig
# Widths that no vector register divides, and pieces of unequal size: rounding must not care.
rank.MODELS["mmdit"] = MMDiTConfig(
    width=20, depth=2, heads=2, qk_norm=True, second_attention=1, context_width=13, pooled_width=7
)
if __name__ == "__main__":
    rank.main()
"""


def case(folder: Path, name: str, **run: Any) -> dict[str, Any]:
    return {"model": "mmdit", "out": str(folder / name), "run": {"steps": 15, **run}}


def test_two_ranks_are_one_process(tmp_path) -> None:
    """Hashes of weights, average and optimizer after 15 steps, the last loss, and the model."""
    script = tmp_path / "odd.py"
    script.write_text(ODD.format(script=str(SCRIPT)))
    spec = importlib.util.spec_from_file_location("odd", script)
    assert spec is not None and spec.loader is not None
    odd = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(odd)
    alone = odd.rank.run(case(tmp_path, "alone", micro_batch=4))
    cases = {how: case(tmp_path, how, strategy=how) for how in ("ddp", "fsdp")}
    code, found, error = torchrun.launch(script, tmp_path, cases)
    assert code == 0, error
    assert found == {"ddp": alone, "fsdp": alone}
    files = [tmp_path / how / MODEL_FILE for how in ("alone", "ddp", "fsdp")]
    assert len({file.read_bytes() for file in files}) == 1


# A run draws what its prompt names.


def halves(count: int = 192) -> Tensors:
    """Pictures of 8 x 8: bright on the left, on the right, in the middle, by class; a bit noisy."""
    numbers = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    x = torch.full((count, 1, 8, 8), 30)
    for k, label in enumerate(labels.tolist()):
        start = (0, 5, 2)[label]
        x[k, :, :, start : start + 3 + label // 2] = 220
    noise = torch.randint(-20, 21, x.shape, generator=numbers)
    return Tensors((x + noise).to(torch.uint8), labels, NAMES)


def seen(x: torch.Tensor) -> list[int]:
    """The class that each picture is nearest to."""
    data = halves(3).batch(range(3)).x
    return [int((one - data).square().flatten(1).sum(1).argmin()) for one in x]


@pytest.fixture(scope="module")
def drawing(tmp_path_factory) -> Path:
    """A run of two hundred steps that knows the halves by name."""
    folder = tmp_path_factory.mktemp("halves")
    recipe = Recipe(
        model=replace(TINY, width=32), optimizer=AdamW(lr=5e-3), schedule=Schedule(warmup=10),
        objective=Objective(label_drop=0.1), out=str(folder),
        run=replace(Recipe().run, steps=200, batch_size=24, ema=0.95, device="cpu"),
    )  # fmt: skip
    recipe = replace(recipe, run=replace(recipe.run, precision="fp32"))
    list(train(recipe, dataset=halves()))
    return folder


def test_a_run_draws_what_its_prompt_names(drawing) -> None:
    pipe = load(drawing, "cpu")
    assert isinstance(pipe.text, HashedText) and pipe.text.length == ROOM
    prompts = [NAMES[k % 3] for k in range(24)]
    for scale, share in ((1.0, 0.7), (2.0, 0.9)):
        x = pipe.sample(pipe.condition(prompts), 24, guidance_scale=scale, seed=5)
        agreed = sum(a == k % 3 for k, a in enumerate(seen(x)))
        assert agreed >= share * 24, (scale, agreed)
    numbers = pipe.sample(pipe.condition([k % 3 for k in range(24)]), 24, seed=5)
    assert torch.equal(numbers, pipe.sample(pipe.condition(prompts), 24, seed=5))
    assert pipe.numbers(["bag", "2"]) == [1, 2]
    with pytest.raises(ValueError, match="label: must be 0..2, got 3"):
        pipe.condition([3])


def test_a_negative_prompt_leads_away(drawing) -> None:
    """From the bag's to one side: what is left is no bag."""
    pipe, against = load(drawing, "cpu"), "bag"
    steps = list(pipe.stream([""] * 12, against, guidance_scale=4.0, seed=3))
    assert seen(steps[-1].x).count(1) <= 1


def test_in_memory_it_is_the_same(drawing) -> None:
    trained = load_denoiser(drawing)
    assert trained.row.words == ROOM and isinstance(trained.network, MMDiT)
    one, other = (pipe.sample(pipe.condition("coat"), seed=1, num_steps=3)
                  for pipe in (pipeline(trained), load(drawing, "cpu")))  # fmt: skip
    assert torch.equal(one, other)
    assert isinstance(pipeline(trained).condition("coat"), Cond)


def test_a_run_is_trained_on(drawing, tmp_path) -> None:
    """Finetuning a run of our own keeps its words."""
    recipe = Recipe(finetune=Finetune(str(drawing)), out=str(tmp_path))
    recipe = replace(recipe, run=replace(recipe.run, steps=2, batch_size=4, device="cpu"))
    list(train(recipe, dataset=halves()))
    assert load(tmp_path).row.words == ROOM
    assert len(load(tmp_path).generate("bag", num_steps=1)) == 1


# The command line.

FASHION = {
    "data": {"name": "fashion_mnist", "limit": 32},
    "model": {"name": "mmdit", "width": 16, "depth": 1, "heads": 2, "patch": 4},
    "run": {"steps": 2, "batch_size": 4, "sample_every": 2, "device": "cpu", "precision": "fp32"},
    "sampling": {"steps": 1, "sampler": "ddim"},
}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(FASHION))
    assert main(["train", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_verbs(fashion, tmp_path, capsys) -> None:
    assert (fashion / "samples" / "step_000002.png").exists()
    out = tmp_path / "out"
    words = ["generate", "sneaker", "--model", str(fashion), "--out", str(out)]
    assert main([*words, "--negative", "bag", "--guidance", "2"]) == 0
    assert "28 x 28" in capsys.readouterr().out
    assert main(["regenerate", str(out / "0001.png"), "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (out / "0001.png").read_bytes()
    sheet = ["sample", str(fashion), "--labels", "sneaker,8", "--count", "3"]
    for how in ("grid", "png", "npz", "strip"):
        assert main([*sheet, "--format", how, "--out", str(tmp_path / how)]) == 0
    assert len(list((tmp_path / "png").iterdir())) == 3
    assert main(["evaluate", str(fashion), "--count", "100", "--guidance", "1"]) == 0
    assert "agreement" in (fashion / "report.md").read_text()


def test_mistakes(fashion, capsys) -> None:
    for words, line in (
        (["sample", "RUN", "--labels", "sneeker"], "label: unknown 'sneeker'"),
        (["generate", "bag", "--model", "RUN", "--weighting", "a1111"], "weighting, long_prompts"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(fashion) if word == "RUN" else word for word in words])
        assert end.value.code == 2 and line in capsys.readouterr().err


def test_the_shipped_recipe(trainer_of) -> None:
    """It can be run: built, with two pictures a step."""
    recipe = load_recipe("configs/mmdit_flow.yaml", {"run.batch_size": 2, "run.device": "cpu"})
    report = next(train(recipe, until=1))
    assert trainer_of(report).task.begun.row.words == ROOM
    assert recipe.objective.label_drop == 0.1 and recipe.objective.density.name == "logit_normal"
