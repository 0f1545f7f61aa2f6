"""The inception score: sure of each image's class, yet using all classes.

    IS = exp( E_x KL( p(y|x) || p(y) ) )                  1 <= IS <= the number of classes

(Salimans et al. 2016, https://arxiv.org/abs/1606.03498, section 4.) p(y|x) is the classifier's softmax, p(y) its mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class MeanStd(NamedTuple):
    """Mean and population standard deviation over the splits."""

    mean: float
    std: float


def softmax(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """p(y|x) in float64."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def inception_score(
    probabilities: Float[np.ndarray, "n k"], splits: int = 10, marginal: Float[np.ndarray, " k"] | None = None
) -> MeanStd:
    """Mean and population std over `splits` consecutive parts, part i being images [i n // splits, (i + 1) n // splits).

    p(y) is the mean of the part's own p(y|x), as in the paper's code; `marginal` puts a given p(y), such as that of real
    images, in its place. Of the Inception network, `probabilities` are the softmax of the logits without their bias.
    Raises ValueError where a part would be empty or rows are not probabilities.
    """
    p = np.asarray(probabilities, np.float64)
    if splits < 1 or len(p) < splits:
        raise ValueError(f"the inception score of {len(p)} images cannot use {splits} splits: use 1 to {len(p)}")
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(1), 1, atol=1e-6)):
        raise ValueError("the inception score needs rows of probabilities: finite, not negative, of sum 1")
    if marginal is not None and np.shape(marginal) != p.shape[1:]:
        raise ValueError(f"the marginal has {np.size(marginal)} classes, the probabilities have {p.shape[1]}")
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    scores = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        part = p[low:high]
        p_y = part.mean(0) if marginal is None else np.asarray(marginal, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(p_y)), 0.0)  # 0 log 0 = 0
        scores.append(np.exp(terms.sum(1).mean()))
    return MeanStd(float(np.mean(scores)), float(np.std(scores)))
