"""From images to their statistics: batches go through the extractor, spread over all devices, and are counted one by one."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.evaluation.inception_score import softmax
from jaxdiff.evaluation.moments import Moments, gather_processes, gather_rows, merge_processes
from jaxdiff.evaluation.statistics import Provenance, Statistics
from jaxdiff.models.features import Features

BLOCK = (
    1024  # features that are gathered before the moments take them in: large products are quicker than many small ones
)
Batch = tuple[
    UInt8[Array, "b h w c"] | UInt8[np.ndarray, "b h w c"], int
]  # images, on the devices or on the host, and how many of them count


def make_extract(
    extractor: Extractor, mesh: Mesh, batch_per_device: int
) -> Callable[[Iterable[Batch]], Iterator[Features]]:
    """A function from batches of images to their features, on the host, of the images that count.

    Images on the devices (what a generator makes) stay there; images on the host are cut into batches of
    `batch_per_device` images a device, the last one padded. One program is compiled for each shape of images.
    """
    split, copied = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    params = jax.device_put(extractor.params, copied)
    # Mapped over the devices by hand: an extractor may take its images one after the other, in a loop that jit does not split.
    parts = P(mesh.axis_names)
    program = jax.jit(jax.shard_map(extractor.features, mesh=mesh, in_specs=(P(), parts), out_specs=parts))

    size = mesh.size * batch_per_device

    def dispatch(batches: Iterable[Batch]) -> Iterator[tuple[Features, int]]:
        for images, count in batches:
            if isinstance(images, jax.Array):
                yield program(params, images), count
                continue
            for start in range(0, count, size):
                part = images[start : min(start + size, count)]
                padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
                yield program(params, jax.device_put(padded, split)), len(part)

    def extract(batches: Iterable[Batch]) -> Iterator[Features]:
        waiting: collections.deque[tuple[Features, int]] = collections.deque()
        for work in dispatch(batches):
            waiting.append(work)
            if len(waiting) > 1:  # the devices work on one batch while the host takes the one before
                yield _to_host(*waiting.popleft())
        for work in waiting:
            yield _to_host(*work)

    return extract


def _to_host(features: Features, count: int) -> Features:
    return jax.tree.map(lambda a: np.asarray(a)[:count], features)


@dataclasses.dataclass
class Collector:
    """Takes features in, a batch at a time, and gives the statistics of all of them."""

    keep: int | None = None  # how many features this process keeps; None: all
    spatial: bool = False  # whether the inner layer's moments are wanted
    keep_probabilities: bool = True

    def __post_init__(self) -> None:
        self._waiting: list[Features] = []
        self._moments: list[Moments | None] = [None, None]
        self._features: list[np.ndarray] = []
        self._probabilities: list[np.ndarray] = []
        self._marginal: Float[np.ndarray, " k"] | float = 0.0
        self.count = self._kept = 0

    def add(self, features: Features) -> None:
        """Take a batch in. Raises ValueError where features are not finite, numbering the image."""
        pool, logits = np.asarray(features.pool), np.asarray(features.logits)
        bad = ~np.isfinite(pool).all(1)
        if bad.any():
            raise ValueError(f"the features of image {self.count + int(bad.argmax())} are not finite (NaN or infinity)")
        self.count += len(pool)
        if self.keep is None or self._kept < self.keep:
            self._features.append(pool[: None if self.keep is None else self.keep - self._kept])
            self._kept += len(self._features[-1])
        probabilities = softmax(logits)
        self._marginal = self._marginal + probabilities.sum(0)
        if self.keep_probabilities:
            self._probabilities.append(probabilities.astype(np.float32))
        self._waiting.append(features)
        if sum(len(f.pool) for f in self._waiting) >= BLOCK:
            self._take_in()

    def _take_in(self) -> None:
        layers = [[f.pool for f in self._waiting], [f.spatial for f in self._waiting if f.spatial is not None]]
        for i, parts in enumerate(layers[: 1 + self.spatial]):
            if parts:
                new = Moments.of(np.concatenate([np.asarray(part) for part in parts]))
                old = self._moments[i]
                self._moments[i] = new if old is None else old.merge(new)
        self._waiting = []

    def statistics(self, provenance: Provenance) -> Statistics:
        """Of all that was taken in, by all processes; the count is put into the provenance.

        Process p of P has taken in the images p, p + P, p + 2P, ...; every process must call this. Raises ValueError for fewer
        than 2 images.
        """
        if self._waiting:
            self._take_in()
        count = int(gather_processes(np.array([self.count])).sum())
        if count < 2:
            raise ValueError(f"{provenance.data}: scores need at least 2 images, not {count}")
        pool, spatial = (None if m is None else merge_processes(m) for m in self._moments)
        assert pool is not None
        kept = int(gather_processes(np.array([self._kept])).sum())
        probabilities = np.concatenate(self._probabilities) if self._probabilities else None
        return Statistics(
            provenance=dataclasses.replace(provenance, num_images=count),
            mean=pool.mean,
            covariance=pool.covariance,
            spatial_mean=None if spatial is None else spatial.mean,
            spatial_covariance=None if spatial is None else spatial.covariance,
            marginal=gather_processes(np.asarray(self._marginal)).sum(0) / count,
            features=gather_rows(np.concatenate(self._features), kept) if kept else None,
            probabilities=None if probabilities is None else gather_rows(probabilities, count),
        )


def provenance_of(extractor: Extractor, data: str, seed: int | None = None) -> Provenance:
    """Of features that this extractor makes of `data`."""
    return Provenance(
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        resize=extractor.resize,
        precision=extractor.precision,
        data=data,
        seed=seed,
    )
