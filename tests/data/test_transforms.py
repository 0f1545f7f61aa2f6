"""Resize, crop, flip and channel conversion on uint8 images."""

import numpy as np
import pytest

from jaxdiff.data.transforms import (
    centre_crop,
    convert_channels,
    horizontal_flip,
    random_crop,
    resize_shorter_side,
    resized_shape,
)

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(7, 7), (40, 31), (31, 40), (9, 200), (8, 3)])
def test_resize_puts_the_shorter_side_at_size_and_keeps_the_aspect_ratio(shape, channels):
    out = resize_shorter_side(noise(*shape, channels), 8)
    assert out.dtype == np.uint8 and out.shape == (*resized_shape(shape, 8), channels)
    assert min(out.shape[:2]) == 8
    assert max(out.shape[:2]) == pytest.approx(8 * max(shape) / min(shape), abs=0.5)


def test_resize_by_a_whole_factor_is_the_mean_of_each_block():
    image = noise(12, 16, 3)
    mean = image[:12, :12].reshape(4, 3, 4, 3, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(resize_shorter_side(image[:, :12], 4), mean, atol=0.6)  # Pillow rounds in fixed point


def test_resize_down_is_antialiased():
    stripes = np.zeros((70, 70, 1), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: must come out as even grey, not as false stripes
    assert resize_shorter_side(stripes, 16).astype(int)[2:-2, 2:-2].std() < 8


@pytest.mark.parametrize("size", [5, 8, 16, 40])
def test_resize_keeps_a_constant_image_constant(size):
    for level in (0, 77, 255):
        assert (resize_shorter_side(np.full((16, 16, 3), level, np.uint8), size) == level).all()


def test_resize_to_the_same_size_changes_nothing():
    image = noise(8, 11, 3)
    np.testing.assert_array_equal(resize_shorter_side(image, 8), image)


def test_enlarging_a_ramp_keeps_it_a_ramp():
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, axis=0)
    large = resize_shorter_side(ramp, 64)[0, 8:-8, 0].astype(int)  # bicubic reproduces a line away from the border
    np.testing.assert_allclose(np.diff(large, 2), 0, atol=1.01)
    np.testing.assert_allclose(large, 10 * ((np.arange(8, 56) + 0.5) / 4 - 0.5), atol=1)


def test_centre_crop_is_the_middle():
    image = noise(8, 12, 1)
    np.testing.assert_array_equal(centre_crop(image, 8), image[:, 2:10])


def test_random_crop_reaches_every_place_alike():
    image = np.arange(10, dtype=np.uint8)[None, :, None].repeat(4, axis=0)
    lefts = [int(random_crop(image, 4, 0.0, u)[0, 0, 0]) for u in np.linspace(0, 1, 7001)[:-1]]
    np.testing.assert_array_equal(np.bincount(lefts), [1000] * 7)


def test_flip_twice_is_the_image():
    image = noise(5, 6, 3)
    np.testing.assert_array_equal(horizontal_flip(image)[:, 0], image[:, -1])
    np.testing.assert_array_equal(horizontal_flip(horizontal_flip(image)), image)


def test_grey_to_rgb_and_back_changes_nothing():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    rgb = convert_channels(ramp, 3)
    assert rgb.shape == (16, 16, 3)
    np.testing.assert_array_equal(convert_channels(rgb, 1), ramp)


def test_rgb_to_grey_is_the_luma_of_itu_601():
    image = noise(32, 32, 3)
    luma = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(convert_channels(image, 1)[..., 0], luma, atol=0.51)


def test_other_channel_counts_are_refused():
    with pytest.raises(ValueError, match="2 channels to 3"):
        convert_channels(noise(4, 4, 2), 3)
