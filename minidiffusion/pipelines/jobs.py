"""Large sets cut into shards of work: prompts to be drawn, pictures and captions to be encoded.

What becomes of a shard is a function of the job and of the shard alone. So any machine may make
it, in any order and as often as it takes, and the bytes are the same.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.checkpoints.reader import pieces
from minidiffusion.data.folder import Folder, Quarantine
from minidiffusion.data.parameters import check_texts
from minidiffusion.data.pictures import BadPicture, Fit, load_picture, open_plain, png
from minidiffusion.data.shardindex import Sample, at, contents
from minidiffusion.data.shards import expanded
from minidiffusion.data.shardwriter import Parts, check
from minidiffusion.data.tar import printed, spans
from minidiffusion.pipelines.generation import ImageLoop
from minidiffusion.pipelines.inputs import Inputs
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.pipelines.settings import (
    Settings,
    batch_of,
    batches,
    prepared,
    settled,
    stream_options,
    windows,
)
from minidiffusion.typed import plain

LARGEST = 2**14
"""Pixels a side of what is encoded."""

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Work(NamedTuple):
    """One shard that is to be made: its file's name, and what of, as JSON."""

    name: str
    what: str


class Cut(NamedTuple):
    """All the shards of a job, and what is bad before any of them is made."""

    works: list[Work]
    bad: Quarantine


@dataclass(frozen=True)
class Drawing:
    """Prompts become pictures: prompt i with seed + i, in batches of ``batch_size``.

    settings.threads: of every worker; they decide the last bits, and so does the batch size.
    """

    settings: Settings
    batch_size: int = 1

    def cut(self, prompts: Sequence[str], per_shard: int) -> Cut:
        """A shard holds whole batches: the pictures are those of one run over all the prompts."""
        if not prompts or self.batch_size < 1:
            raise ValueError(f"{len(prompts)} prompts by {self.batch_size}: at least 1 each")
        if per_shard < 1 or per_shard % self.batch_size:
            raise ValueError(
                f"per_shard: a multiple of the batch size, {self.batch_size}, got {per_shard}"
            )
        starts = range(0, len(prompts), per_shard)
        whats = [json.dumps([at, prompts[at : at + per_shard]]) for at in starts]
        return Cut(numbered(whats), [])

    def facts(self) -> dict[str, object]:
        """What decides the shards, beside what they are made of."""
        return {"job": "generate", **plain(self.settings), "batch_size": self.batch_size}

    def samples(self, pipe: Pipeline, what: str, bad: Quarantine) -> Iterator[Parts]:
        """NUMBER.png as `minidiffusion generate` writes it, .txt: its prompt, .json: settings."""
        first, prompts = json.loads(what)
        s, inputs = self.settings, prepared(self.settings, pipe)
        settled(s, pipe, inputs, "")  # what no prompt could be drawn with is no prompt's fault
        every = [replace(s, prompt=p, seed=s.seed + first + i) for i, p in enumerate(prompts)]
        wrong = {one.seed: fault(pipe, one) for one in every}
        every = [replace(one, prompt="") if wrong[one.seed] else one for one in every]
        loop = ImageLoop(pipe, inputs)
        for batch in batches(pipe, every, self.batch_size):
            for one, picture in attempted(loop, batch):
                key = f"{one.seed - s.seed:09d}"
                if isinstance(picture, str) or wrong[one.seed]:
                    bad.append((key, wrong[one.seed] or str(picture)))
                    continue
                done = settled(one, pipe, inputs, s.model_hash)
                known = json.dumps(plain(done), sort_keys=True).encode()
                text = one.prompt.encode()
                yield Parts(key, {"png": png(picture, done.facts()), "txt": text, "json": known})


def fault(pipe: Pipeline, one: Settings) -> str:
    """Why a prompt cannot be drawn, or nothing. A batch has an empty one in its place."""
    try:
        one.prompt.encode()
        check_texts(one.facts())
        windows(pipe, one.prompt)
    except UnicodeEncodeError:
        return "not UTF-8"
    except ValueError as error:
        return str(error)
    return ""


def attempted(
    loop: ImageLoop, batch: Sequence[Settings]
) -> Iterator[tuple[Settings, "Picture | str"]]:
    """The pictures of a batch, or why there is none of one.

    Where the batch fails, each is drawn in one of the same shape that is all its own: what is
    wrong with it neither costs nor changes its neighbours' pictures.
    """
    try:
        yield from zip(batch, loop.batch(**stream_options(batch)), strict=True)
        return
    except ValueError:
        pass
    for one in batch:
        try:
            yield one, loop.batch(**stream_options(batch_of(one)))[one.row]
        except ValueError as error:
            yield one, str(error)


