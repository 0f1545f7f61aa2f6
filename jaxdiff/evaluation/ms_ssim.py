"""How alike the images of a set are: mean multi-scale structural similarity of pairs (Odena et al. 2017; Karras et al. 2018).

MS-SSIM: Wang et al. 2003, "Multiscale structural similarity for image quality assessment". On pairs of generated images a high
value tells of little variety; it says nothing of quality. As the paper's code has it: of uint8 images, in float64; similarities
are averaged over pixels and channels at each of 5 scales; where an image is smaller than the 11x11 window, the window shrinks.
"""

from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.evaluation.moments import gather_rows, interleave_processes

LEVELS = 255.0  # the data range
WINDOW, SIGMA = 11, 1.5  # the Gaussian window, in pixels
K1, K2 = 0.01, 0.03
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first; their sum is 1.0001, as in the paper


def multi_scale_similarity(
    images: UInt8[np.ndarray, "n h w c"], others: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """MS-SSIM of each pair: 1 for equal images, 0 where a scale is uncorrelated or worse (Wang et al. 2003, eq. 7)."""
    if images.shape != others.shape or images.dtype != np.uint8 or others.dtype != np.uint8:
        raise ValueError(
            f"ms_ssim: both sides must be uint8 of one shape, not {images.dtype} {list(images.shape)} and "
            f"{others.dtype} {list(others.shape)}"
        )
    check_size(*images.shape[1:3])
    x, y = images.astype(np.float64), others.astype(np.float64)
    product = np.ones(len(x))
    for scale, weight in enumerate(WEIGHTS):
        similarity, contrast = _similarities(x, y)
        factor = similarity if scale == len(WEIGHTS) - 1 else contrast
        product *= np.maximum(factor, 0) ** weight
        x, y = _halved(x), _halved(y)
    return product


class PairCollector:
    """Takes images in, a batch at a time, and keeps the MS-SSIM of images 0 and 1, 2 and 3, ...; a last odd one is left out.

    Of several processes, process p of P takes in the images p, p + P, p + 2P, ..., and all take in as many at a time but in
    their last batch, which may be empty: two of a pair that are in two processes come together, and pairs are shared out.
    """

    def __init__(self) -> None:
        """Of no images yet."""
        self._left: np.ndarray | None = None  # an image that waits for the next
        self._values: list[np.ndarray] = []
        self._pairs = 0

    def add(self, batch: UInt8[np.ndarray, "b h w c"]) -> None:
        """Take a batch in. Raises ValueError where images are of no size that can be halved between the scales."""
        images = interleave_processes(batch)
        if self._left is not None:
            images = np.concatenate([self._left, images])
        pairs = len(images) // 2
        self._left = images[2 * pairs :] if len(images) % 2 else None
        mine = np.arange(pairs)[(jax.process_index() - self._pairs) % jax.process_count() :: jax.process_count()]
        self._pairs += pairs
        if len(mine):
            self._values.append(multi_scale_similarity(images[2 * mine], images[2 * mine + 1]))

    def result(self) -> Float[np.ndarray, " pairs"]:
        """MS-SSIM of each pair, of all processes; every process must call this. Raises ValueError where there is none."""
        if not self._pairs:
            raise ValueError("ms_ssim compares pairs: it needs at least 2 images")
        return gather_rows(np.concatenate([np.zeros(0), *self._values])[:, None], self._pairs)[:, 0]


def mean_pair_similarity(batches: Iterable[UInt8[np.ndarray, "n h w c"]]) -> float:
    """Mean MS-SSIM of images 0 and 1, 2 and 3, ...; the paper's is of 10,000 images in random order.

    Raises ValueError where there are fewer than 2 images.
    """
    collector = PairCollector()
    for batch in batches:
        collector.add(batch)
    return float(collector.result().mean())


def check_size(height: int, width: int) -> None:
    """Raise ValueError for images that cannot be halved between the scales."""
    factor = 2 ** (len(WEIGHTS) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"ms_ssim halves images {len(WEIGHTS) - 1} times: {height}x{width} are not multiples of {factor}"
        )


def _similarities(
    x: Float[np.ndarray, "n h w c"], y: Float[np.ndarray, "n h w c"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """SSIM, and its factor of contrast and structure, by windows that lie within the image."""
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variances = _smoothed(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))


def _smoothed(x: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n p q c"]:
    """Averages over the windows: separable, so two passes of at most 11 terms each."""
    window = _window(min(WINDOW, *x.shape[1:3]))
    size = len(window)
    rows = sum(weight * x[:, i : x.shape[1] - size + 1 + i] for i, weight in enumerate(window))
    return sum(weight * rows[:, :, i : x.shape[2] - size + 1 + i] for i, weight in enumerate(window))


def _window(size: int) -> Float[np.ndarray, " size"]:
    place = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (place / (SIGMA * size / WINDOW)) ** 2)
    return weights / weights.sum()


def _halved(x: Float[np.ndarray, "n 2h 2w c"]) -> Float[np.ndarray, "n h w c"]:
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
