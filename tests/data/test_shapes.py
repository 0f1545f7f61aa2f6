"""The source `shapes`: pure, captions true to the picture, combinations held out of training."""

import hashlib

import numpy as np
import pytest

from benchmarks.text_followed import judge
from jaxdiff.data.loader import Loader
from jaxdiff.data.nameless import near_colours, near_shapes, outline_catalogue, paint_catalogue
from jaxdiff.data.outlines import coverage
from jaxdiff.data.scenes import (
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
    TRAINED,
    Outline,
    Scene,
    Thing,
    make_caption,
    parse_caption,
    prompts,
)
from jaxdiff.data.shapes import GROUND, LENGTHS, RADII, draw
from jaxdiff.data.sources import open_source


def pairs(scene):
    return [(thing.colour, thing.shape) for thing in scene.things]


def test_every_colour_and_every_shape_is_trained_and_every_colour_held_out_once():
    assert len(COMBINATIONS) == 40 and len(HELD_OUT) == 8
    assert set(TRAINED) | set(HELD_OUT) == set(COMBINATIONS) and not set(TRAINED) & set(HELD_OUT)
    for pool in (TRAINED, HELD_OUT):
        assert {colour for colour, _ in pool} == set(COLOURS) and {shape for _, shape in pool} == set(SHAPES)


def test_no_held_out_combination_is_ever_in_training():
    seen = {split: set() for split in LENGTHS}
    for split, combinations in seen.items():
        source = open_source("shapes", split=split)
        for i in range(0, len(source), len(source) // 1500):
            scene = source.scene(i)
            combinations.update(pairs(scene))
            colours = [thing.colour for thing in scene.things if thing.colour]
            assert len(set(colours)) == len(colours)
    nameless = {(colour, None) for colour in COLOURS} | {(None, shape) for shape in SHAPES}
    trained = set(TRAINED) | nameless
    assert seen == {"train": trained, "test": trained, "held_out": set(HELD_OUT)}


def test_nothing_nameless_looks_like_a_held_out_combination():
    """By the rule on pixels that judges pictures, which knows nothing of how they were drawn."""
    source, found = open_source("shapes"), set()
    for i in range(1500):
        if any(not (thing.colour and thing.shape) for thing in source.scene(i).things):
            found.update(judge(source[i]["image"]))
    assert not found & set(HELD_OUT)
    assert {colour for colour, _ in found} == set(COLOURS) and {shape for _, shape in found} == {*SHAPES, "unknown"}


def test_paints_and_outlines_without_a_name():
    assert len({paint for paint, _ in paint_catalogue()}) == 512 and len({o for o, _ in outline_catalogue()}) == 256
    assert set().union(*(near for _, near in paint_catalogue())) == set(COLOURS)
    assert near_colours((200, 20, 30)) == {"red"} and near_colours((250, 250, 250)) == frozenset()
    assert near_colours((250, 172, 25)) == {"orange", "yellow"}
    assert near_shapes(Outline(5, 0.44, 0.0)) == {"star"} and near_shapes(Outline(3, 0.5, 0.0)) == {"triangle"}
    assert near_shapes(Outline(3, 0.5, 1.0)) == frozenset()  # a triangle on its head


def test_an_example_is_a_function_of_its_split_and_number_alone():
    source = open_source("shapes", require_text=True)
    assert len(source) == 50_000 and source.describe() == (
        "shapes (train): 50,000 RGB images of 64x64, no labels, captioned, from jaxdiff itself"
    )
    first, again = source[123], open_source("shapes")[123]
    np.testing.assert_array_equal(first["image"], again["image"])
    assert first["text"] == again["text"] and first["image"].shape == (64, 64, 3) and first["image"].dtype == np.uint8
    pictures = {source[i]["image"].tobytes() for i in range(200)}
    pictures |= {open_source("shapes", split="test")[i]["image"].tobytes() for i in range(200)}
    assert len(pictures) == 400  # none twice, and the splits have pictures of their own
    with pytest.raises(IndexError, match="no picture 50000 among the 50,000 of split 'train'"):
        source[50_000]
    with pytest.raises(ValueError, match="shapes has the splits train, test, held_out, and no 'val'"):
        open_source("shapes", split="val")


def test_facts_and_words_stay_what_they_are():
    """A run trained yesterday saw the same scenes: the numbers behind example i may not change."""
    source = open_source("shapes")
    text = "\n".join(f"{source.scene(i)} {source[i]['text']}" for i in range(0, 50_000, 500))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "eb290ec23107369b"


def test_a_caption_says_nothing_but_the_truth_and_is_understood():
    source, said = open_source("shapes"), {"size": 0, "place": 0, "things": 0}
    for i in range(2000):
        truth, told = source.scene(i), parse_caption(source[i]["text"])
        assert pairs(told) == pairs(truth)
        for thing, known in zip(told.things, truth.things, strict=True):
            assert thing.size in (None, known.size) and thing.place in (None, known.place)
            said["size"] += thing.size is not None
            said["place"] += thing.place is not None
        said["things"] += len(truth.things)
    assert 0.7 < said["size"] / said["things"] < 0.8 and 0.75 < said["place"] / said["things"] < 0.85
    assert 1.57 < said["things"] / 2000 < 1.63


def test_words_for_known_scenes():
    talkative = np.zeros(7)  # the first wording of everything, nothing left out
    small = Thing("red", "circle", "small", "top left")
    assert make_caption(Scene((small,)), talkative) == "a small red circle at the top left"
    both = Scene((Thing("blue", "square", "large", "left"), Thing("green", "star", "small", "right")))
    assert make_caption(both, talkative) == "a large blue square to the left of a small green star"
    assert make_caption(Scene((Thing("orange", "star"),)), talkative) == "an orange star"
    assert parse_caption("A photo of an orange star in the middle") == Scene((Thing("orange", "star", None, "centre"),))
    red, dark = Thing("red", None, "small", "left"), Thing(None, "star", "large", "right")
    assert make_caption(Scene((red, dark)), talkative) == "a small red shape to the left of a large star"
    assert parse_caption("a small red shape to the left of a large star") == Scene((red, dark))
    for caption, count in (("a smiling cat", 0), ("a red star, a blue star and a pink star", 3)):
        with pytest.raises(ValueError, match=f"names {count} shapes, not one or two"):
            parse_caption(caption)


@pytest.mark.parametrize("place", PLACES)
def test_things_lie_where_their_place_says(place):
    scene = Scene((Thing("red", "circle", "large", place),))
    y, x = np.nonzero(draw(scene)[..., 0] > 170)
    assert np.rint((np.array([x.mean(), y.mean()]) - 31.5) / 16).tolist() == list(PLACES[place])


def test_sizes_are_the_radii_and_both_lie_within_the_picture():
    for shape in SHAPES:
        areas = {}
        for size in ("small", "large"):
            for place in ("top left", "bottom right"):
                for jitter in (-1, 1):
                    image = draw(Scene((Thing("blue", shape, size, place),)), 64, np.full((1, 2), jitter))
                    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
                    assert (edges == GROUND).all()
                    areas[size] = (GROUND - image[..., 0].astype(float)).sum()
        assert areas["large"] / areas["small"] == pytest.approx((RADII["large"] / RADII["small"]) ** 2, rel=0.03), shape


def test_two_things_never_touch():
    """However they are moved, there is background on all of a line between them."""
    for places in RELATIONS:
        for first in SHAPES:
            for second in SHAPES:
                one, two = Thing("red", first, "large", places[0]), Thing("blue", second, "large", places[1])
                towards = np.array([PLACES[places[1]], PLACES[places[0]]], float)
                drawn = (draw(Scene((one, two)), 64, towards) != GROUND).any(-1)
                lines = drawn.any(0 if places[0] in ("left", "right") else 1)
                assert np.flatnonzero(lines)[[0, -1]].tolist() != [0, 63]
                inner = lines[lines.argmax() : 64 - lines[::-1].argmax()]
                assert (~inner).sum() >= 2, (first, second, places)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", 1.8**2),
        ("triangle", 3 * np.sqrt(3) / 4 * 1.3**2),
        ("star", 5 * 1.25 * 0.55 * np.sin(np.pi / 5)),
        ("cross", 8 * 1.08 * 0.36 - 4 * 0.36**2),
    ],
)
@pytest.mark.parametrize("centre", [(20.0, 20.0), (20.3, 19.6)])
def test_antialiasing_keeps_the_area(shape, area, centre):
    alpha = coverage(shape, *centre, 12.0, (40, 40))
    assert alpha.min() >= 0 and alpha.max() == 1 and ((alpha > 0) & (alpha < 1)).any()
    assert abs(alpha.sum() / 12**2 - area) < 0.01 * area
    x, y = ((alpha * (axis + 0.5)).sum() / alpha.sum() for axis in (np.arange(40)[None], np.arange(40)[:, None]))
    np.testing.assert_allclose((x, y), centre, atol=0.05)


