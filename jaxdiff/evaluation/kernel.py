"""The kernel inception distance, KID (Binkowski et al. 2018, https://arxiv.org/abs/1801.01401).

The squared maximum mean discrepancy of two sets of features under k(x, y) = (x.y / d + 1)^3, by its unbiased estimate
(Gretton et al. 2012, eq. 3), which may be negative and whose mean does not depend on the number of images.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.inception_score import MeanStd

MAX_BOOTSTRAP = 4096  # images a side: the kernel of every pair is held in memory


def cubic_kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """(x.y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """The unbiased estimate of MMD^2 from all pairs of different images. Raises ValueError for fewer than 2 a side."""
    x, y = _checked(x, y)
    k_xx, k_yy, k_xy = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
    n, m = k_xy.shape
    within = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1)) + (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within - 2 * k_xy.mean())


def kernel_distance(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> MeanStd:
    """Mean and population std of `mmd2` over random subsets (drawn without replacement within each).

    `subset_size` must not exceed the number of images on either side: raises ValueError.
    """
    x, y = _checked(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"KID subsets of {subset_size} need 2 to {min(len(x), len(y))} images, as there are on one side"
        )
    rng = np.random.default_rng(seed)
    values = [
        mmd2(x[rng.choice(len(x), subset_size, replace=False)], y[rng.choice(len(y), subset_size, replace=False)])
        for _ in range(num_subsets)
    ]
    return MeanStd(float(np.mean(values)), float(np.std(values)))


def kernel_standard_error(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], replicates: int = 200, seed: int = 0
) -> float:
    """The bootstrap's standard error of `mmd2` when both sides are drawn anew, from at most 4096 images each.

    An image drawn w times gets the weight w; an image and its own copy are not a pair, or the estimate would be biased.
    The spread over `kernel_distance`'s subsets, which overlap, is no such error: it tells of their size, not of the images'.
    """
    if replicates < 2:
        raise ValueError(f"a standard error needs at least 2 bootstrap replicates, not {replicates}")
    x, y = _checked(x[:MAX_BOOTSTRAP], y[:MAX_BOOTSTRAP])
    k_xx, k_yy, k_xy = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
    np.fill_diagonal(k_xx, 0)
    np.fill_diagonal(k_yy, 0)
    rng = np.random.default_rng(seed)

    def weights(n: int) -> Float[np.ndarray, "n r"]:
        return rng.multinomial(n, np.full(n, 1 / n), size=replicates).T.astype(np.float64)

    def within(kernel: np.ndarray, w: np.ndarray) -> np.ndarray:
        pairs = w.sum(0) ** 2 - (w**2).sum(0)
        return (w * (kernel @ w)).sum(0) / pairs

    w_x, w_y = weights(len(x)), weights(len(y))
    between = (w_x * (k_xy @ w_y)).sum(0) / (w_x.sum(0) * w_y.sum(0))
    return float(np.std(within(k_xx, w_x) + within(k_yy, w_y) - 2 * between, ddof=1))


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the features have {x.shape[1]} and {y.shape[1]} dimensions: they cannot be compared")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID needs at least 2 images on each side, not {len(x)} and {len(y)}")
    return x, y
