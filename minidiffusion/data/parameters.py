"""How a picture was made, as the text that other tools read and write under "parameters" in a PNG.

The prompt, then perhaps a line that starts with "Negative prompt: ", then one line of settings that
starts with "Steps: " (the convention of AUTOMATIC1111's web UI). Read back, every field comes back
to the letter. A prompt that those lines cannot hold unharmed is repeated among the settings.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "plms": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
"""Rows of ``diffusion.SAMPLERS`` as that program calls them."""
SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "linspace": "Uniform",
    "beta": "Beta",
}
"""Rows of ``diffusion.SPACINGS`` that it has as well; the others stand under "Spacing"."""
SUFFIXES = ("karras", "exponential")  # spacings that are written behind the sampler's name
NEGATIVE = "Negative prompt:"
MOST_TEXT = 8_000_000
"""Bytes of text in a PNG's header; the usual reading library takes no more at once."""
KNOWN = {
    "Steps", "Sampler", "Schedule type", "Spacing", "CFG scale", "Seed", "Size", "Model hash",
    "Model", "Denoising strength", "Version", "Prompt", "Negative prompt",
}  # fmt: skip
NAME = re.compile(r"\w[\w /-]{0,60}\w")
SETTING = re.compile(r'\s*(\w[\w /-]{0,60}\w): ?("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)')


@dataclass(frozen=True)
class Facts:
    """What made a picture; None is what is not known.

    sampler, spacing: rows of SAMPLERS and SPACINGS; a text of another program may name others.
    width, height: pixels; both or neither. model: its name. model_hash: the first ten letters of
    its file's SHA-256. strength: of img2img, 0..1. extra: further settings, name to text.
    """

    prompt: str
    steps: int
    negative_prompt: str = ""
    sampler: str | None = None
    spacing: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model_hash: str | None = None
    model: str | None = None
    strength: float | None = None
    version: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


def write_parameters(facts: Facts) -> str:
    """The text for the key "parameters". Raises ValueError for a number that is not finite, or an
    extra setting whose name is taken or holds other letters than words, spaces, / and -."""
    for name in facts.extra:
        if name in KNOWN or not NAME.fullmatch(name):
            raise ValueError(f"extra setting {name!r}: a name of its own, in words")
    pairs = [("Steps", str(facts.steps)), *_method(facts)]
    pairs += [
        (name, _number(value) if isinstance(value, float) else str(value))
        for name, value in (
            ("CFG scale", facts.guidance_scale),
            ("Seed", facts.seed),
            ("Size", f"{facts.width}x{facts.height}" if facts.width and facts.height else None),
            ("Model hash", facts.model_hash),
            ("Model", facts.model),
            ("Denoising strength", facts.strength),
            *facts.extra.items(),
            ("Version", facts.version),
        )
        if value is not None
    ]
    prompts = facts.prompt, facts.negative_prompt
    head = facts.prompt + "\n" if facts.prompt else ""
    head += f"{NEGATIVE} {facts.negative_prompt}\n" if facts.negative_prompt else ""
    if _prompts(head) != prompts:
        pairs += zip(("Prompt", "Negative prompt"), prompts, strict=True)
    return head + ", ".join(f"{name}: {_quoted(text)}" for name, text in pairs)


def read_parameters(text: str) -> Facts:
    """What ``write_parameters`` was given, or what another program wrote. Raises ValueError."""
    head, newline, line = text.rstrip().rpartition("\n")
    if not line.startswith("Steps:"):
        raise ValueError("parameters: their last line must start with 'Steps: '")
    found = dict(_settings(line))
    prompt, negative = _prompts(head + newline)
    sampler, spacing = _sampling(found)
    width, height = _sides(found)
    return Facts(
        prompt=found.get("Prompt", prompt),
        negative_prompt=found.get("Negative prompt", negative),
        steps=_whole(found, "Steps") or 0,
        sampler=sampler,
        spacing=spacing,
        guidance_scale=_real(found, "CFG scale"),
        seed=_whole(found, "Seed"),
        width=width,
        height=height,
        model_hash=found.get("Model hash"),
        model=found.get("Model"),
        strength=_real(found, "Denoising strength"),
        version=found.get("Version"),
        extra={name: value for name, value in found.items() if name not in KNOWN},
    )


