"""How like an original its reconstruction is, pixel by pixel: PSNR, and SSIM (Wang et al. 2004, "Image quality assessment").

Of uint8 images, in float64 on the host. Both are a number an image; a set's score is their mean.
"""

import numpy as np
from jaxtyping import Float, UInt8

LEVELS = 255.0  # the data range
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03


def peak_signal_to_noise_ratio(
    images: UInt8[np.ndarray, "n h w c"], originals: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """10 log10(255^2 / mean squared error) in dB; infinite where there is no error."""
    _check(images, originals)
    squared = ((images.astype(np.float64) - originals) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(LEVELS**2 / squared)


def structural_similarity(
    images: UInt8[np.ndarray, "n h w c"], originals: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """SSIM (eq. 13 of Wang et al. 2004): at most 1, which is equality. Mean over all whole windows, and over the channels."""
    _check(images, originals)
    x, y = images.astype(np.float64), originals.astype(np.float64)
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variance_x = _smoothed(x * x) - mean_x**2
    variance_y = _smoothed(y * y) - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return similarity.mean((1, 2, 3))


def _smoothed(x: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h-10 w-10 c"]:
    """Averages over the windows that lie within the image; separable, so two small matrix products."""
    rows, columns = _windows(x.shape[1]), _windows(x.shape[2])
    return np.einsum("Ww,nHwc->nHWc", columns, np.einsum("Hh,nhwc->nHwc", rows, x, optimize=True), optimize=True)


def _windows(size: int) -> Float[np.ndarray, "size-10 size"]:
    """Row i weighs the pixels i .. i + 10 of a line."""
    place = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (place / SIGMA) ** 2)
    matrix = np.zeros((size - WINDOW + 1, size))
    for i, row in enumerate(matrix):
        row[i : i + WINDOW] = weights / weights.sum()
    return matrix


def _check(images: np.ndarray, originals: np.ndarray) -> None:
    if images.shape != originals.shape or images.dtype != np.uint8 or originals.dtype != np.uint8:
        raise ValueError(
            f"reconstructions and originals must be uint8 of one shape, not {images.dtype} {list(images.shape)} and "
            f"{originals.dtype} {list(originals.shape)}"
        )


def check_size(size: int) -> None:
    """Raise ValueError where images are too small for SSIM."""
    if size < WINDOW:
        raise ValueError(f"ssim looks through windows of {WINDOW}x{WINDOW} pixels: images of {size} are too small")
