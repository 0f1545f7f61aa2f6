"""TensorFlow 1's bilinear rule, against float64 arithmetic written out pixel by pixel, and against torch-fidelity's."""

import numpy as np
import pytest

from jaxdiff.models.resize import tf1_bilinear

SIZES = [(32, 32), (64, 64), (299, 299), (512, 512), (40, 57), (1, 1), (1, 5), (5, 1), (2, 300)]


def images_of(height, width, batch=2):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (batch, height, width, 3), np.uint8)


def resized(images, height, width):
    """Output pixel i is read at i * in / out (in float32), between the pixels below and above (the last pixel: itself)."""

    def read(x, new_size):
        rows = []
        for i in range(new_size):
            position = float(np.float32(i) * np.float32(len(x) / new_size))
            low = min(int(position), len(x) - 1)
            rows.append((1 - (position - low)) * x[low] + (position - low) * x[min(low + 1, len(x) - 1)])
        return np.stack(rows)

    tall = read(np.moveaxis(images.astype(np.float64), 1, 0), height)  # H b w c
    return np.moveaxis(read(np.moveaxis(tall, 2, 0), width), (0, 1), (2, 1))  # W H b c -> b H W c


def relative_error(a, b):
    return np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("size", SIZES)
def test_is_the_rule_written_out(size):
    images = images_of(*size)
    result = tf1_bilinear(images, 299, 299)
    assert result.shape == (2, 299, 299, 3) and result.dtype == np.float32
    assert relative_error(result, resized(images, 299, 299)) < 1e-6


def test_a_ramp_keeps_its_corner_and_has_no_half_pixel_shift():
    ramp = np.arange(8.0)[None, None, :, None].repeat(3, axis=3)
    # 8 -> 16 pixels: 0, 0.5, 1 ... 7, 7. With half-pixel centres it would be 0, 0.25, 0.75 ...
    np.testing.assert_array_equal(tf1_bilinear(ramp, 1, 16)[0, 0, :, 0], np.minimum(np.arange(16) / 2, 7))


def test_shrinking_skips_pixels_instead_of_averaging_them():
    images = images_of(64, 64)
    np.testing.assert_array_equal(tf1_bilinear(images, 16, 32), images[:, ::4, ::2])


def test_own_size_changes_nothing():
    images = images_of(299, 299, 1)
    np.testing.assert_array_equal(tf1_bilinear(images, 299, 299), images)


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 0, 8, 3)])
def test_no_pixels_are_refused_in_one_line(shape):
    with pytest.raises(ValueError, match=r"must be \[b h w c\].*got shape"):
        tf1_bilinear(np.zeros(shape, np.uint8), 299, 299)


@pytest.mark.peer
@pytest.mark.parametrize("size", SIZES)
def test_is_torch_fidelitys(size):
    import torch

    from tests.models.torch_inception import resize

    images = images_of(*size)
    peer = resize(torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)), (299, 299), align_corners=False)
    peer = peer.numpy().transpose(0, 2, 3, 1)
    assert relative_error(tf1_bilinear(images, 299, 299), peer) < 1e-6
