"""Make minidiffusion/assets/emoji/emoji.zip: emoji in three styles, 64 pixels, with captions.

npm pack @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 \\
    emoji-datasource-google@16.0.0 emojibase-data@17.0.0
pip install -c constraints.txt resvg-py==0.5.0
python scripts/build_emoji.py FOLDER_OF_THE_FOUR_TGZ

Pictures lie on white, in sheets of 32 by 32 (AVIF without chroma subsampling: a quarter of PNG's
size at about 39 dB). Line i of pairs.jsonl belongs to the i-th picture, in reading order. What is
held out is decided by a hash of the emoji's code: nothing of it depends on a generator's version.
"""

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

PACKAGES = {
    "lobehub-fluent-emoji-3d-1.1.0":
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "iconify-json-fluent-emoji-flat-1.2.6":
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "emoji-datasource-google-16.0.0":
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emojibase-data-17.0.0":
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}  # fmt: skip
OUT = Path(__file__).parents[1] / "minidiffusion" / "assets" / "emoji" / "emoji.zip"
SIDE, ACROSS, QUALITY = 64, 32, 72
CONCEPTS, COMBINATIONS = 0.055, 0.135
"""Shares of the concepts: held out in every style; held out in one."""
Pixels = NDArray[np.uint8]
Members = dict[str, bytes]


def members(folder: Path, package: str) -> Members:
    path = folder / f"{package}.tgz"
    if hashlib.sha256(path.read_bytes()).hexdigest() != PACKAGES[package]:
        sys.exit(f"{path}: is not the file that this script was written for")
    with tarfile.open(path) as archive:
        kept = [one for one in archive if one.isfile()]
        files = [(one.name.removeprefix("package/"), archive.extractfile(one)) for one in kept]
        return {name: file.read() for name, file in files if file}


def code(name: str) -> str:
    """One name for an emoji: lower case, without leading zeros and variation selectors."""
    parts = name.lower().replace("_", "-").split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def pictures(folder: Path) -> dict[str, dict[str, bytes]]:
    """Of each style: code -> a file that Pillow reads."""
    fluent, flat, noto = (members(folder, name) for name in list(PACKAGES)[:3])
    prefix = "img/google/64/"
    icons, chars = json.loads(flat["icons.json"]), json.loads(flat["chars.json"])
    return {
        "3d": {code(Path(n).stem): data for n, data in fluent.items() if n.endswith(".webp")},
        "flat": {code(key): drawn(icons, name) for key, name in chars.items()},
        "noto": {code(Path(n).stem): d for n, d in noto.items() if n.startswith(prefix)},
    }


def drawn(icons: dict[str, Any], name: str) -> bytes:
    """An icon of an iconify set as PNG."""
    parent = icons["aliases"][name]["parent"] if name not in icons["icons"] else name
    icon, side = icons["icons"][parent], icons["height"]
    box = f'viewBox="0 0 {icon.get("width", side)} {icon.get("height", side)}"'
    size = f'width="{SIDE}" height="{SIDE}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {box} {size}>{icon["body"]}</svg>'
    return bytes(resvg_py.svg_to_bytes(svg_string=svg))


def on_white(data: bytes) -> Pixels:
    picture = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")  # premultiplied
    if picture.size != (SIDE, SIDE):
        whole = picture.width % SIDE == 0 and picture.width == picture.height
        picture = picture.resize(
            (SIDE, SIDE), Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
        )
    colour, opacity = np.split(np.asarray(picture).astype(int), [3], axis=2)
    return np.clip(colour + 255 - opacity, 0, 255).astype(np.uint8)


def draw(key: str, purpose: str) -> float:
    """A number in [0, 1) that belongs to this key."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {key}".encode()).digest()[:6]) / 2**48


def split(concept: str, style: str, styles: list[str]) -> str:
    """train, concept (never seen) or combination (never seen in this style)."""
    place = draw(concept, "split")
    if place < CONCEPTS:
        return "concept"
    one = styles[int(draw(concept, "style") * len(styles))]
    held = len(styles) > 1 and place < CONCEPTS + COMBINATIONS and style == one
    return "combination" if held else "train"


def pairs(folder: Path) -> Iterator[tuple[dict[str, object], bytes]]:
    """(what is known of it, its file) of every picture, those without a skin tone first."""
    texts = members(folder, "emojibase-data-17.0.0")
    groups = {g["order"]: g["message"] for g in json.loads(texts["en/messages.json"])["groups"]}
    found, files = json.loads(texts["en/data.json"]), pictures(folder)
    plain = [(one, one, False) for one in found]
    toned = [(skin, one, True) for one in found for skin in one.get("skins", [])]
    for emoji, base, tone in plain + toned:
        concept, own = code(base["hexcode"]), code(emoji["hexcode"])
        styles = [style for style, there in files.items() if concept in there]
        for style in files:
            if own in files[style] and styles:
                facts: dict[str, object] = {
                    "concept": concept, "style": style, "label": emoji["label"],
                    "tags": base.get("tags", []), "group": groups.get(base.get("group"), "symbols"),
                    "tone": tone, "split": split(concept, style, styles),
                }  # fmt: skip
                yield facts, files[style][own]


def sheet(pixels: list[Pixels]) -> bytes:
    blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
    full = np.stack(pixels + [blank] * (-len(pixels) % ACROSS))
    rows = full.reshape(-1, ACROSS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    file = io.BytesIO()
    picture = Image.fromarray(rows.reshape(-1, ACROSS * SIDE, 3))
    picture.save(file, "AVIF", quality=QUALITY, subsampling="4:4:4", speed=3)
    return file.getvalue()


def main(folder: Path) -> None:
    facts, files = zip(*pairs(folder), strict=True)
    OUT.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(OUT, "w") as archive:

        def write(name: str, data: bytes | str, how: int) -> None:
            archive.writestr(zipfile.ZipInfo(name), data, how, 9)  # of 1980: the same bytes always

        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in facts)
        write("pairs.jsonl", lines, zipfile.ZIP_DEFLATED)
        for first in range(0, len(files), ACROSS**2):
            pixels = [on_white(data) for data in files[first : first + ACROSS**2]]
            write(f"sheet-{first // ACROSS**2:02}.avif", sheet(pixels), zipfile.ZIP_STORED)
    print(f"{OUT}: {len(files)} pictures, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/build_emoji.py FOLDER_OF_THE_FOUR_TGZ")
    main(Path(sys.argv[1]))