def test_prompts_name_each_combination_equally_often():
    texts = prompts("held_out", 240, seed=3)
    scenes = [parse_caption(text) for text in texts]
    assert [len(scene.things) for scene in scenes] == [2] * 80 + [1] * 160
    first = [pairs(scene)[0] for scene in scenes]
    assert {pair: first.count(pair) for pair in HELD_OUT} == dict.fromkeys(HELD_OUT, 30)
    assert {pair for scene in scenes for pair in pairs(scene)} == set(HELD_OUT)
    assert texts == prompts("held_out", 240, seed=3) != prompts("held_out", 240, seed=4)
    assert {pair for text in prompts("train", 200) for pair in pairs(parse_caption(text))} == set(TRAINED)
    assert prompts("train", 0) == []


def test_batches_have_pictures_and_their_captions():
    source = open_source("shapes")
    batch = Loader(source, 16, 0, image_size=32, channels=3)[5]
    assert batch["image"].shape == (16, 32, 32, 3) and batch["label"].tolist() == [0] * 16
    texts = {source[i]["text"]: i for i in set(Loader(source, 16, 0, image_size=32, channels=3)._order[80:96])}
    assert sorted(batch["text"]) == sorted(texts)
    for image, text in zip(batch["image"], batch["text"], strict=True):
        blocks = source[texts[text]]["image"].reshape(32, 2, 32, 2, 3).mean((1, 3))
        np.testing.assert_allclose(image, blocks, atol=0.51)
