"""The Frechet distance of two Gaussians, its bootstrap interval and its limit for infinitely many images.

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

(Dowson & Landau 1982.) Of Inception features it is the Frechet inception distance, FID (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500, eq. 6); of the features of an inner layer it is sFID (Nash et al. 2021,
https://arxiv.org/abs/2103.03841). Everything is float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.moments import Moments

Vector = Float[np.ndarray, " d"]
Matrix = Float[np.ndarray, "d d"]


def symmetric_root(matrix: Matrix) -> Matrix:
    """The square root of a symmetric positive semi-definite matrix; eigenvalues below 0 are rounding, and count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(
    mean1: Vector, covariance1: Matrix, mean2: Vector, covariance2: Matrix, root2: Matrix | None = None
) -> float:
    """The squared distance above. `root2`, the root of covariance2, spares an eigendecomposition where it is known.

    S1 S2 has the eigenvalues of the symmetric S2^(1/2) S1 S2^(1/2), so two symmetric eigenproblems replace the root of a
    product that is not symmetric, which is slow and may fail for singular covariances.
    """
    arrays = [np.asarray(a, np.float64) for a in (mean1, covariance1, mean2, covariance2)]
    mean1, covariance1, mean2, covariance2 = arrays
    if covariance1.shape != covariance2.shape or mean1.shape != mean2.shape:
        raise ValueError(f"the features have {len(mean1)} and {len(mean2)} dimensions: they cannot be compared")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("the moments of the features are not finite (NaN or infinity)")
    root2 = symmetric_root(covariance2) if root2 is None else root2
    product = root2 @ covariance1 @ root2
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    gap = mean1 - mean2
    distance = gap @ gap + np.trace(covariance1) + np.trace(covariance2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # equal moments may miss 0 by rounding


def distance_to(reference_mean: Vector, reference_covariance: Matrix) -> Callable[[Vector, Matrix], float]:
    """The distance to a fixed reference, whose root is worked out once, as a function of (mean, covariance)."""
    root = symmetric_root(np.asarray(reference_covariance, np.float64))
    return lambda mean, covariance: frechet_distance(mean, covariance, reference_mean, reference_covariance, root)


def frechet_standard_error(
    features: Float[np.ndarray, "n d"], reference_mean: Vector, reference_covariance: Matrix,
    replicates: int = 20, seed: int = 0,
) -> float:  # fmt: skip
    """The bootstrap's standard error of the distance (Efron 1979): images drawn anew with replacement, reference fixed.

    The interval is distance +- 1.96 standard errors. Not the bootstrap's own percentiles: fewer distinct images push every
    replicate upwards, by about as much as the distance itself is biased, so that those often miss the distance.
    """
    _check_replicates(replicates)
    distance = distance_to(reference_mean, reference_covariance)
    rng = np.random.default_rng(seed)
    features = np.asarray(features, np.float64)
    values = []
    for _ in range(replicates):
        moments = Moments.of(features[rng.integers(0, len(features), len(features))])
        values.append(distance(moments.mean, moments.covariance))
    return float(np.std(values, ddof=1))


def frechet_infinite(
    features: Float[np.ndarray, "n d"], reference_mean: Vector, reference_covariance: Matrix,
    points: int = 10, seed: int = 0,
) -> float:  # fmt: skip
    """The distance extrapolated to infinitely many images (Chong & Forsyth 2020, https://arxiv.org/abs/1911.07023).

    Distances of random subsets of n/4 to n images are fitted by a + b / size, to which the bias is close once the subsets
    outnumber the dimensions; a is returned.
    """
    if len(features) < 8:
        raise ValueError(f"extrapolating needs at least 8 images, not {len(features)}")
    distance = distance_to(reference_mean, reference_covariance)
    rng = np.random.default_rng(seed)
    sizes = np.linspace(len(features) / 4, len(features), points).astype(int)
    values = []
    for size in sizes:
        moments = Moments.of(features[rng.permutation(len(features))[:size]])
        values.append(distance(moments.mean, moments.covariance))
    return float(np.polynomial.polynomial.polyfit(1 / sizes, values, 1)[0])


def _check_replicates(replicates: int) -> None:
    if replicates < 2:
        raise ValueError(f"a standard error needs at least 2 bootstrap replicates, not {replicates}")
