"""The rule that judges pictures of shapes: right on the source itself, and no friend of what it does not know."""

import dataclasses

import numpy as np
import pytest

from benchmarks import text_followed
from benchmarks.text_followed import accuracy, judge, make_images, parse_args, report, shows
from jaxdiff import text_to_image
from jaxdiff.data.scenes import COLOURS, SHAPES, Scene, Thing, prompts
from jaxdiff.data.shapes import GROUND, draw, open_shapes
from tests.generation.gaussian_model import GaussianPipeline, Letters


@pytest.mark.parametrize("split", ["test", "held_out"])
@pytest.mark.parametrize(("noise", "blur"), [(0, 0), (8, 0.5), (8, 0.8)])
def test_the_rule_is_right_on_the_sources_own_pictures(split, noise, blur):
    one, two = accuracy(open_shapes(split), 200, 32, noise, blur)
    assert np.mean(one) >= 0.99 and np.mean(two) >= 0.98


def test_every_combination_of_both_sizes():
    for size in ("small", "large"):
        for colour in COLOURS:
            for shape in SHAPES:
                scene = Scene((Thing(colour, shape, size, "centre"),))
                assert judge(draw(scene, 32)) == [(colour, shape)], (size, colour, shape)


def test_it_finds_nothing_in_nothing():
    assert judge(np.full((32, 32, 3), 200, np.uint8)) == []
    noise = np.clip(np.random.default_rng(0).normal(128, 8, (32, 32, 3)), 0, 255).astype(np.uint8)
    assert judge(noise) == []
    speck = np.full((32, 32, 3), 240, np.uint8)
    speck[4:7, 4:7] = COLOURS["red"]
    assert judge(speck) == []


def test_a_ground_with_a_slight_tint_is_no_object():
    for tint in ((250, 225, 225), (20, 30, 60)):
        image = draw(Scene((Thing("green", "star", "small", "left"), Thing("pink", "cross", "small", "right"))), 32)
        tinted = np.where((image == GROUND).all(-1, keepdims=True), np.array(tint), image).astype(np.uint8)
        assert sorted(judge(tinted)) == [("green", "star"), ("pink", "cross")]


@pytest.mark.parametrize("size", [28, 48, 64])
def test_it_judges_pictures_of_other_sizes(size):
    one, two = accuracy(open_shapes("test"), 60, size, 4, 0.5)
    assert np.mean(one + two) >= 0.98


def painted(mask):
    return np.where(mask[..., None], np.array(COLOURS["red"]), 240).astype(np.uint8)


Y, X = np.indices((32, 32)) - 15.5


@pytest.mark.parametrize(
    "mask",
    [
        (np.hypot(X, Y) < 7) & (np.hypot(X, Y) > 4),  # a ring
        (np.abs(X) < 8) & (np.abs(Y) < 2),  # a bar
        (np.hypot(X, Y) < 8) & (Y < 0),  # half a disc
        ((np.abs(X + 4) < 2) & (np.abs(Y) < 6)) | ((np.abs(Y - 4) < 2) & (np.abs(X) < 6)),  # an L
        (Y > -5) & (Y < 6) & (np.abs(X) < (6 - Y) * 0.6),  # a triangle on its head
    ],
    ids=["ring", "bar", "half disc", "L", "triangle on its head"],
)
def test_other_shapes_are_unknown(mask):
    assert judge(painted(mask)) == [("red", "unknown")]


def test_touching_objects_of_two_colours_are_told_apart():
    image = np.full((32, 32, 3), 240, np.uint8)
    image[8:18, 6:16] = COLOURS["blue"]
    image[8:18, 16:26] = COLOURS["yellow"]
    assert sorted(judge(image)) == [("blue", "square"), ("yellow", "square")]


def test_colour_and_shape_must_belong_to_one_object():
    red_circle, blue_star = ("red", "circle"), ("blue", "star")
    assert shows([red_circle, blue_star], [blue_star])
    assert shows([red_circle, blue_star], [blue_star, red_circle])
    assert not shows([("red", "star"), ("blue", "circle")], [red_circle, blue_star])
    assert not shows([red_circle], [red_circle, blue_star])


def test_the_report_counts(capsys):
    texts = prompts("train", 30)
    right = [draw(text_followed.parse_caption(text), 32) for text in texts]
    assert report(right, texts) == 1.0
    assert capsys.readouterr().out.endswith("colour and shape asked for: 100.0% of 30 pictures\n")
    half = [*right[:15], *[np.full_like(right[0], 240)] * 15]
    assert report(half, texts) == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "colour and shape asked for: 50.0% of 30 pictures"
    assert "two objects: 100.0% of 10 pictures" in lines and "one object: 25.0% of 20 pictures" in lines
    assert len(lines) == len(COLOURS) + len(SHAPES) + 4


@pytest.mark.parametrize("changes", [{}, {"guidance": 5.0}, {"steps": 3}, {"sampler": "euler_ancestral"}])
def test_flags_change_how_the_pictures_are_made(monkeypatch, changes):
    """Without any the settings are the run's own."""
    model = GaussianPipeline(tokenizer=Letters())
    monkeypatch.setattr("jaxdiff.load_run", lambda workdir: model)
    flags = [f"--{name}={value}" for name, value in changes.items()]
    found = make_images(parse_args(["--workdir=run", "--seed=7", *flags]), ["star", "a red star"])
    settings = dataclasses.replace(model.settings, **changes)
    np.testing.assert_array_equal(found, text_to_image(model, ["star", "a red star"], [7, 8], settings=settings))
    own = text_to_image(model, ["star", "a red star"], [7, 8])
    assert np.array_equal(found, own) == (not changes)
