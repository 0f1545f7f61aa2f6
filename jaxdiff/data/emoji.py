"""Captioned pictures from the Noto Color Emoji font of this machine, as a folder for the source `folder`.

    python -m jaxdiff.data.emoji --out data/emoji
    python -m jaxdiff.data.emoji --out data/emoji --font NotoColorEmoji.ttf --size 64

The pictures are the font's own bitmaps (its CBDT table) on white; the captions are Unicode's names, from the package
`emoji` (extra `[emoji]`). Variants in skin tone only are left out unless `--skin_tones` asks for them.
"""

import argparse
import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.files import save_png, write_text
from jaxdiff.progress import progress_bar

PACKAGE = "fonts-noto-color-emoji"
FONT_NAMES = "NotoColorEmoji*.ttf"
VARIATION_SELECTOR = 0xFE0F  # "draw me in colour": emoji have it in their code, the font's ligatures do not
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONS, TAGS = range(0x1F1E6, 0x1F200), range(0xE0020, 0xE0080)  # what the codes of flags are made of
TYPEWRITER = str.maketrans("\u2019\u201c\u201d", '\'""')  # quotation marks as people type them
OTHER_KINDS = {"COLR": "COLR (vector layers)", "sbix": "sbix (Apple's)", "SVG ": "SVG", "glyf": "one of plain outlines"}

Code = tuple[int, ...]


def build(out: pathlib.Path, font: pathlib.Path | None = None, size: int = 128, skin_tones: bool = False) -> int:
    """Write out/images/<code>.png and out/metadata.jsonl (last, so that it names what is there); return how many.

    Raises ValueError, OSError or ImportError with one clear line.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    captions = read_captions(skin_tones)
    font = font or find_font()
    glyphs = read_glyphs(font)
    codes = [code for code in captions if code in glyphs]
    if not codes:
        raise ValueError(f"font {font} has none of the {len(captions):,} emoji that have names")
    lines = []
    with progress_bar(0, len(codes), "emoji", unit="image") as bar:
        for code in codes:
            name = f"images/{'-'.join(f'{point:04x}' for point in code)}.png"
            save_png(out / name, on_white(glyphs[code], size))
            lines.append(json.dumps({"file_name": name, "text": captions[code]}, ensure_ascii=False))
            bar.update()
    write_text(out / "metadata.jsonl", "\n".join(lines) + "\n")
    return len(lines)


def find_font() -> pathlib.Path:
    """Noto Color Emoji among the fonts of the user and of the machine."""
    own = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    folders = (f"{own}/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts")
    for folder in folders:
        for path in sorted(pathlib.Path(folder).expanduser().rglob(FONT_NAMES)):
            return path
    raise FileNotFoundError(
        f"there is no font Noto Color Emoji on this machine: install the Debian package {PACKAGE} "
        f"(apt install {PACKAGE}), or give a file with --font"
    )


def read_captions(skin_tones: bool = False) -> dict[Code, str]:
    """Name of every emoji by its code, variation selectors left out: (0x1F600,) -> "grinning face"."""
    try:
        from emoji import EMOJI_DATA, STATUS
    except ImportError as error:
        raise ImportError("the names of emoji need the package emoji: pip install 'jaxdiff[emoji]'") from error
    captions = {}
    for text, entry in EMOJI_DATA.items():
        code = tuple(ord(character) for character in text if ord(character) != VARIATION_SELECTOR)
        toned = any(point in SKIN_TONES for point in code)
        if entry["status"] == STATUS["fully_qualified"] and (skin_tones or not toned):
            name = str(entry["en"]).strip(":").replace("_", " ").translate(TYPEWRITER)
            captions[code] = f"flag of {name}" if code[0] in REGIONS or code[-1] in TAGS else name
    return dict(sorted(captions.items()))


def read_glyphs(path: pathlib.Path) -> dict[Code, bytes]:
    """PNG of everything that the font draws, by its code: single characters, and sequences through its ligatures."""
    from fontTools.ttLib import TTFont

    try:
        with open(path, "rb") as file, TTFont(file, fontNumber=0, lazy=True) as font:
            tables = set(font.keys())
            glyphs = _bitmaps(font) if "CBDT" in tables else None
    except OSError:
        raise
    except Exception as error:  # on damaged files fontTools raises many kinds: its own, AssertionError, KeyError ...
        raise ValueError(f"font {path} is damaged or no font: {error}") from error
    if glyphs is None:
        kind = next((words for table, words in OTHER_KINDS.items() if table in tables), "of an unknown kind")
        raise ValueError(
            f"font {path} has no colour bitmaps (no CBDT table), it is {kind}: take the font of the Debian package {PACKAGE}"
        )
    return glyphs


def _bitmaps(font: Any) -> dict[Code, bytes]:
    strike = max(font["CBDT"].strikeData, key=len)
    names = {(point,): name for point, name in font.getBestCmap().items()} | _sequences(font)
    found = {code: getattr(strike.get(name), "imageData", None) for code, name in names.items()}
    return {code: png for code, png in found.items() if png is not None}


def _sequences(font: Any) -> dict[Code, str]:
    """Glyph of every sequence of characters that the font joins into one (GSUB, lookups of type 4)."""
    if "GSUB" not in font:
        return {}
    characters = {name: code for code, name in font.getBestCmap().items()}
    lookups = font["GSUB"].table.LookupList.Lookup
    subtables = [getattr(table, "ExtSubTable", table) for lookup in lookups for table in lookup.SubTable]
    found = {}
    for subtable in subtables:
        for first, ligatures in getattr(subtable, "ligatures", {}).items():
            for ligature in ligatures:
                parts = [characters.get(name) for name in (first, *ligature.Component)]
                code = tuple(point for point in parts if point is not None)
                if len(code) == len(parts):
                    found[tuple(point for point in code if point != VARIATION_SELECTOR)] = ligature.LigGlyph
    return found


def on_white(png: bytes, size: int) -> np.ndarray:
    """A glyph in the middle of a white square, resized: uint8 [size size 3]."""
    try:
        glyph = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
    except Exception as error:  # Pillow's decoders raise every kind on damaged bytes
        raise ValueError(f"a glyph of the font cannot be decoded: {error}") from error
    width, height = glyph.size
    left, top, right, bottom = glyph.getchannel("A").getbbox() or (0, 0, 0, 0)
    # Noto's bitmaps are 136x128 with empty columns on both sides: the square cuts what is empty, and nothing else.
    reach = max(min(width, height) / 2, width / 2 - left, right - width / 2, height / 2 - top, bottom - height / 2)
    side = 2 * math.ceil(reach)
    left, top = (width - side) // 2, (height - side) // 2
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(glyph.crop((left, top, left + side, top + side)))  # transparent where it leaves the glyph
    picture = ground.convert("RGB")
    return np.asarray(picture if side == size else picture.resize((size, size), Image.Resampling.LANCZOS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (2: something is wrong, said in one line)."""
    parser = argparse.ArgumentParser(prog="python -m jaxdiff.data.emoji", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--font", type=pathlib.Path, help="NotoColorEmoji.ttf, if it is not where fonts lie")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--skin_tones", action="store_true", help="also the variants in five skin tones")
    options = parser.parse_args(arguments)
    out = options.out.expanduser()
    try:
        count = build(out, options.font and options.font.expanduser(), options.size, options.skin_tones)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{count:,} captioned images are in {out}: train on them with the source folder and the dir {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
