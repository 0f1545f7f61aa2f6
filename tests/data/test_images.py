"""Decoding: every kind of image file comes out as a person sees it; damage is one kind of error."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.images import CorruptImage, decode_image, is_grey

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), np.uint8)
GREY = COLOUR[..., 0]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_lossless_files_give_exactly_their_pixels():
    for data in (
        encode(Image.fromarray(COLOUR), "PNG"),
        encode(Image.fromarray(COLOUR), "BMP"),
        encode(Image.fromarray(COLOUR), "WEBP", lossless=True),
    ):
        np.testing.assert_array_equal(decode_image(data, "x"), COLOUR)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(GREY)), "x"), GREY[..., None])


def test_jpeg_is_close():
    smooth = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (32, 32, 3)).copy()
    decoded = decode_image(encode(Image.fromarray(smooth), "JPEG", quality=95), "x")
    np.testing.assert_allclose(decoded.astype(int), smooth, atol=4)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90), (2, lambda x: x[:, ::-1])],
)
def test_exif_orientation_is_honoured(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(COLOUR), exif=exif), "x"), upright(COLOUR))


def test_transparency_lies_on_white():
    alpha = np.zeros((6, 9, 1), np.uint8)
    alpha[:, 3:] = 255
    alpha[:, 6:] = 128
    decoded = decode_image(encode(Image.fromarray(np.concatenate([COLOUR, alpha], -1))), "x").astype(int)
    assert (decoded[:, :3] == 255).all()
    np.testing.assert_array_equal(decoded[:, 3:6], COLOUR[:, 3:6])
    np.testing.assert_allclose(decoded[:, 6:], (COLOUR[:, 6:] * 128.0 + 255 * 127) / 255, atol=1)
    grey = decode_image(encode(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha[..., 0])])), "x")
    assert grey.shape == (6, 9, 1) and (grey[:, :3] == 255).all()
    np.testing.assert_array_equal(grey[:, 3:6, 0], GREY[:, 3:6])


def test_palettes_are_looked_up_also_with_transparency():
    indices = Image.new("P", (9, 6))
    indices.putdata((GREY % 3).ravel().tolist())
    table = np.array([[255, 0, 0], [10, 200, 30], [0, 0, 255]], np.uint8)
    indices.putpalette(table.ravel().tolist())
    np.testing.assert_array_equal(decode_image(encode(indices), "x"), table[GREY % 3])
    table[1] = 255
    np.testing.assert_array_equal(decode_image(encode(indices, transparency=1), "x"), table[GREY % 3])
    data = encode(indices, transparency=bytes([255, 0, 255]))
    np.testing.assert_array_equal(decode_image(data, "x"), table[GREY % 3])


def test_16_bit_grey_keeps_its_upper_bits():
    levels = np.array([[0, 128, 129, 256, 32768, 65535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(levels)), "x")
    np.testing.assert_array_equal(decoded[0, :, 0], np.round(levels[0] / 65535 * 255))


def test_1_bit_is_black_and_white():
    bits = GREY > 127
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(bits)), "x")[..., 0], bits * 255)


def test_cmyk_becomes_rgb():
    white = decode_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), "x")
    assert white.shape == (8, 8, 3) and (white > 250).all()


def test_what_is_no_image_is_corrupt_and_named():
    with pytest.raises(CorruptImage, match="holiday.png is empty"):
        decode_image(b"", "holiday.png")
    with pytest.raises(CorruptImage, match="holiday.png is not a PNG"):
        decode_image(b"just some text", "holiday.png")
    with pytest.raises(CorruptImage, match="holiday.gif is not a PNG"):  # not among the formats of this library
        decode_image(encode(Image.fromarray(GREY), "GIF"), "holiday.gif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_cut_off_anywhere_is_corrupt_never_another_error_nor_half_an_image(kind):
    whole = encode(Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))), kind)
    expected = decode_image(whole, "x")
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        try:
            decoded = decode_image(whole[:length], "x")
        except CorruptImage:
            continue
        np.testing.assert_array_equal(decoded, expected)  # only bytes after the pixels were missing


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_give_pixels_or_the_one_error(kind):
    whole = bytearray(encode(Image.fromarray(np.kron(COLOUR, np.ones((4, 4, 1), np.uint8))), kind))
    rng = np.random.default_rng(1)
    failures = 0
    for _ in range(150):
        damaged = whole.copy()
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(damaged), "x").dtype == np.uint8
        except CorruptImage:
            failures += 1
    assert failures > 0


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 53)  # the image has 54: one more; Pillow itself would only warn
    with pytest.raises(CorruptImage, match="bomb.png.*53"):
        decode_image(encode(Image.fromarray(COLOUR)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # more than twice the limit
    with pytest.raises(CorruptImage, match="bomb.png"):
        decode_image(encode(Image.fromarray(COLOUR)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 54)
    decode_image(encode(Image.fromarray(COLOUR)), "no bomb")


def test_is_grey():
    assert is_grey(encode(Image.fromarray(GREY))) and is_grey(encode(Image.fromarray(GREY.astype(np.uint16))))
    assert not is_grey(encode(Image.fromarray(COLOUR))) and not is_grey(b"text") and not is_grey(b"")
