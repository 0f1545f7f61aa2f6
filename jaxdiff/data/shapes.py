"""`shapes`: captioned pictures of coloured shapes, drawn when asked for; some combinations are held out of training.

source[i] is a pure function of (split, i). Splits: "train" (50,000), "test" (other pictures of the same combinations of
colour and shape) and "held_out" (only combinations that the other two never show).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.data.nameless import make_nameless
from jaxdiff.data.outlines import coverage
from jaxdiff.data.scenes import (
    COLOURS,
    PLACES,
    SPLITS,
    Scene,
    check_split,
    make_caption,
    make_scene,
    pick,
)
from jaxdiff.data.sources import Example, describe_source

TWO_OBJECTS = 0.6  # fraction of pictures with two objects: more is to be learnt from those
LENGTHS = {"train": 50_000, "test": 5_000, "held_out": 5_000}
RADII = {"small": 4.8 / 32, "large": 6 / 32}  # in units of the image's side
REACH = 1.2  # half the largest side of any shape of radius 1
DROPS = {"triangle": 0.325, "star": 0.12}  # from the middle of the bounding box down to the centre, in radii
GROUND = 128  # the grey that shapes lie on: the middle, so that nothing but shapes is there to be learnt
IMAGE_SIZE = 64  # a loader takes 32 from it by the mean of 2x2 pixels


@dataclasses.dataclass(frozen=True, eq=False)
class ShapesSource:
    """Scenes of one split, drawn when asked for."""

    split: str = "train"
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    channels: int = 3
    image_shape: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    has_text: bool = True

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def __getitem__(self, index: int) -> Example:
        scene, numbers = self._scene(index)
        image = draw(scene, IMAGE_SIZE, 2 * numbers[:4].reshape(2, 2) - 1)
        return {"image": image, "label": 0, "text": make_caption(scene, numbers[4:11])}

    def scene(self, index: int) -> Scene:
        """Everything about picture `index`, also what its caption leaves out."""
        return self._scene(index)[0]

    def _scene(self, index: int) -> tuple[Scene, Float[np.ndarray, " 11"]]:
        """The scene and the numbers left over for its drawing and its caption."""
        if not 0 <= index < len(self):
            raise IndexError(f"shapes: there is no picture {index} among the {len(self):,} of split {self.split!r}")
        u = np.random.default_rng([list(SPLITS).index(self.split), index]).random(22)
        pool = SPLITS[self.split]
        scene = make_scene(pick(pool, u[0]), pool, u[1] < TWO_OBJECTS, u[2:7])
        if self.split != "held_out":
            scene = make_nameless(scene, u[18:22].reshape(2, 2))
        return scene, u[7:18]

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""
        return describe_source(f"shapes ({self.split})", self, "jaxdiff itself")


def open_shapes(split: str = "train") -> ShapesSource:
    """The split "train", "test" or "held_out"."""
    check_split(split)
    return ShapesSource(split)


def draw(scene: Scene, size: int = IMAGE_SIZE, jitter: np.ndarray | None = None) -> UInt8[np.ndarray, "s s 3"]:
    """A picture of a scene; jitter [things 2] in [-1, 1] moves the things about their places.

    What the scene leaves unsaid: large, in the centre (two things: left and right).
    """
    image = np.full((size, size, 3), GROUND, np.float32)
    for k, thing in enumerate(scene.things):
        place = thing.place or (("left", "right")[k] if len(scene.things) > 1 else "centre")
        radius = RADII[thing.size or "large"]
        x, y = _centre(place, radius, len(scene.things) > 1, (0.0, 0.0) if jitter is None else jitter[k])
        shape = thing.shape or thing.outline or "circle"
        y += DROPS.get(thing.shape or "", 0) * radius
        reach = 1.3 * radius + 1 / size  # no part of a shape is farther: only this window of the image changes
        left, top = max(0, int((x - reach) * size)), max(0, int((y - reach) * size))
        right, bottom = (min(size, math.ceil((centre + reach) * size)) for centre in (x, y))
        window = image[top:bottom, left:right]
        colour = COLOURS[thing.colour] if thing.colour else thing.paint or (0, 0, 0)
        alpha = coverage(shape, x * size - left, y * size - top, radius * size, window.shape[:2])[..., None]
        window += alpha * (np.array(colour, np.float32) - window)
    return np.rint(image).astype(np.uint8)


def _centre(place: str, radius: float, beside: bool, jitter: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Centre of a thing, in units of the image's side; beside another thing it keeps to its own half."""
    column, row = PLACES[place]
    free = 0.25 - 0.5 / 32 - REACH * radius  # how far it can move and keep off the border
    moves = (min(0.03, free), min(0.03, free))
    if beside:  # along the line that joins the two things less, so that they never touch; across it more
        moves = (free / 2, 0.05) if column else (0.05, free / 2)
    return 0.5 + 0.25 * column + moves[0] * jitter[0], 0.5 + 0.25 * row + moves[1] * jitter[1]
