"""A denoiser through encoders of our own: what is encoded, what is kept, what the run leaves."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import encoders
import pytest
import torch
from rounding import assert_near
from torch import Tensor

from minidiffusion.checkpoints.catalog import load_denoiser
from minidiffusion.checkpoints.own import load_autoencoder, load_clip, save_part
from minidiffusion.checkpoints.reader import read_metadata
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.cli.main import main
from minidiffusion.data import Tensors
from minidiffusion.models import Autoencoder, MMDiTConfig
from minidiffusion.models.clip import CLIPText
from minidiffusion.pipelines.load import load
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.text import Text
from minidiffusion.text.bpe import shortened
from minidiffusion.training import through as room
from minidiffusion.training.loop import train
from minidiffusion.training.recipe import Finetune, Recipe, Through
from minidiffusion.typed import ConfigError

CPU = torch.device("cpu")
Counts = dict[str, int]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    encoders.written(folder)
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Pictures and texts that went through the encoders."""
    seen = {"pictures": 0, "texts": 0}

    def counting(kind: str, whole: Callable) -> Callable:
        def call(self, x, *rest):
            seen[kind] += len(x)
            return whole(self, x, *rest)

        return call

    monkeypatch.setattr(Autoencoder, "posterior", counting("pictures", Autoencoder.posterior))
    monkeypatch.setattr(CLIPText, "forward", counting("texts", CLIPText.forward))
    yield seen


def opened(recipe: Recipe) -> room.Encoders:
    assert recipe.through is not None
    return room.encoders(recipe.through, CPU)


def test_a_picture_is_encoded_once_whatever_is_said_of_it(place, counts) -> None:
    """20 pictures with three captions each; one picture stands there twice."""
    data = encoders.captioned(20, times=3)
    data = replace(data, x=torch.cat([data.x[:19], data.x[:1]]))
    both = opened(encoders.through(place))
    found = room.through(data, both, None, CPU)
    assert counts == {"pictures": 19, "texts": 61}  # and the empty caption
    assert len(found) == len(data) == 60 and found.moments.shape == (19, 8, 4, 4)
    assert found.shape == (4, 4, 4) and found.captions == data.captions
    batch = data.batch([7, 27, 59, 0])
    mean, deviation = found.batch([7, 27, 59, 0]).x.chunk(2, dim=1)
    posterior = both.autoencoder.posterior(batch.x)
    assert_near(mean, both.autoencoder.encode(batch.x), 16)
    scale = both.autoencoder.config.scale
    assert_near(deviation, scale * (posterior.log_variance / 2).exp(), 16)
    assert torch.equal(mean[2], mean[3])


def test_captions_are_read_as_generate_reads_them(place) -> None:
    both, data = opened(encoders.through(place)), encoders.captioned(6)
    found = room.through(data, both, None, CPU)
    assert found.words.keys() == {"", *data.captions}
    text = Text(both.text.encoder, shortened(600))
    for caption, cond in found.words.items():
        wanted = text.encode(caption)
        assert cond.tokens is not None and wanted.tokens is not None
        assert cond.tokens.dtype == torch.float16
        assert torch.equal(cond.tokens, wanted.tokens.half())
        assert cond.pooled is not None and wanted.pooled is not None
        assert torch.equal(cond.pooled, wanted.pooled.half())


def test_captions_that_are_too_long_are_counted_in_one_line(place) -> None:
    data = replace(encoders.captioned(3), captions=("a", "apple " * 20, "egg " * 30))
    with pytest.warns(UserWarning, match=r"^2 of 4 captions are cut at 10 tokens$") as said:
        room.through(data, opened(encoders.through(place)), None, CPU)
    assert len(said) == 1


def test_a_second_start_encodes_nothing(place, counts, tmp_path) -> None:
    data, both = encoders.captioned(6, times=2), opened(encoders.through(place))
    first = room.through(data, both, tmp_path, CPU)
    files = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 2 and counts == {"pictures": 6, "texts": 13}
    again = room.through(data, both, tmp_path, CPU)
    assert counts == {"pictures": 6, "texts": 13}
    assert torch.equal(first.moments, again.moments) and first.source == again.source
    for file, whole in files.items():  # a byte of its tensors, or its end
        for bad in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9], b""):
            file.write_bytes(bad)
            mended = room.through(data, both, tmp_path, CPU)
            assert torch.equal(mended.moments, first.moments)
            assert file.read_bytes() == whole
    assert counts == {"pictures": 6 + 3 * 6, "texts": 13 + 3 * 13}


