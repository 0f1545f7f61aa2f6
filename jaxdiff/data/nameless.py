"""Paints and outlines without a name, for the pictures of `shapes` that teach colours apart from shapes.

A catalogue of each, the same on every machine. What comes near a colour or a shape that has a name counts as that one
wherever combinations are held out of training: a dark red circle is no way round "red circle" being held out.
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float

from jaxdiff.data.outlines import coverage
from jaxdiff.data.scenes import COLOURS, HELD_OUT, SHAPES, Outline, Scene, Thing, pick

NAMELESS_COLOUR, NAMELESS_SHAPE = 0.25, 0.25  # fractions of things in training
NUM_PAINTS, NUM_OUTLINES = 512, 256
GREY = 30  # a paint of less chroma has no hue
MIN_CONTRAST = 60  # distance of a paint from the ground, of 0 .. 221
MARGIN = math.radians(14)  # a hue so near to a colour's counts as that colour
MAX_DIFFERENCE = 0.35  # an outline that differs from a shape by less of its area counts as that shape


def chroma(colours: np.ndarray) -> Float[np.ndarray, "... 2"]:
    """Two opponent colours of RGB: zero for every grey, length the saturation, angle the hue."""
    red, green, blue = np.moveaxis(np.asarray(colours, np.float64), -1, 0)
    return np.stack([red - (green + blue) / 2, (green - blue) * np.sqrt(0.75)], axis=-1)


def make_nameless(scene: Scene, u: Float[np.ndarray, "2 2"]) -> Scene:
    """The scene with some of its colours and shapes replaced by nameless ones; never a held-out combination."""
    taken = tuple(thing.colour for thing in scene.things)
    return Scene(tuple(_replace(thing, taken, *numbers) for thing, numbers in zip(scene.things, u, strict=False)))


def _replace(thing: Thing, taken: tuple[str | None, ...], u_kind: float, u_which: float) -> Thing:
    if u_kind < NAMELESS_COLOUR:
        banned = {colour for colour, shape in HELD_OUT if shape == thing.shape}
        banned |= {colour for colour in taken if colour and colour != thing.colour}  # two things are of two colours
        paints = [paint for paint, near in paint_catalogue() if not near & banned]
        return dataclasses.replace(thing, colour=None, paint=pick(paints, u_which))
    if u_kind < NAMELESS_COLOUR + NAMELESS_SHAPE:
        banned = {shape for colour, shape in HELD_OUT if colour == thing.colour}
        outlines = [outline for outline, near in outline_catalogue() if not near & banned]
        return dataclasses.replace(thing, shape=None, outline=pick(outlines, u_which))
    return thing


@functools.cache
def paint_catalogue() -> tuple[tuple[tuple[int, int, int], frozenset[str]], ...]:
    """RGB triples that stand out from the ground, each with the names of the colours that it is near to."""
    rng = np.random.default_rng(0)
    paints: list[tuple[tuple[int, int, int], frozenset[str]]] = []
    while len(paints) < NUM_PAINTS:
        red, green, blue = (int(number) for number in rng.integers(0, 256, 3))
        if np.linalg.norm([red - 128, green - 128, blue - 128]) >= MIN_CONTRAST:
            paints.append(((red, green, blue), near_colours((red, green, blue))))
    return tuple(paints)


@functools.cache
def outline_catalogue() -> tuple[tuple[Outline, frozenset[str]], ...]:
    """Stars of 3 to 7 points, turned anyhow, each with the names of the shapes that it is near to."""
    rng, outlines = np.random.default_rng(1), []
    for _ in range(NUM_OUTLINES):
        points = int(rng.integers(3, 8))
        notch = rng.uniform(0.35, 0.85 * math.cos(math.pi / points))
        outline = Outline(points, round(notch, 3), round(rng.uniform(0, 2 * math.pi / points), 3))
        outlines.append((outline, near_shapes(outline)))
    return tuple(outlines)


def near_colours(paint: tuple[int, int, int]) -> frozenset[str]:
    """The colour of the nearest hue, and any other within the margin; none for a grey."""
    own = chroma(np.array(paint))
    if np.hypot(*own) < GREY:
        return frozenset()
    angles = {}
    for name, colour in COLOURS.items():
        other = chroma(np.array(colour))
        angles[name] = math.acos(min(1.0, float(own @ other / np.hypot(*own) / np.hypot(*other))))
    nearest = min(angles.values())
    return frozenset(name for name, angle in angles.items() if angle <= max(nearest, MARGIN))


def near_shapes(outline: Outline) -> frozenset[str]:
    """The shapes whose silhouettes of the same area and centre differ little from the outline's."""
    size = 48
    own = coverage(outline, size / 2, size / 2, size / 3, (size, size))
    area, near = float(own.sum()), set()
    for shape in SHAPES:
        radius = math.sqrt(area / float(coverage(shape, 80, 80, 50, (160, 160)).sum())) * 50
        other = coverage(shape, size / 2, size / 2, radius, (size, size))
        y, x = (float((other * (axis + 0.5)).sum() / other.sum()) for axis in np.indices(other.shape))
        other = coverage(shape, size - x, size - y, radius, (size, size))
        if float(np.abs(own - other).sum()) / area < MAX_DIFFERENCE:
            near.add(shape)
    return frozenset(near)