def _settings(line: str) -> Iterator[tuple[str, str]]:
    """Name and value, from one comma to the next: a line without sense costs no time."""
    place = 0
    while place < len(line):
        match = SETTING.match(line, place)
        if match is None:
            place = line.find(",", place) + 1 or len(line)
        else:
            place = match.end()
            yield match[1], _unquoted(match[2])


def _prompts(head: str) -> tuple[str, str]:
    """The prompt and the negative one, of the lines before the settings."""
    first, _, rest = ("\n" + head.removesuffix("\n")).partition("\n" + NEGATIVE)
    return first[1:], rest.removeprefix(" ")


def _method(facts: Facts) -> list[tuple[str, str]]:
    sampler, spacing = facts.sampler, facts.spacing
    pairs = []
    if sampler is not None:
        suffix = f" {SCHEDULES[spacing]}" if spacing in SUFFIXES else ""
        pairs.append(("Sampler", SAMPLER_NAMES.get(sampler, sampler) + suffix))
    if spacing is not None and (sampler is None or spacing not in SUFFIXES):
        key = "Schedule type" if spacing in SCHEDULES else "Spacing"
        pairs.append((key, SCHEDULES.get(spacing, spacing)))
    return pairs


def _sampling(found: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Our names of the sampler and the spacing; a name that we have not stays as it is."""
    sampler, schedule = found.get("Sampler"), found.get("Schedule type", "Automatic")
    spacing = found.get("Spacing")
    if schedule != "Automatic":
        spacing = {name: row for row, name in SCHEDULES.items()}.get(schedule, schedule)
    for suffix in SUFFIXES:
        if sampler is not None and sampler.endswith(f" {SCHEDULES[suffix]}"):
            sampler, spacing = sampler.removesuffix(f" {SCHEDULES[suffix]}"), suffix
    if sampler is not None:
        sampler = {name: row for row, name in SAMPLER_NAMES.items()}.get(sampler, sampler)
    return sampler, spacing


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"parameters: {value} is not finite")
    return repr(value).removesuffix(".0")


def _quoted(text: str) -> str:
    """As a JSON string, where a comma, a colon, a quote or a blank at an end would mislead."""
    plain = text.isprintable() and text == text.strip() and not set(text) & set(',:"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) < 2 or not text.startswith('"'):
        return text
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        return text


def _sides(found: Mapping[str, str]) -> tuple[int | None, int | None]:
    if "Size" not in found:
        return None, None
    sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", found["Size"])
    if sides is None:
        raise ValueError(f"parameters: Size: expected WIDTHxHEIGHT, got {found['Size'][:40]!r}")
    return int(sides[1]), int(sides[2])


def _whole(found: Mapping[str, str], name: str) -> int | None:
    if name not in found:
        return None
    if not re.fullmatch(r"-?[0-9]{1,40}", found[name]):
        raise ValueError(f"parameters: {name}: expected a whole number, got {found[name][:40]!r}")
    return int(found[name])


def _real(found: Mapping[str, str], name: str) -> float | None:
    if name not in found:
        return None
    try:
        value = float(found[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"parameters: {name}: expected a number, got {found[name][:40]!r}")
    return value


def check_texts(metadata: Mapping[str, str]) -> None:
    """Raises ValueError for texts that a PNG cannot hold: ask before the picture is made."""
    for key, text in metadata.items():
        if not (0 < len(key) < 80 and key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError(f"metadata {key[:79]!r}: a name has 1..79 printable ASCII letters")
        if "\0" in text:
            raise ValueError(f"metadata {key!r}: holds the character NUL, where a PNG's text ends")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"metadata {key!r}: holds half a surrogate pair, which is no letter")
    count = sum(len(text.encode()) for text in metadata.values())
    if count > MOST_TEXT:
        raise ValueError(f"metadata: {count} bytes of text; a PNG's header takes {MOST_TEXT}")
