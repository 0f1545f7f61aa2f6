"""MS-SSIM: closed forms, pytorch-msssim's numbers, and two-dimensional windows by SciPy where images are small."""

import numpy as np
import pytest
from scipy import signal

from jaxdiff.evaluation.ms_ssim import WEIGHTS, mean_pair_similarity, multi_scale_similarity


def pair(shape, strength, seed=0):
    """Smoothed noise, and the same with noise of its own."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).cumsum(1).cumsum(2)
    x = 255 * (x - x.min()) / (x.max() - x.min())
    y = np.clip(x + strength * random.standard_normal(shape), 0, 255)
    return x.round().astype(np.uint8), y.round().astype(np.uint8)


def test_equal_images_are_1_and_negatives_0():
    x, y = pair((2, 32, 48, 3), 20)
    np.testing.assert_allclose(multi_scale_similarity(x, x), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(multi_scale_similarity(x, 255 - x), 0.0)
    np.testing.assert_allclose(multi_scale_similarity(x, y), multi_scale_similarity(y, x), rtol=1e-12)


def test_constant_images():
    """No contrast to differ in: what is left is the luminance at the coarsest scale, to the power of its weight."""
    a, b, c1 = 50, 200, (0.01 * 255) ** 2
    x, y = np.full((1, 64, 64, 1), a, np.uint8), np.full((1, 64, 64, 1), b, np.uint8)
    expected = ((2 * a * b + c1) / (a**2 + b**2 + c1)) ** 0.1333
    np.testing.assert_allclose(multi_scale_similarity(x, y), expected, rtol=1e-12)


def test_pytorch_msssim_gives_the_same(golden_dir):
    with np.load(golden_dir / "ms_ssim.npz") as golden:
        for strength, expected in zip(golden["strengths"], golden["values"], strict=True):
            x, y = pair((2, 176, 192, 1), float(strength))
            np.testing.assert_allclose(multi_scale_similarity(x, y), expected, atol=2e-6)


def direct(x, y):
    """Of one pair [h w c], by whole windows of two dimensions."""
    x, y, factors = x.astype(float), y.astype(float), []
    for _ in WEIGHTS:
        size = min(11, *x.shape[:2])
        place = np.arange(size) - (size - 1) / 2
        window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * (1.5 * size / 11) ** 2))[..., None]
        window /= window.sum()

        def mean(z, window=window):
            return signal.convolve(z, window, "valid", "direct")

        variances, covariance = mean(x**2) - mean(x) ** 2 + mean(y**2) - mean(y) ** 2, mean(x * y) - mean(x) * mean(y)
        contrast = (2 * covariance + 58.5225) / (variances + 58.5225)
        luminance = (2 * mean(x) * mean(y) + 6.5025) / (mean(x) ** 2 + mean(y) ** 2 + 6.5025)
        factors.append(((luminance * contrast).mean(), contrast.mean()))
        x, y = ((z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) / 4 for z in (x, y))
    chosen = [contrast for _, contrast in factors[:-1]] + [factors[-1][0]]
    return np.prod(np.maximum(chosen, 0) ** np.array(WEIGHTS))


@pytest.mark.parametrize("shape", [(32, 32, 3), (48, 16, 1)])
def test_windows_shrink_with_the_image(shape):
    x, y = pair((2, *shape), 10)
    expected = [direct(a, b) for a, b in zip(x, y, strict=True)]
    assert min(expected) > 0.2
    np.testing.assert_allclose(multi_scale_similarity(x, y), expected, rtol=1e-9)


def test_mean_over_pairs_of_neighbours():
    x, y = pair((3, 16, 16, 1), 30)
    together = np.stack([x, y], 1).reshape(6, 16, 16, 1)
    expected = multi_scale_similarity(x, y).mean()
    torn = [together[:3], together[3:4], together[4:]]  # a pair's halves come one after the other
    for batches in ([together], [together[:4], together[4:]], [together[:2], together[2:], x[:1]], torn):
        np.testing.assert_allclose(mean_pair_similarity(batches), expected, rtol=1e-12)


def test_refusals():
    x, y = pair((3, 16, 16, 1), 30)
    with pytest.raises(ValueError, match="uint8 of one shape"):
        multi_scale_similarity(x, y[:2])
    with pytest.raises(ValueError, match="28x28 are not multiples of 16"):
        multi_scale_similarity(np.zeros((1, 28, 28, 1), np.uint8), np.zeros((1, 28, 28, 1), np.uint8))
    with pytest.raises(ValueError, match="at least 2 images"):
        mean_pair_similarity([x[:1]])