def test_what_is_kept_is_of_these_pictures_and_encoders(place, counts, tmp_path) -> None:
    data, both = encoders.captioned(6), opened(encoders.through(place))
    prints = {room.through(data, both, tmp_path, CPU).fingerprint()}
    other = Autoencoder(both.autoencoder.config)
    prints.add(room.through(data, both._replace(autoencoder=other), tmp_path, CPU).fingerprint())
    assert counts == {"pictures": 12, "texts": 7}  # the texts were there
    turned = replace(data, x=data.x.flip(0))
    prints.add(room.through(turned, both, tmp_path, CPU).fingerprint())
    text = Text(CLIPText(both.config), shortened(600))
    prints.add(room.through(data, both._replace(text=text), tmp_path, CPU).fingerprint())
    assert len(prints) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 2 + 1 + 2 + 1


def test_places_without_the_part(place, tmp_path) -> None:
    good = (str(place / "autoencoder.safetensors"), str(place / "clip.safetensors"))
    for bad, said in (
        (Through(good[1], good[1]), f"through.autoencoder: {good[1]} holds no autoencoder of our"),
        (Through(good[0], good[0]), f"through.clip: {good[0]} holds no clip of our own"),
        (Through("nowhere", good[1]), "through.autoencoder: "),
        (Through(good[0], str(tmp_path)), "through.clip: "),
    ):
        recipe = replace(encoders.through(place, tmp_path / "run"), through=bad)
        with pytest.raises(ConfigError) as error:
            next(train(recipe, dataset=encoders.captioned()))
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_pictures_that_do_not_fit(place) -> None:
    recipe, data = encoders.through(place), encoders.captioned()
    with pytest.raises(ConfigError, match="data: no captions, which a denoiser"):
        next(train(recipe, dataset=Tensors(data.x)))
    odd = Tensors(torch.zeros(2, 3, 16, 18, dtype=torch.uint8), captions=("a", "b"))
    grey = Tensors(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), captions=("a", "b"))
    for bad in (odd, grey):
        with pytest.raises(ConfigError, match="data: the autoencoder takes 3 channels and mult"):
            next(train(recipe, dataset=bad))


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place, tmp_path_factory) -> tuple[Path, Pipeline]:
    """A finished run, and the pipeline of its network in memory with the encoders it had."""
    out = tmp_path_factory.mktemp("through") / "run"
    recipe = encoders.through(place, out, averages=(0.1,), average_every=1, ema=0.9)
    *_, last = train(recipe, dataset=encoders.captioned(20, times=2))
    network, row = last.average()
    both = opened(recipe)
    return out, Pipeline(network, row, CPU, both.text, both.autoencoder)


def drawn(pipe: Pipeline) -> Tensor:
    """Two pictures of a prompt, as bytes."""
    import numpy as np

    pictures = pipe.generate("bee 1", seed=3, num_steps=3, num_images=2)
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures]))


def test_the_row_says_what_it_is(run, place) -> None:
    row = load_denoiser(run[0]).row
    assert isinstance(row.model, MMDiTConfig)
    assert (row.shape, row.classes, row.words, row.family) == ((4, 4, 4), (), 0, "")
    model = row.model
    assert (model.in_channels, model.grid, model.context_width, model.pooled_width) == (4, 2, 16, 8)


def test_the_file_holds_the_encoders_to_the_bit(run, place) -> None:
    weights = open_weights(run[0] / "model.safetensors")
    pairs = (load_autoencoder, "autoencoder"), (load_clip, "clip")
    for load_part, name in pairs:
        wanted = open_weights(place / f"{name}.safetensors")
        mine, theirs = load_part(weights), load_part(wanted)
        assert mine.config == theirs.config
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)


