"""Mean and covariance of features that arrive a batch at a time, in float64 on the host.

Batches are merged by the pairwise rule of Chan, Golub and LeVeque (1979), which adds no large numbers of opposite sign:
the result does not depend on how the features were cut into batches, nor on their order, beyond rounding (1e-12).
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (the sum of the outer products of the centred features): all that a Frechet distance needs."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dimension: int) -> Moments:
        """Of no features: what merging starts from."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> Moments:
        """Of one batch."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Of the features of both."""
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance: the scatter over n - 1. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)


def merge_processes(moments: Moments) -> Moments:
    """Moments of the features of all processes, on each of them; every process must call this."""
    counts = gather_processes(np.array([moments.count], np.int64))
    means, scatters = gather_processes(moments.mean), gather_processes(moments.scatter)
    merged = Moments.empty(len(moments.mean))
    for count, mean, scatter in zip(counts, means, scatters, strict=True):
        merged = merged.merge(Moments(int(count[0]), mean, scatter))
    return merged


def gather_processes(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes (of one shape and type), stacked, to the bit."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return array[None]
    # As bytes: JAX would round float64 to float32 on the way.
    gathered = multihost_utils.process_allgather(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
    return np.asarray(gathered).view(array.dtype).reshape(jax.process_count(), *array.shape)


def gather_rows(rows: Float[np.ndarray, "n d"], total: int) -> Float[np.ndarray, "total d"]:
    """Rows in their order, where process p of P holds the rows p, p + P, p + 2P, ... of `total`."""
    processes = jax.process_count()
    padded = np.zeros((-(-total // processes), rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return gather_processes(padded).swapaxes(0, 1).reshape(-1, rows.shape[1])[:total]


def interleave_processes(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes: row 0 of each, row 1 of each, ...; the last processes may have one fewer, to the bit."""
    counts = gather_processes(np.array([len(rows)]))[:, 0]
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return gather_processes(padded).swapaxes(0, 1).reshape(-1, *rows.shape[1:])[: int(counts.sum())]
