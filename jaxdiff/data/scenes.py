"""Scenes of one or two coloured shapes, and the captions that describe them: caption -> facts and back.

A fact that is not said is None. A caption may leave out size and place. Of a thing it names colour and shape, or only one of
them: in training there are shapes of any paint ("a small star") and things of any outline ("a red shape"), so that what is
learnt of colours does not hang on shapes.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

T = TypeVar("T")

COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 130, 20),
    "yellow": (250, 215, 30),
    "green": (40, 165, 60),
    "cyan": (30, 190, 210),
    "blue": (40, 70, 225),
    "purple": (130, 50, 200),
    "pink": (250, 100, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
PLACES = {  # (x, y): left to right, top to bottom
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "centre": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
RELATIONS = {  # places of a first and a second object -> the words between them
    ("left", "right"): ("to the left of", "left of"),
    ("right", "left"): ("to the right of", "right of"),
    ("top", "bottom"): ("above", "over"),
    ("bottom", "top"): ("below", "under"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}

COMBINATIONS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# One shape of every colour, each shape once or twice: 8 of 40. So training sees every colour and every shape.
HELD_OUT = tuple((colour, SHAPES[2 * k % len(SHAPES)]) for k, colour in enumerate(COLOURS))
TRAINED = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)
SPLITS = {"train": TRAINED, "test": TRAINED, "held_out": HELD_OUT}  # the combinations that occur in each
TWO_OBJECTS = 1 / 3  # fraction of prompts with two objects
ANY_SHAPE = "shape"  # the word for a thing whose outline has no name


@dataclasses.dataclass(frozen=True)
class Outline:
    """A star: so many points, notches at this part of the tips' radius, turned by so many radians."""

    points: int
    notch: float
    turn: float


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene; a fact is None where it is not said. Paint and outline tell how a nameless one looks."""

    colour: str | None
    shape: str | None
    size: str | None = None
    place: str | None = None
    paint: tuple[int, int, int] | None = None  # RGB, where the colour has no name
    outline: Outline | None = None  # where the shape has no name


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing anywhere, or two of different colours side by side or one above the other."""

    things: tuple[Thing, ...]


def pick(options: Sequence[T], u: float) -> T:
    """The option that a uniform number u in [0, 1) chooses, every option alike."""
    return options[int(u * len(options))]


def check_split(split: str) -> None:
    """Raise ValueError unless there is such a split."""
    if split not in SPLITS:
        raise ValueError(f"shapes has the splits {', '.join(SPLITS)}, and no {split!r}")


def make_scene(
    first: tuple[str, str], others: Sequence[tuple[str, str]], two: bool, u: Float[np.ndarray, " 5"]
) -> Scene:
    """A whole scene with `first` (colour, shape) in it; a second thing is one of `others`, of another colour."""
    sizes = pick(SIZES, u[0]), pick(SIZES, u[1])
    if not two:
        return Scene((Thing(*first, sizes[0], pick(tuple(PLACES), u[2])),))
    second = pick([pair for pair in others if pair[0] != first[0]], u[3])
    places = pick(tuple(RELATIONS), u[4])
    return Scene((Thing(*first, sizes[0], places[0]), Thing(*second, sizes[1], places[1])))


def make_caption(scene: Scene, u: Float[np.ndarray, " 7"]) -> str:
    """Words for a scene. The numbers u in [0, 1) choose among wordings, and which facts are left out."""
    names = [_name(thing, *numbers) for thing, numbers in zip(scene.things, (u[0:2], u[2:4]), strict=False)]
    opening = pick(("", "", "", "a picture of ", "there is "), u[4])
    said = u[5] < 0.8
    if len(names) == 1:
        place = scene.things[0].place
        where = " " + pick(_place_words(place), u[6]) if place and said else ""
        return opening + names[0] + where
    places = (scene.things[0].place, scene.things[1].place)
    between = pick(RELATIONS[places], u[6]) if said and places in RELATIONS else "and"  # type: ignore[index]
    return f"{opening}{names[0]} {between} {names[1]}"


def parse_caption(caption: str) -> Scene:
    """The facts that a caption says; the inverse of `make_caption` for what it does not leave out.

    Raises ValueError with one line if the caption names no shape, or more than two.
    """
    found = list(_THING.finditer(caption))
    if not 1 <= len(found) <= 2:
        raise ValueError(f"caption {caption!r} names {len(found)} shapes, not one or two")
    shapes = [thing["shape"] if thing["shape"] in SHAPES else None for thing in found]
    things = [
        Thing(thing["colour"], shape, _SIZE_OF.get(thing["size"])) for thing, shape in zip(found, shapes, strict=True)
    ]
    if len(things) == 1:
        place = re.search(
            r"\b(top left|top right|bottom left|bottom right|top|bottom|left|right|centre|middle)\b", caption
        )
        places: tuple[str | None, ...] = (place[1].replace("middle", "centre") if place else None,)
    else:
        between = caption[found[0].end() : found[1].start()].strip()
        between = re.sub(r" an?$", "", between)
        places = next((pair for pair, words in RELATIONS.items() if between in words), (None, None))
    placed = (dataclasses.replace(thing, place=place) for thing, place in zip(things, places, strict=True))
    return Scene(tuple(placed))


def prompts(split: str, num: int, seed: int = 0, two_objects: float = TWO_OBJECTS) -> list[str]:
    """Captions to draw from: combinations of a split ("train" and "test" have the same), each about equally often.

    The first round(num * two_objects) name two objects, the others one.
    """
    check_split(split)
    pool, rng = SPLITS[split], np.random.default_rng([seed, 0x70726F6D])
    orders = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-num // len(pool)) + 1)])
    num_two = round(num * two_objects)
    scenes = [make_scene(pool[k], pool, i < num_two, rng.random(5)) for i, k in enumerate(orders[:num])]
    return [make_caption(scene, rng.random(7)) for scene in scenes]


def _name(thing: Thing, u_size: float, u_word: float) -> str:
    """A thing with its article: "a small red circle", or without the size in a quarter of all cases."""
    size = pick(SIZE_WORDS[thing.size], u_word) + " " if thing.size and u_size < 0.75 else ""
    words = f"{size}{thing.colour + ' ' if thing.colour else ''}{thing.shape or ANY_SHAPE}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _place_words(place: str) -> tuple[str, str]:
    if place == "centre":
        return "in the centre", "in the middle"
    if " " in place:
        return f"at the {place}", f"in the {place} corner"
    return (
        (f"on the {place}", f"at the {place}")
        if place in ("left", "right")
        else (f"at the {place}", f"near the {place}")
    )


_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_THING = re.compile(
    rf"\b(?:(?P<size>{'|'.join(_SIZE_OF)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join((*SHAPES, ANY_SHAPE))})\b"
)
