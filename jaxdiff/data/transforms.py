"""Pure functions on one uint8 image [h w c]: resize, crop, flip, grey <-> RGB.

Nothing here draws random numbers: a random choice arrives as a uniform number u in [0, 1).
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "h w c"]


def resize_shorter_side(image: Pixels, size: int) -> Pixels:
    """Scale so that the shorter side has `size` pixels, keeping the aspect ratio."""
    return resize_to_cover(image, size, size)


def resize_to_cover(image: Pixels, height: int, width: int) -> Pixels:
    """Scale to the least size that covers height x width, keeping the aspect ratio.

    Down by a whole factor: the mean of each block of pixels. Down otherwise: Lanczos, antialiased. Up: bicubic.
    """
    *shape, channels = image.shape
    scaled = covering_shape((shape[0], shape[1]), height, width)
    if tuple(shape) == scaled:
        return image
    factor = shape[0] // scaled[0]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    if tuple(shape) == (scaled[0] * factor, scaled[1] * factor):
        picture = picture.reduce(factor)
    else:
        larger = scaled[0] > shape[0] or scaled[1] > shape[1]
        picture = picture.resize(scaled[::-1], Image.Resampling.BICUBIC if larger else Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(*scaled, channels)


def resized_shape(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width after `resize_shorter_side`."""
    return covering_shape(shape, size, size)


def covering_shape(shape: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Height and width after `resize_to_cover`."""
    target, side = (height, shape[0]) if height * shape[1] >= width * shape[0] else (width, shape[1])
    return max(height, round(shape[0] * target / side)), max(width, round(shape[1] * target / side))


def centre_crop(image: Pixels, height: int, width: int | None = None) -> Pixels:
    """The height x width window in the middle, a square if no width is given."""
    width = height if width is None else width
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def random_crop(image: Pixels, size: int, u_top: float, u_left: float) -> Pixels:
    """A size x size window; u_top, u_left in [0, 1) choose its place, every place alike."""
    top, left = int(u_top * (image.shape[0] - size + 1)), int(u_left * (image.shape[1] - size + 1))
    return image[top : top + size, left : left + size]


def horizontal_flip(image: Pixels) -> Pixels:
    """Left becomes right."""
    return image[:, ::-1]


def convert_channels(image: Pixels, channels: int) -> Pixels:
    """Grey [h w 1] <-> RGB [h w 3]; grey is ITU-R 601 luma, and grey -> RGB -> grey changes nothing."""
    if image.shape[-1] == channels:
        return image
    if (image.shape[-1], channels) == (1, 3):
        return np.repeat(image, 3, axis=-1)
    if (image.shape[-1], channels) == (3, 1):
        weights = np.array([19595, 38470, 7471], np.uint32)  # 0.299, 0.587, 0.114 in units of 1 / 2^16
        return ((image @ weights + 2**15) >> 16).astype(np.uint8)[..., None]
    raise ValueError(f"cannot convert an image of {image.shape[-1]} channels to {channels} (only 1 <-> 3)")


def shrink(image: Pixels, factor: int) -> Pixels:
    """A level of the image's pyramid: the mean of each factor x factor block, rounded to the nearest level (halves up)."""
    if factor == 1:
        return image
    height, width, channels = image.shape
    blocks = image.reshape(height // factor, factor, width // factor, factor, channels)
    total = blocks.sum((1, 3), dtype=np.uint32)
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)
