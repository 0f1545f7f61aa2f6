"""Many images as one picture."""

import math

import numpy as np
from jaxtyping import UInt8


def image_grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int | None = None, padding: int = 1, min_side: int = 32
) -> UInt8[np.ndarray, "height width c"]:
    """Images row by row on a white ground; tiny ones are enlarged (whole factors, nearest) to at least `min_side` pixels.

    `columns` defaults to the side of the smallest square that holds them all.
    """
    count, height, width, channels = images.shape
    factor = max(1, math.ceil(min_side / max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    cell_h, cell_w = height * factor + padding, width * factor + padding
    grid = np.full((rows * cell_h + padding, columns * cell_w + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = padding + i // columns * cell_h, padding + i % columns * cell_w
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid
