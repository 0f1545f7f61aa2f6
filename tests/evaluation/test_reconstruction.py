"""PSNR and SSIM: closed forms, and scikit-image's numbers."""

import numpy as np
import pytest

from jaxdiff.evaluation.reconstruction import check_size, peak_signal_to_noise_ratio, structural_similarity


def noisy(shape=(3, 19, 24, 3), seed=0):
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, shape, dtype=np.uint8)
    y = np.clip(x + random.normal(0, [[[[5]]], [[[20]]], [[[60]]]], shape), 0, 255).astype(np.uint8)
    return y, x


def test_psnr_of_a_constant_error():
    x = np.full((2, 4, 5, 3), 100, np.uint8)
    y = x + np.array([1, 10], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(peak_signal_to_noise_ratio(y, x), [20 * np.log10(255), 20 * np.log10(25.5)])
    assert np.isinf(peak_signal_to_noise_ratio(x, x)).all()


def test_ssim_of_constant_images():
    """Only the first factor is left: (2 a b + C1) / (a^2 + b^2 + C1)."""
    a, b, c1 = 50, 200, (0.01 * 255) ** 2
    x, y = np.full((1, 16, 12, 1), a, np.uint8), np.full((1, 16, 12, 1), b, np.uint8)
    np.testing.assert_allclose(structural_similarity(x, y), (2 * a * b + c1) / (a**2 + b**2 + c1), rtol=1e-12)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    y, x = noisy()
    np.testing.assert_allclose(structural_similarity(x, x), 1, rtol=1e-12)
    values = structural_similarity(y, x)
    assert 1 > values[0] > values[1] > values[2] > 0
    np.testing.assert_allclose(structural_similarity(x, y), values, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 19, 24, 3), (3, 11, 11, 1)])
def test_scikit_image_gives_the_same(shape):
    metrics = pytest.importorskip("skimage.metrics")
    y, x = noisy(shape)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    theirs = [metrics.structural_similarity(a, b, channel_axis=-1, **options) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(structural_similarity(y, x), theirs, atol=1e-9)
    theirs = [metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(peak_signal_to_noise_ratio(y, x), theirs, rtol=1e-12)


def test_what_cannot_be_compared():
    y, x = noisy()
    with pytest.raises(ValueError, match="uint8 of one shape"):
        peak_signal_to_noise_ratio(y[:1], x)
    with pytest.raises(ValueError, match="uint8 of one shape"):
        structural_similarity(y.astype(np.float32), x)
    with pytest.raises(ValueError, match="images of 10 are too small"):
        check_size(10)
