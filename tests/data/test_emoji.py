"""The emoji builder, on a font made here: bitmaps for one character, one ligature (a flag) and one skin tone."""

import io
import json
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import emoji
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import open_source

COLOURS = {"face": "yellow", "flag": "blue", "hand": "orange", "pale": "pink"}
CHARACTERS = {0x1F600: "face", 0x1F44B: "hand", 0x1F3FB: "tone", 0x1F1EB: "F", 0x1F1F7: "R", 0x41: "A"}


def glyph_png(colour, size=(10, 8)):
    """A disc's bounding square of `colour` between empty columns, as Noto's bitmaps have them."""
    image, file = Image.new("RGBA", size), io.BytesIO()
    image.paste(colour, (1, 0, 9, 8))
    image.save(file, "PNG")
    return file.getvalue()


def make_font(path):
    """A CBDT font with a GSUB table."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
    from fontTools.ttLib.tables.E_B_L_C_ import BitmapSizeTable, SbitLineMetrics, Strike, eblc_index_sub_table_1

    builder = FontBuilder(1024, isTTF=True)
    names = [".notdef", *COLOURS, "tone", "F", "R", "A"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(CHARACTERS)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (10, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    builder.addOpenTypeFeatures("feature ccmp { sub F R by flag; sub hand tone by pale; } ccmp;")
    font = builder.font
    bitmaps = {}
    for name, colour in COLOURS.items():
        bitmap = bitmaps[name] = cbdt_bitmap_format_17(b"", font)
        bitmap.metrics = SmallGlyphMetrics()
        vars(bitmap.metrics).update(height=8, width=10, BearingX=0, BearingY=8, Advance=10)
        bitmap.imageData = glyph_png(colour)
    strike = Strike()
    size = strike.bitmapSizeTable = BitmapSizeTable()
    vars(size).update(colorRef=0, startGlyphIndex=1, endGlyphIndex=4, ppemX=8, ppemY=8, bitDepth=32, flags=1)
    for direction in ("hori", "vert"):
        metrics = SbitLineMetrics()
        binary = "ascender descender widthMax caretSlopeNumerator caretSlopeDenominator caretOffset minOriginSB"
        vars(metrics).update(dict.fromkeys(f"{binary} minAdvanceSB maxBeforeBL minAfterBL pad1 pad2".split(), 0))
        setattr(size, direction, metrics)
    index = eblc_index_sub_table_1(b"", font)
    index.names = list(COLOURS)
    vars(index).update(indexFormat=1, imageFormat=17, firstGlyphIndex=1, lastGlyphIndex=4)
    strike.indexSubTables = [index]
    font["CBDT"], font["CBLC"] = newTable("CBDT"), newTable("CBLC")
    vars(font["CBDT"]).update(version=3.0, strikeData=[bitmaps])
    vars(font["CBLC"]).update(version=3.0, strikes=[strike])
    font.save(path)
    return path


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    return make_font(tmp_path_factory.mktemp("font") / "NotoColorEmoji.ttf")


def run(capsys, *arguments):
    """Exit status and the last line of the output or, if it failed, of the error."""
    status = emoji.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, (captured.err if status else captured.out).strip().splitlines()[-1]


def test_a_captioned_folder_for_the_source_folder(font, tmp_path, capsys):
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    out = tmp_path / "emoji"
    status, line = run(capsys, "--out", out, "--font", font, "--size", "16")
    assert status == 0 and line.startswith("3 captioned images are in") and "source folder" in line
    entries = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert entries == [
        {"file_name": "images/1f1eb-1f1f7.png", "text": "flag of France"},
        {"file_name": "images/1f44b.png", "text": "waving hand"},
        {"file_name": "images/1f600.png", "text": "grinning face"},
    ]
    assert sorted(path.name for path in (out / "images").iterdir()) == [entry["file_name"][7:] for entry in entries]
    source = open_source("folder", out, require_text=True)
    colours = {source[i]["text"]: source[i]["image"][8, 8].tolist() for i in range(3)}
    assert colours == {"flag of France": [0, 0, 255], "waving hand": [255, 165, 0], "grinning face": [255, 255, 0]}
    batch = Loader(source, 3, 0, image_size=8, channels=3)[0]
    assert {text: image[4, 4].tolist() for text, image in zip(batch["text"], batch["image"], strict=True)} == colours


def test_skin_tones_are_left_out_unless_asked_for(font, tmp_path):
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    assert emoji.build(tmp_path, font, 8, skin_tones=True) == 4
    assert '"text": "waving hand light skin tone"' in (tmp_path / "metadata.jsonl").read_text()
    assert emoji.build(tmp_path, font, 8) == 3


def test_names_of_all_emoji():
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    captions = emoji.read_captions()
    assert len(captions) > 1800 and len(emoji.read_captions(skin_tones=True)) > 3600
    assert captions[0x2764,] == "red heart"  # whose full code ends in the variation selector
    assert captions[0x31, 0x20E3] == "keycap 1" and captions[0x1F452,] == "woman's hat"
    assert captions[0x1F3F4, 0xE0067, 0xE0062, 0xE0065, 0xE006E, 0xE0067, 0xE007F] == "flag of England"
    assert all(text and "_" not in text and ":" not in text for text in captions.values())


def test_the_real_font_if_this_machine_has_it():
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    try:
        glyphs = emoji.read_glyphs(emoji.find_font())
    except FileNotFoundError:
        pytest.skip("needs the font Noto Color Emoji (Debian package fonts-noto-color-emoji)")
    captions = emoji.read_captions(skin_tones=True)
    assert len(captions.keys() & glyphs.keys()) > 0.9 * len(captions)
    assert (0x1F1EB, 0x1F1F7) in glyphs and (0x1F44B, 0x1F3FB) in glyphs and (0x31, 0x20E3) in glyphs
    assert emoji.on_white(glyphs[0x1F600,], 128).shape == (128, 128, 3)


def test_a_glyph_lies_in_the_middle_and_is_cut_only_where_it_is_empty():
    image = emoji.on_white(glyph_png("red"), 8)  # 10x8 with an empty column on both sides: exactly the square
    assert image.shape == (8, 8, 3) and (image == [255, 0, 0]).all()
    wide = Image.new("RGBA", (20, 8), "red")
    file = io.BytesIO()
    wide.save(file, "PNG")
    image = emoji.on_white(file.getvalue(), 20)  # nothing is empty: white above and below
    assert (image[6:14] == [255, 0, 0]).all() and (image[:6] == 255).all() and (image[14:] == 255).all()
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    file = io.BytesIO()
    half.save(file, "PNG")
    np.testing.assert_allclose(emoji.on_white(file.getvalue(), 8)[0, 0], [255, 127, 127], atol=1)


def test_without_a_font_the_debian_package_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    monkeypatch.setattr(emoji, "FONT_NAMES", "NoSuchFont*.ttf")
    status, line = run(capsys, "--out", tmp_path / "out")
    assert status == 2 and line.startswith("error: there is no font") and "apt install fonts-noto-color-emoji" in line
    assert not (tmp_path / "out").exists()


def test_the_font_is_found_among_the_users_fonts(font, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "fonts" / "noto"
    folder.mkdir(parents=True)
    (folder / font.name).write_bytes(font.read_bytes())
    assert emoji.find_font() == folder / font.name


def test_without_the_names_the_extra_is_named(font, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "emoji", None)
    status, line = run(capsys, "--out", tmp_path / "out", "--font", font)
    assert status == 2 and "pip install 'jaxdiff[emoji]'" in line and not (tmp_path / "out").exists()


def without_bitmaps(font, path, table):
    """The font with another table in place of its bitmaps."""
    from fontTools.ttLib import TTFont, newTable

    with TTFont(font) as changed:
        del changed["CBDT"], changed["CBLC"]
        changed[table] = newTable(table) if table == "glyf" else _raw(table)
        if table == "glyf":
            del changed[table]
        changed.save(path)
    return path


def _raw(table):
    from fontTools.ttLib.tables.DefaultTable import DefaultTable

    content = DefaultTable(table)
    content.data = bytes(16)
    return content


@pytest.mark.parametrize(
    ("table", "words"),
    [("COLR", r"it is COLR \(vector layers\)"), ("sbix", "it is sbix"), ("XYZ ", "it is of an unknown kind")],
)
def test_fonts_without_bitmaps_are_recognised(font, tmp_path, table, words):
    path = without_bitmaps(font, tmp_path / "other.ttf", table)
    with pytest.raises(ValueError, match=f"{words}.*fonts-noto-color-emoji") as caught:
        emoji.read_glyphs(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.9])
def test_a_damaged_font_is_one_line(font, tmp_path, capsys, keep, caplog):
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    caplog.set_level(logging.CRITICAL, "fontTools")
    whole, path = font.read_bytes(), tmp_path / "cut.ttf"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    status, line = run(capsys, "--out", tmp_path / "out", "--font", path)
    assert status == 2 and "cut.ttf is damaged or no font" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--font", "nowhere.ttf"], "error: [Errno 2] No such file or directory: 'nowhere.ttf'"),
        (["--size", "0"], "size must be at least 1, not 0"),
    ],
)
def test_other_wrong_arguments(tmp_path, capsys, arguments, message):
    pytest.importorskip("emoji", reason="the names come from the extra [emoji]")
    status, line = run(capsys, "--out", tmp_path / "out", *arguments)
    assert status == 2 and message in line and not (tmp_path / "out").exists()
