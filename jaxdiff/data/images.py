"""From the bytes of an image file to uint8 pixels: orientation, transparency, palettes and 16 bits come out right."""

import io
import os
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from jaxdiff.files import read_at_most

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

LONGEST_FILE = 2**29  # bytes, more than Pillow's limit of pixels needs


class CorruptImage(ValueError):
    """An image whose bytes cannot be decoded; the message names it and says why."""


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file. Raises CorruptImage where it is too long to be one."""
    try:
        return read_at_most(path, LONGEST_FILE)
    except ValueError as error:
        raise CorruptImage(f"{path}: {error}, so it is no image") from error


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of a PNG, JPEG, WebP or BMP: one channel if the file is grey, else RGB.

    EXIF orientation is applied, transparent pixels lie on white, 16-bit grey keeps its upper 8 bits (rounded).
    Raises CorruptImage (with `name` in its message) if the bytes are no such image, are cut off, or unpack to more
    pixels than Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS`; so no file takes more than 2 GiB.
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
    except Exception as error:  # Pillow's decoders raise every kind on damaged bytes
        raise CorruptImage(f"{name} cannot be decoded: {error or type(error).__name__}") from error


def is_grey(file: bytes | pathlib.Path) -> bool:
    """Whether an image file's header says grey (False if the header cannot be read)."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    except Exception:  # as in `decode_image`
        return False


def on_white(pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Grey or RGB pixels as they are; with a channel of opacity (2 or 4) as they look on white, as those of files."""
    return pixels if pixels.shape[-1] in (1, 3) else _to_grey_or_rgb(Image.fromarray(pixels))


def _to_grey_or_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion to 8 bits would clip at 255
        levels = np.asarray(image).astype(np.int32)
        return np.clip((levels + 128) // 257, 0, 255).astype(np.uint8)[..., None]  # 65535 / 255 = 257, to the nearest
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[..., None] if grey else pixels
