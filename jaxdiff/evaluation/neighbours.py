"""Precision and recall of a generator (Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991).

A set of images stands for the union of balls around its features, each reaching to its k-th nearest neighbour in the set.
Precision is the part of the generated images inside the real ones' balls; recall is the part of the real ones inside the
generated ones' balls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

BLOCK = 2048  # rows of the distance matrix worked out at a time


class PrecisionRecall(NamedTuple):
    """Both from 0 to 1."""

    precision: float
    recall: float


def precision_recall(
    real: Float[np.ndarray, "n d"], generated: Float[np.ndarray, "m d"], k: int = 3
) -> PrecisionRecall:
    """As above (eqs. 1 and 2, k = 3 as there). Raises ValueError where a side has no k-th neighbour."""
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"the features have {real.shape[1]} and {generated.shape[1]} dimensions: they cannot be compared"
        )
    if min(len(real), len(generated)) <= k or k < 1:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images on each side")
    centre = real.mean(
        0, dtype=np.float64
    )  # distances are differences of large numbers unless the features are centred
    real, generated = real - centre, generated - centre
    precision = _inside(generated, real, _radii(real, k)).mean()
    recall = _inside(real, generated, _radii(generated, k)).mean()
    return PrecisionRecall(float(precision), float(recall))


def _squared_distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def _radii(points: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each point to its k-th nearest other point (itself comes first, at distance 0)."""
    blocks = (_squared_distances(points[i : i + BLOCK], points) for i in range(0, len(points), BLOCK))
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])


def _inside(
    queries: Float[np.ndarray, "m d"], centres: Float[np.ndarray, "n d"], radii: Float[np.ndarray, " n"]
) -> Bool[np.ndarray, " m"]:
    """Whether each query lies in at least one ball."""
    blocks = (_squared_distances(queries[i : i + BLOCK], centres) for i in range(0, len(queries), BLOCK))
    return np.concatenate([(block <= radii).any(1) for block in blocks])