@dataclass(frozen=True)
class Encoding:
    """Pictures become latents, captions what a denoiser is conditioned on.

    size: the square, in pixels, that every picture is fitted to; None is the model's own.
    """

    settings: Settings
    batch_size: int = 1
    size: int | None = None
    fit: Fit = "crop"

    def cut(self, data: str, per_shard: int) -> Cut:
        """Of a folder, as `data: folder` reads it, so many pictures a shard; of tars one each."""
        if per_shard < 1 or self.batch_size < 1:
            raise ValueError(f"per_shard {per_shard}, batch size {self.batch_size}: at least 1")
        if self.size is not None and not 1 <= self.size <= LARGEST:
            raise ValueError(f"size: must be 1 to {LARGEST} pixels a side, got {self.size}")
        root = Path(data).absolute()
        if root.is_dir() and not any(root.glob("[!.]*.tar")):
            entries, bad = Folder(str(root), size=8).listed()
            files = [[str(root / one.name), one.name, one.caption] for one in entries]
            starts = range(0, len(files), per_shard)
            whats = [json.dumps([at, files[at : at + per_shard]]) for at in starts]
            return Cut(numbered(whats), bad)
        tars = [path.absolute() for path in expanded(data)]
        return Cut(numbered([json.dumps([str(one), one.stat().st_size]) for one in tars]), [])

    def facts(self) -> dict[str, object]:
        """What decides the shards, beside what they are made of."""
        own = {"batch_size": self.batch_size, "size": self.size, "fit": self.fit}
        return {"job": "encode", **plain(self.settings), **own}

    def samples(self, pipe: Pipeline, what: str, bad: Quarantine) -> Iterator[Parts]:
        """KEY.safetensors: mean and deviation (c, h, w) as the denoiser wants them, in float32,
        tokens (n, d) and pooled (e) of the caption; .txt: the caption, .json: the source."""
        if pipe.autoencoder is None:
            raise ValueError(f"{self.settings.model}: a model of pixels: it has no latents")
        first, rest = json.loads(what)
        read = in_tar(Path(first), rest, bad) if isinstance(first, str) else in_folder(first, rest)
        batch: list[Item] = []
        for key, name, source, caption in read:
            try:
                batch.append(self._item(pipe, key, name, source, caption))
            except BadPicture as error:
                bad.append((name, error.reason))
            except (ValueError, OSError) as error:
                bad.append((name, str(error)))
            if len(batch) == self.batch_size:
                yield from encoded(pipe, batch)
                batch = []
        if batch:
            yield from encoded(pipe, batch)

    def _item(
        self, pipe: Pipeline, key: str, name: str, source: Path | BytesIO, caption: str | None
    ) -> "Item":
        check(Parts(key, {"safetensors": b""}))
        rows, columns = (self.size, self.size) if self.size else pipe.picture_size(Inputs())
        image = load_picture(source, channels=3, size=(rows, columns), fit=self.fit)
        words: dict[str, Tensor] = {}
        if caption is not None and pipe.text is not None:
            cond = pipe.condition(caption)._asdict()
            words = {part: row[0] for part, row in cond.items() if row is not None}
        known = {"file": name, "size": [rows, columns], "fit": self.fit}
        return Item(key, image, words, caption, known)


class Item(NamedTuple):
    """A picture in [-1, 1] on its way, and what its caption has become."""

    key: str
    image: Float[Tensor, "c h w"]
    words: Mapping[str, Tensor]
    caption: str | None
    known: Mapping[str, object]


Read = Iterator[tuple[str, str, Path | BytesIO, str | None]]
"""Key, name, picture and caption of each."""


def in_folder(first: int, files: Sequence[Sequence[str]]) -> Read:
    for number, (path, name, caption) in enumerate(files, start=first):
        yield f"{number:09d}", name, Path(path), caption


def in_tar(path: Path, size: int, bad: Quarantine) -> Read:
    """The samples of a shard, in their order; those that are none are in quarantine."""
    with open_plain(path) as file:
        for span in spans(file, size):
            name = f"{path.name}: {printed(span.key)}" if span.key else path.name
            try:
                sample: Sample = contents(span, at(file, span.start, span.end - span.start))
            except ValueError as error:
                bad.append((name, str(error)))
                continue
            yield span.key, name, BytesIO(sample.picture), sample.caption


@torch.no_grad()
def encoded(pipe: Pipeline, batch: Sequence[Item]) -> Iterator[Parts]:
    means, deviations = pipe.moments(torch.stack([one.image for one in batch]).to(pipe.device))
    for one, mean, deviation in zip(batch, means, deviations, strict=True):
        tensors = {"mean": mean, "deviation": deviation, **one.words}
        known = json.dumps(one.known, sort_keys=True).encode()
        parts = {"safetensors": b"".join(pieces(tensors, {})), "json": known}
        text = {} if one.caption is None else {"txt": one.caption.encode()}
        yield Parts(one.key, parts | text)


def numbered(whats: Sequence[str]) -> list[Work]:
    return [Work(f"part-{k:06d}.tar", what) for k, what in enumerate(whats)]


def digest(works: Sequence[Work]) -> str:
    """SHA-256 of everything that the shards are made of."""
    return hashlib.sha256("\0".join(work.what for work in works).encode()).hexdigest()
