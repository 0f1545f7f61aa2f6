"""From the bytes of an image file to uint8 pixels: orientation, transparency, palettes and 16 bits come out right."""

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

DECODING_ERRORS = (  # whatever Pillow's decoders raise on damaged bytes
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class CorruptImage(ValueError):
    """An image whose bytes cannot be decoded; the message names it and says why."""


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of a PNG, JPEG, WebP or BMP: one channel if the file is grey, else RGB.

    EXIF orientation is applied, transparent pixels lie on white, 16-bit grey keeps its upper 8 bits (rounded).
    Raises CorruptImage (with `name` in its message) if the bytes are no such image, are cut off, or unpack to more
    pixels than Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not data:
        raise CorruptImage(f"{name} is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise CorruptImage(f"{name} has {image.width}x{image.height} pixels, more than the limit of {limit:,}")
        return _to_grey_or_rgb(ImageOps.exif_transpose(image))
    except CorruptImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise CorruptImage(f"{name} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except DECODING_ERRORS as error:
        raise CorruptImage(f"{name} cannot be decoded: {error}") from error


def is_grey(data: bytes) -> bool:
    """Whether an image file's header says grey (False if the header cannot be read)."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    except DECODING_ERRORS:
        return False


def _to_grey_or_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion to 8 bits would clip at 255
        levels = np.asarray(image).astype(np.float64) * (255 / 65535)
        return np.clip(np.round(levels), 0, 255).astype(np.uint8)[..., None]
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[..., None] if grey else pixels
