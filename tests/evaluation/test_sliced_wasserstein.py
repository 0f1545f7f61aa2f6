"""The sliced Wasserstein distance: SciPy's filters and distances, and Gaussians, for which it is known."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, special, stats

from jaxdiff.evaluation import sliced_wasserstein as swd
from jaxdiff.evaluation.sliced_wasserstein import (
    collect_patches,
    laplacian_pyramid,
    normalize_patches,
    pyramid_sizes,
    sliced_wasserstein,
    sliced_wasserstein_distances,
)
from tests.models.tiny_networks import jit

RNG = np.random.default_rng(0)
KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[None, :, :, None] / 256


def images(number=6, size=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, channels), dtype=np.uint8)


def test_pyramid_by_scipys_convolutions():
    x = RNG.standard_normal((2, 32, 64, 3))
    halved = [x]
    for _ in range(2):
        halved.append(ndimage.convolve(halved[-1], KERNEL, mode="mirror")[:, ::2, ::2])
    ours = jit(laplacian_pyramid, static_argnums=1)(jnp.asarray(x, jnp.float32), 3)
    for level in range(3):
        expected = halved[level]
        if level < 2:
            zeros = np.zeros_like(halved[level])
            zeros[:, ::2, ::2] = halved[level + 1]
            expected = expected - ndimage.convolve(zeros, 4 * KERNEL, mode="mirror")
        np.testing.assert_allclose(ours[level], expected, atol=2e-6)


def test_pyramid_of_one_colour_has_no_details():
    *details, last = jit(laplacian_pyramid, static_argnums=1)(jnp.full((1, 64, 64, 1), 7.0), 3)
    assert all(np.abs(level).max() < 1e-5 for level in details)
    np.testing.assert_allclose(last, 7.0, rtol=1e-6)


def test_sizes():
    assert pyramid_sizes(1024, 1024) == [1024, 512, 256, 128, 64, 32, 16]
    assert pyramid_sizes(32, 32) == [32, 16]
    assert pyramid_sizes(28, 28) == [28]
    assert pyramid_sizes(8, 8) == [8]
    with pytest.raises(ValueError, match="too small"):
        pyramid_sizes(6, 32)
    with pytest.raises(ValueError, match="66x66 cannot be halved so often"):
        pyramid_sizes(66, 66)


def test_patches_are_windows_from_everywhere_in_the_image():
    """An image of 16x16 has one level, itself; its pixels tell where they are, its channels which they are."""
    place = np.arange(256).reshape(1, 16, 16, 1).astype(np.uint8)
    places = collect_patches([place], stream=0, patches=2000)[16].reshape(2000, 7, 7)
    window = np.arange(7)[:, None] * 16 + np.arange(7)[None]
    corners = places[:, 0, 0]
    np.testing.assert_array_equal(places, corners[:, None, None] + window[None])
    rows, columns = np.unique(corners // 16), np.unique(corners % 16)
    np.testing.assert_array_equal(rows, np.arange(10))
    np.testing.assert_array_equal(columns, np.arange(10))


def test_patches_of_all_levels_and_images_whatever_the_batches():
    x = images(5)
    whole = collect_patches([x], stream=0, patches=9)
    assert {size: patches.shape for size, patches in whole.items()} == {32: (45, 147), 16: (45, 147)}
    split = collect_patches([x[:2], x[2:]], stream=0, patches=9)
    other = collect_patches([x], stream=1, patches=9)
    for size in whole:
        np.testing.assert_allclose(whole[size], split[size], atol=1e-4)
        assert (whole[size] != other[size]).any(1).mean() > 0.9
        np.testing.assert_array_equal(whole[size][:9], collect_patches([x[:1]], stream=0, patches=9)[size])


def test_normalised_by_colour():
    patches = (RNG.standard_normal((500, 3, 49)) * [[[2.0], [5.0], [0.1]]] + [[[100.0], [-3.0], [0.0]]]).astype(
        np.float32
    )
    y = normalize_patches(patches.reshape(500, -1)).reshape(500, 3, 49)
    np.testing.assert_allclose(y.mean((0, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 2)), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="all of one colour"):
        normalize_patches(np.zeros((10, 49), np.float32))


def test_along_one_axis_it_is_scipys_distance():
    x, y = RNG.standard_normal((300, 1)).astype(np.float32), RNG.exponential(2, (300, 1)).astype(np.float32)
    np.testing.assert_allclose(sliced_wasserstein(x, y), stats.wasserstein_distance(x[:, 0], y[:, 0]), rtol=1e-5)


def test_distance_of_a_shifted_and_of_a_widened_gaussian():
    """Shifted by mu: the mean over directions u of |u.mu|. s times as wide: (s - 1) E|N(0, 1)|."""
    d, mu = 20, np.zeros((1, 20), np.float32)
    mu[0, 3] = 2.5
    x = RNG.standard_normal((1500, d)).astype(np.float32)
    mean_cosine = special.gamma(d / 2) / (math.sqrt(math.pi) * special.gamma((d + 1) / 2))
    np.testing.assert_allclose(sliced_wasserstein(x, x + mu, repeats=40), 2.5 * mean_cosine, rtol=0.03)
    np.testing.assert_allclose(sliced_wasserstein(x, 3 * x), 2 * math.sqrt(2 / math.pi), rtol=0.02)


def test_identical_sets_are_at_distance_0_whatever_their_order():
    x = RNG.standard_normal((200, 49)).astype(np.float32)
    assert sliced_wasserstein(x, x) == 0
    np.testing.assert_allclose(sliced_wasserstein(x, x[RNG.permutation(200)]), 0.0, atol=1e-6)


def test_symmetric_and_by_seed_and_however_many_directions_at_once(monkeypatch):
    x, y = (RNG.standard_normal((100, 49)).astype(np.float32) for _ in range(2))
    value = sliced_wasserstein(x, y, seed=3)
    np.testing.assert_allclose(sliced_wasserstein(y, x, seed=3), value, rtol=1e-6)
    assert value == sliced_wasserstein(x, y, seed=3) != sliced_wasserstein(x, y, seed=4)
    monkeypatch.setattr(swd, "AT_ONCE", 50)
    np.testing.assert_allclose(sliced_wasserstein(x, y, seed=3), value, rtol=1e-6)
    with pytest.raises(ValueError, match="as many patches"):
        sliced_wasserstein(x, y[:50])


def test_blur_is_far_off_in_the_details_and_near_in_the_shapes():
    x, y = images(40, channels=1, seed=1), images(40, channels=1, seed=2)
    blurred = ndimage.gaussian_filter(y.astype(np.float64), (0, 1, 1, 0)).round().astype(np.uint8)
    reference = collect_patches([x], stream=1)
    same, far = (sliced_wasserstein_distances(collect_patches([z], stream=0), reference) for z in (y, blurred))
    assert list(same) == [32, 16]
    assert far[32] > 3 * same[32] and far[16] < 2 * same[16]
    assert sliced_wasserstein_distances(reference, reference) == {32: 0.0, 16: 0.0}
    with pytest.raises(ValueError, match="32 and of 16 pixels"):
        sliced_wasserstein_distances(reference, collect_patches([images(2, 16, 1)], stream=0))
