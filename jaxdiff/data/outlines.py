"""Outlines of shapes, as signed distances, and how much of each pixel they cover."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxdiff.data.scenes import Outline

Grid = Float[np.ndarray, "h w"]
OUTER = 1.2  # radius of the tips of an outline without a name


def coverage(shape: str | Outline, x: float, y: float, radius: float, image_shape: tuple[int, ...]) -> Grid:
    """How much of each pixel a shape about (x, y) covers, 0 to 1; all lengths in pixels, (0, 0) the top left corner."""
    rows, columns = image_shape
    across = (np.arange(columns, dtype=np.float32) + np.float32(0.5 - x)) / np.float32(radius)
    down = (np.arange(rows, dtype=np.float32) + np.float32(0.5 - y)) / np.float32(radius)
    distance = _distance_to(shape)(*np.meshgrid(across, down, copy=False))
    return np.clip(distance * np.float32(radius) + np.float32(0.5), 0, 1)


def _distance_to(shape: str | Outline) -> Callable[[Grid, Grid], Grid]:
    if isinstance(shape, Outline):
        return _star(shape.points, OUTER, OUTER * shape.notch, shape.turn)
    return DISTANCES[shape]


def _star(points: int, outer: float, inner: float, turn: float = 0.0) -> Callable[[Grid, Grid], Grid]:
    """Distance function of a star: tips at radius `outer` (the first one up, then `turn`), notches at `inner`.

    By symmetry every point is folded into the half sector between a tip and the notch after it, where the outline is
    one straight line. A regular polygon is the star with inner = outer cos(pi / points).
    """
    sector = 2 * math.pi / points
    notch = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    length = math.hypot(notch[0] - outer, notch[1])
    normal = np.float32(notch[1] / length), np.float32((outer - notch[0]) / length)
    offset = np.float32(outer * notch[1] / length)

    def distance(x: Grid, y: Grid) -> Grid:
        angle = np.arctan2(x, -y) - np.float32(turn)
        folded = np.abs(angle - np.float32(sector) * np.rint(angle / np.float32(sector)))
        radius = np.hypot(x, y)
        along, beside = radius * np.cos(folded), radius * np.sin(folded)
        return np.minimum(offset - normal[0] * along - normal[1] * beside, np.float32(outer) - along)  # or past the tip

    return distance


def _circle(x: Grid, y: Grid) -> Grid:
    return 1 - np.hypot(x, y)


def _square(x: Grid, y: Grid) -> Grid:
    return np.float32(0.9) - np.maximum(np.abs(x), np.abs(y))


def _cross(x: Grid, y: Grid) -> Grid:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.minimum(np.float32(1.08) - long, np.float32(0.36) - short)


# Signed distance to the outline of a shape of radius 1, positive inside, y downwards.
DISTANCES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _star(3, 1.3, 0.65),
    "star": _star(5, 1.25, 0.55),
    "cross": _cross,
}
