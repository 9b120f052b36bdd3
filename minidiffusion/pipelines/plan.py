"""What a model takes of memory, from the headers of its files: no weight is read, none multiplied.

Whole runs of `generate` on a CPU, of models of 0.4 to 0.9 GB at 512 pixels, stayed within 4 % of
it in float32 and in bfloat16.
"""

from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from minidiffusion.checkpoints import official
from minidiffusion.checkpoints.catalog import Row, is_run, opened
from minidiffusion.checkpoints.official import Source, sources
from minidiffusion.checkpoints.parts import Encoders, load_parts, of_t5
from minidiffusion.layers.modulation import AdaLN
from minidiffusion.layers.quantized import How
from minidiffusion.models import MMDiT
from minidiffusion.pipelines.activations import FACTOR, META, Job, nbytes, rebuilt, working
from minidiffusion.pipelines.inputs import MOST_PICTURES, Given, check_size, whole_patches
from minidiffusion.pipelines.memory import TILE

PROGRAM = 450_000_000
"""Python, torch and its libraries' buffers, measured after a picture; a GPU's context is alike."""


class Way(NamedTuple):
    """How a model is held. tile: as in `Pipeline`. quantize: linear layers of the denoiser and T5.

    freeze: its adaptive norms are computed once, see `MMDiT.freeze`.
    """

    offload: bool = False
    tile: int | None = None
    freeze: bool = False
    quantize: How | None = None
    t5: bool = True

    @property
    def options(self) -> str:
        """As the command line has them."""
        words = [
            f"--quantize {self.quantize}" if self.quantize else "",
            "--freeze-ladder" if self.freeze else "",
            "--offload" if self.offload else "",
            f"--tile {self.tile}" if self.tile else "",
            "" if self.t5 else "--no-t5",
        ]
        return " ".join(filter(None, words))


class Need(NamedTuple):
    """Bytes of a part: its weights, and what its forward pass adds at most."""

    part: str
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.activations


class Total(NamedTuple):
    """Bytes of the whole, held in one way: on the device, and in RAM beside it if that is none."""

    way: Way
    peak: int
    host: int


class Plan(NamedTuple):
    """parts: held as asked. totals: held as asked first, then in ever more sparing ways."""

    family: str
    job: Job
    parts: list[Need]
    totals: list[Total]

    def choice(self, room: int) -> Total | None:
        """The first way that fits into so many bytes, which is the least of changes."""
        return next((total for total in self.totals if total.peak <= room), None)


def plan(
    path: str | Path, *, width: int | None = None, height: int | None = None, batch: int = 1,
    dtype: torch.dtype = torch.bfloat16, guidance: float | None = None,
    device: torch.device | str = "cpu", way: Way | None = None,
    text_encoders: str | Path | None = None,
) -> Plan:  # fmt: skip
    """The plan of an official model, or of parts of one, with what is not given as the model's own.

    device: need not be there; its type alone counts. Parts that the files lack are left out.
    Raises OSError or ValueError with one line, as loading does.
    """
    path, where, way = Path(path), torch.device(device), way or Way()
    networks, row = hollow_parts(path, dtype, text_encoders, way)
    own = (512, 512) if row is None else (FACTOR * row.shape[-2], FACTOR * row.shape[-1])
    rows, columns = check_size(width, height, own)
    if row is not None:
        whole_patches(Given(width=columns, height=rows), row, FACTOR)
    if not 1 <= batch <= MOST_PICTURES:
        raise ValueError(f"batch size: must be 1..{MOST_PICTURES}, got {batch}")
    scale = guidance if guidance is not None else row.sampling.guidance if row else 1.0
    job = Job(columns, rows, batch, dtype, scale, where)
    need = cache(partial(needed, networks, row, job))

    def needs(one: Way) -> list[Need]:
        return [need(name, held(name, one)) for name in networks if one.t5 or name != "T5"]

    totals: list[Total] = []
    for one in (way, *sparing(way, networks, job)):
        total = summed(needs(one), one, where)
        if total[1:] not in [other[1:] for other in totals]:  # one that saves nothing more
            totals.append(total)
    return Plan(row.family if row else "", job, needs(way), totals)


def hollow_parts(
    path: Path, dtype: torch.dtype, text_encoders: str | Path | None, way: Way
) -> tuple[dict[str, nn.Module], Row | None]:
    """The networks in the order of their work, checked as loading checks them, without weights."""
    files = opened(path)
    if is_run(files):
        raise ValueError(f"{path}: a run of our own; only official models are planned")
    found = sources(path, files)
    if all(source.part.kind != "denoiser" for source in found):
        return loose(found, dtype), None
    parts = load_parts(
        path, device=META, dtype=dtype, optional=True, text_encoders=text_encoders, t5=way.t5
    )
    text = parts.text
    modules: dict[str, nn.Module | None] = {}
    if isinstance(text, Encoders):
        modules |= {"T5": text.t5, "CLIP-bigG": text.clip_g, "CLIP-L": text.clip_l}
    else:
        modules["text encoder"] = text
    modules |= {"denoiser": parts.denoiser.network, "autoencoder": parts.autoencoder}
    if way.freeze and not isinstance(parts.denoiser.network, MMDiT):
        raise ValueError("freeze_ladder: only for Stable Diffusion 3")
    there = {name: module for name, module in modules.items() if module is not None}
    return there, parts.denoiser.row


def loose(found: list[Source], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Parts without a denoiser; the second of a kind, and so on, has its number."""
    networks: dict[str, nn.Module] = {}
    count: Counter[str] = Counter()
    for one in found:
        kind = one.part.kind
        count[kind] += 1
        name = f"{kind} {count[kind]}" if count[kind] > 1 else kind
        networks[name] = official.load(one, official.config_of(one, {}), META, dtype)
    return networks


def held(name: str, way: Way) -> Way:
    """What a way changes in a part: so that each is counted once."""
    how = way.quantize
    stored = {"denoiser": how, "T5": how and of_t5(how)}
    return Way(
        tile=way.tile if name == "autoencoder" else None,
        freeze=way.freeze and name == "denoiser",
        quantize=stored.get(name),
    )


def needed(networks: dict[str, nn.Module], row: Row | None, job: Job, name: str, way: Way) -> Need:
    network = networks[name]
    weights = network
    if way.quantize is not None:
        weights = rebuilt(network.config, job, way.quantize)
    size = nbytes(weights)
    if way.freeze and row is not None:
        numbers = 1 + row.sampling.steps * job.rows
        norms = [layer.linear for layer in weights.modules() if isinstance(layer, AdaLN)]
        wide = sum(cast(nn.Linear, layer).out_features for layer in norms)
        size += numbers * wide * job.computed.itemsize - sum(map(nbytes, norms))
    return Need(name, size, working(network, row, job, way.quantize, way.tile))


def sparing(way: Way, networks: dict[str, nn.Module], job: Job) -> list[Way]:
    """Other ways, those first that change the picture least; none that would change nothing."""
    flow = isinstance(networks.get("denoiser"), MMDiT)
    side = max(job.width, job.height) // FACTOR
    tile = way.tile or (TILE if "autoencoder" in networks and side > TILE else None)
    int8 = way.quantize or ("int8" if "denoiser" in networks else None)
    apart = way._replace(offload=way.offload or len(networks) > 1)
    small = way._replace(quantize=int8)
    frozen = apart._replace(tile=tile, freeze=way.freeze or flow)
    short = way._replace(t5=way.t5 and not (flow and "T5" in networks))
    found = [
        way._replace(tile=tile), apart, apart._replace(tile=tile), frozen, small,
        small._replace(tile=tile), frozen._replace(quantize=int8),
        short, short._replace(tile=tile, offload=apart.offload),
        frozen._replace(t5=short.t5), frozen._replace(quantize=int8, t5=short.t5),
    ]  # fmt: skip
    return [one for one in dict.fromkeys(found) if one != way]


def summed(needs: list[Need], way: Way, device: torch.device) -> Total:
    """All weights and the most that a part adds; or each part in its turn, see `at_work`."""
    weights = sum(need.weights for need in needs)
    if not way.offload:
        return Total(way, PROGRAM + weights + max(need.activations for need in needs), 0)
    if device.type != "cpu":
        return Total(way, PROGRAM + max(need.peak for need in needs), weights)
    stays = sum(need.weights for need in needs if need.part == "autoencoder")
    turns = [need.peak + (need.part != "autoencoder") * stays for need in needs]
    return Total(way, PROGRAM + max(turns), 0)