def test_pictures_of_the_file_are_those_of_memory(run) -> None:
    out, memory = run
    wanted = drawn(memory)
    assert wanted.shape == (2, 16, 16, 3) and wanted.float().std() > 5
    assert torch.equal(drawn(load(out, "cpu")), wanted)


def test_generate_draws_from_an_average_made_afterwards(run, tmp_path) -> None:
    out, _ = run
    made = tmp_path / "wide.safetensors"
    assert main(["average", str(out), "--sigma-rel", "0.1", "--out", str(made)]) == 0
    assert read_metadata(made) == read_metadata(out / "model.safetensors")
    assert open_weights(made).shapes == open_weights(out / "model.safetensors").shapes
    words = ["--model", str(made), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["generate", "bee 1", "--device", "cpu", *words]) == 0
    assert (tmp_path / "out" / "0001.png").exists()


def test_a_model_is_trained_through_the_parts_of_another(run, place, tmp_path) -> None:
    """The file of a text-to-image run serves as the place of both."""
    recipe = encoders.through(place, tmp_path / "a", steps=2)
    data = encoders.captioned()
    losses = [report.loss for report in train(recipe, dataset=data)]
    there = replace(recipe, through=Through(str(run[0]), str(run[0])), out=str(tmp_path / "b"))
    assert [report.loss for report in train(there, dataset=data)] == losses
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_finished_run_is_finetuned_with_its_own_encoders(run, place, tmp_path) -> None:
    """The same first loss as of its last weights; it leaves a whole model; resume goes on in it."""
    data, how = encoders.captioned(12), Finetune(str(run[0]))
    recipe = Recipe(finetune=how, out=str(tmp_path / "a"), seed=7)
    usual = replace(encoders.through(place).run, steps=4, ema=0.5)
    recipe = replace(recipe, run=usual, optimizer=encoders.recipe("clip").optimizer)
    losses = [report.loss for report in train(recipe, dataset=data)]
    again = replace(recipe, out=str(tmp_path / "b"))
    first = [report.loss for report in train(again, until=2, dataset=data)]
    rest = [report.loss for report in train(again, tmp_path / "b", dataset=data)]
    assert first + rest == losses
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    left, base = open_weights(files[0]), open_weights(run[0] / "model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(left[name], tensor)}
    assert len(changed) > 20 and not [n for n in changed if n.startswith(("autoencoder.", "clip."))]
    pictures = load(tmp_path / "a", "cpu").generate("dog 3", num_steps=1)
    assert pictures[0].size == (16, 16)


def test_finetuning_starts_from_the_weights_of_the_run(run, place, tmp_path) -> None:
    """At a rate of nearly nothing the file's weights are what is left."""
    still = replace(encoders.recipe("clip").optimizer, lr=1e-12)
    recipe = Recipe(finetune=Finetune(str(run[0])), out=str(tmp_path / "run"), optimizer=still)
    recipe = replace(recipe, run=replace(encoders.through(place).run, steps=1))
    list(train(recipe, dataset=encoders.captioned(8)))
    left, base = (open_weights(at / "model.safetensors") for at in (tmp_path / "run", run[0]))
    assert left.shapes == base.shapes and left.metadata.keys() == base.metadata.keys()
    for name, tensor in base.items():
        assert_near(left[name], tensor, 1)


def test_going_on_with_other_encoders_is_refused(place, tmp_path) -> None:
    """They may move; another one is another run, whatever its name."""
    data, recipe = encoders.captioned(), encoders.through(place, tmp_path / "run")
    list(train(recipe, until=3, dataset=data))
    (tmp_path / "moved").mkdir()
    parts = encoders.written(tmp_path / "moved")
    moved = replace(recipe, through=encoders.through(tmp_path / "moved").through)
    assert next(train(moved, tmp_path / "run", dataset=data)).step == 4
    with torch.no_grad():
        next(parts[0].parameters()).mul_(1.5)
    file = tmp_path / "moved" / "autoencoder.safetensors"
    save_part("autoencoder", parts[0].config, parts[0].state_dict(), file)
    with pytest.raises(ConfigError, match="data was .* not the same run"):
        next(train(moved, tmp_path / "run", dataset=data))
