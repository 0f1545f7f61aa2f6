"""Images and masks made fit for a model: every size to every size, opacity, and masks that are none."""

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from jaxdiff.generation.inputs import fit_images, fit_masks, read_image

SHAPES = [(8, 8), (8, 16), (24, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [(5, 40), (40, 5), (16, 32), (13, 17), (24, 8), (8, 8), (64, 64)])
def test_an_image_covers_any_size_and_its_middle_is_kept(given, shape):
    """A ramp across both sides: the middle stays in the middle, and both sides are scaled alike."""
    height, width = given
    down, across = np.mgrid[:height, :width] + 0.5
    ramp = np.stack([255 * down / height, 255 * across / width, np.full(given, 100.0)], -1).astype(np.uint8)
    (found,) = fit_images(ramp, (*shape, 3), 1).astype(float)
    assert found.shape == (*shape, 3) and (found[..., 2] == 100).all()
    scale = max(shape[0] / height, shape[1] / width)
    for axis in (0, 1):
        line = found[..., axis].mean(1 - axis)
        assert line.mean() == pytest.approx(127, abs=255 / min(given) + 3)
        inner = np.diff(line)[len(line) // 4 : -len(line) // 4 or None]
        assert inner.mean() == pytest.approx(255 / (given[axis] * scale), rel=0.25)


def test_an_image_of_the_models_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    np.testing.assert_array_equal(fit_images(image, (8, 16, 3), 2), [image, image])
    np.testing.assert_array_equal(fit_images(image.repeat(3, 0).repeat(3, 1), (8, 16, 3), 1), [image])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_goes_the_same_way_as_its_image(shape):
    image, mask = np.zeros((30, 50, 3), np.uint8), np.zeros((30, 50), bool)
    image[:, 25:], mask[:, 25:] = 255, True
    image[:9], mask[:9] = 0, False
    fitted, (split,) = fit_images(image, (*shape, 3), 1)[0, ..., :1], fit_masks(mask, image, (*shape, 3), 1)
    assert set(np.unique(split)) == {0, 255}
    np.testing.assert_array_equal(split > 0, fitted >= 128)


def test_opacity_lies_on_white_as_that_of_files(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    for name, picture in {"rgba": rgba, "grey": rgba[..., :2]}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        read = read_image(tmp_path / f"{name}.png")
        assert read.shape[-1] == picture.shape[-1] - 1
        np.testing.assert_array_equal(fit_images(picture, (8, 8, 3), 1), fit_images(read, (8, 8, 3), 1))
    clear = np.zeros((8, 8, 4), np.uint8)
    assert (fit_images(clear, (8, 8, 3), 1) == 255).all()


@pytest.mark.parametrize("dtype", [bool, np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.uint8])
def test_masks_of_every_kind_that_is_one(dtype):
    mask = np.zeros((4, 4))
    mask[:2] = 1
    mask = (mask * (255 if dtype == np.uint8 else 1)).astype(dtype)
    (found,) = fit_masks(mask, np.zeros((4, 4, 3), np.uint8), (4, 4, 3), 1)
    np.testing.assert_array_equal(found[..., 0], [[255] * 4] * 2 + [[0] * 4] * 2)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((4, 4), 255, np.int64), r"the mask must be uint8 \(0 to 255\), bool, or float from 0 to 1, not int64"),
        (np.full((4, 4), 1, np.uint16), "not uint16"),
        (np.full((4, 4), 1j), "not complex128"),
        (np.full((4, 4), 255.0), "from 0 to 1 where it is float, and goes from 255 to 255"),
        (np.full((4, 4), -0.1), "and goes from -0.1 to -0.1"),
        (np.full((4, 4), np.nan), "and goes from nan to nan"),
        (np.zeros((0, 4), bool), r"must be uint8 \[h w 1\] or \[h w 3\], not uint8 \[0, 4, 1\]"),
        (np.full((4, 4, 5), 1.0), r"\[4, 4, 5\]"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        fit_masks(mask, np.zeros((4, 4, 3), np.uint8), (4, 4, 3), 1)
