"""Images and masks that a user gives, made fit for a model."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxdiff.data.images import decode_image, on_white, read_image_file
from jaxdiff.data.transforms import centre_crop, convert_channels, resize_to_cover
from jaxdiff.generation.masks import to_latents

Picture = UInt8[np.ndarray, "h w c"]


def read_image(path: str | pathlib.Path) -> Picture:
    """An image file's pixels. Raises OSError where it cannot be read, ValueError where it is no image."""
    return decode_image(read_image_file(path), str(path))


def fit_images(images: Any, image_shape: tuple[int, int, int], num: int) -> UInt8[np.ndarray, "n h w c"]:
    """`num` images of the model's size from one image for all of them, or from as many.

    Each is uint8 [h w c] or [h w]. It is scaled to cover the model's size and its middle taken; grey becomes RGB or the other way
    round; of 2 or 4 channels the last is opacity, and lies on white.
    """
    fitted = [_fit(picture, image_shape) for picture in _pictures(images, "image")]
    return _repeated(fitted, num, "images")


def fit_masks(masks: Any, images: Any, image_shape: tuple[int, int, int], num: int) -> UInt8[np.ndarray, "n h w 1"]:
    """`num` masks of the model's size, 255 where the image is to be made anew and 0 where it is kept.

    Each is uint8, bool, or float in [0, 1], of its image's size: light (at least half) is made anew. Raises ValueError for a
    mask of another size, and for one that leaves nothing to be made.
    """
    pictures, originals = _pictures(masks, "mask"), _pictures(images, "image")
    for mask, image in zip(pictures * len(originals), originals * len(pictures), strict=True):
        if mask.shape[:2] != image.shape[:2]:
            sizes = (f"{picture.shape[1]}x{picture.shape[0]}" for picture in (mask, image))
            raise ValueError("the mask has {} pixels, the image {}: they must be of one size".format(*sizes))
    fitted = []
    for mask in pictures:
        split = (_fit(mask, (*image_shape[:2], 1)) >= 128).astype(np.uint8) * 255
        if not split.any():
            raise ValueError("the mask is black all over: nothing is to be made (white is made anew, black kept)")
        fitted.append(split)
    return _repeated(fitted, num, "masks")


def check_seen(masks: UInt8[np.ndarray, "n h w 1"], latent_shape: tuple[int, int, int]) -> None:
    """Raise ValueError for a mask of which nothing is left at the latents' size, so that all would silently be kept."""
    if not np.asarray(to_latents(jnp.asarray(masks), latent_shape)).any((1, 2, 3)).all():
        down, across = masks.shape[1] // latent_shape[0], masks.shape[2] // latent_shape[1]
        raise ValueError(
            f"the mask is too thin for this model: of every {across}x{down} pixels the upper left one says whether they are "
            f"made anew, and no such pixel is white; paint at least {across}x{down} pixels"
        )


def _pictures(given: Any, kind: str) -> list[Picture]:
    """What is given as a list of uint8 [h w c]."""
    if isinstance(given, np.ndarray) or not isinstance(given, Sequence):
        given = np.asarray(given)
        given = list(given) if given.ndim == 4 else [given]
    pictures = []
    for picture in map(np.asarray, given):
        picture = _levels(picture) if kind == "mask" else picture
        picture = picture[..., None] if picture.ndim == 2 else picture
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 2, 3, 4) or not picture.size:
            raise ValueError(f"the {kind} must be uint8 [h w 1] or [h w 3], not {picture.dtype} {list(picture.shape)}")
        pictures.append(on_white(picture))
    return pictures


def _levels(mask: np.ndarray) -> np.ndarray:
    """A mask of bool or of float in [0, 1] as uint8; one of uint8 as it is."""
    if mask.dtype == np.uint8:
        return mask
    if mask.dtype != np.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(f"the mask must be uint8 (0 to 255), bool, or float from 0 to 1, not {mask.dtype}")
    levels = mask.astype(np.float64)
    if not ((levels >= 0) & (levels <= 1)).all():  # nor NaN
        raise ValueError(
            f"the mask must be from 0 to 1 where it is float, and goes from {levels.min():g} to {levels.max():g}"
        )
    return np.round(levels * 255).astype(np.uint8)


def _fit(picture: Picture, image_shape: tuple[int, int, int]) -> Picture:
    height, width, channels = image_shape
    return convert_channels(centre_crop(resize_to_cover(picture, height, width), height, width), channels)


def _repeated(pictures: list[Picture], num: int, kind: str) -> UInt8[np.ndarray, "n h w c"]:
    if len(pictures) not in (1, num):
        raise ValueError(f"{len(pictures)} {kind} for {num} results: give one, or one for each")
    return np.broadcast_to(np.stack(pictures), (num, *pictures[0].shape))
