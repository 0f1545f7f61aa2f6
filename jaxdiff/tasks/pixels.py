"""Scores of the pixels themselves, which need no network: sliced Wasserstein distance and multi-scale structural similarity."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from jaxdiff.evaluation.collect import Batch
from jaxdiff.evaluation.images import ImageSet
from jaxdiff.evaluation.ms_ssim import PairCollector, check_size
from jaxdiff.evaluation.scores import Score
from jaxdiff.evaluation.sliced_wasserstein import (
    PATCHES,
    PatchCollector,
    pyramid_sizes,
    sliced_wasserstein_distances,
)
from jaxdiff.progress import progress_bar

METRICS = ("swd", "ms_ssim")
CUSTOMARY = {"swd": 16_384, "ms_ssim": 10_000}  # images: as the paper has it
PREVIEW = 64  # images kept to be looked at
AT_ONCE = 64  # images on the host
STREAMS = {"images": 0, "reference": 1}  # of random places for patches: the two sets must not share them


def check_pixels(
    metrics: Sequence[str], what: str, shape: tuple[int, ...], num: int, reference: ImageSet | None
) -> None:
    """Raise ValueError, before anything is made, for images [h w c] that cannot be scored, alone or against the reference."""
    if "ms_ssim" in metrics:
        check_size(*shape[:2])
        if num < 2:
            raise ValueError(f"{what}: ms_ssim compares pairs: it needs at least 2 images, not {num}")
    if "swd" in metrics:
        pyramid_sizes(*shape[:2])
        if reference is None:
            raise ValueError("swd: a reference is needed")
        theirs = reference.image(0).shape
        if theirs != shape:
            ours, others = ("x".join(map(str, s)) for s in (shape, theirs))
            raise ValueError(
                f"swd compares patches of images of one size: {what} are {ours}, those of {reference.description} {others}"
            )


def fitting(metrics: Sequence[str], shape: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """The metrics that images [h w c] are large enough for, and why others are left out. Raises ValueError where all are."""
    reasons = {}
    for name, check in {"swd": pyramid_sizes, "ms_ssim": check_size}.items():
        if name in metrics:
            try:
                check(*shape[:2])
            except ValueError as error:
                reasons[name] = str(error)
    left = [name for name in metrics if name not in reasons]
    if not left:
        raise ValueError("; ".join(reasons.values()))
    return left, [f"{name} is left out: {reason}" for name, reason in reasons.items()]


@dataclasses.dataclass
class Onlooker:
    """Looks at batches of images on their way: keeps some to be shown, and what swd and ms_ssim need of all.

    Of several processes, process p of P sees the images p, p + P, p + 2P, ... of `total`.
    """

    metrics: Sequence[str] = ()  # swd, ms_ssim
    total: int = 0
    shape: tuple[int, ...] = ()  # of an image, [h w c]
    reference: ImageSet | None = None  # of swd
    seed: int = 0
    left_out: Sequence[str] = ()  # why some metrics are, as `fitting` says it

    def __post_init__(self) -> None:
        self._preview: list[np.ndarray] = []
        self._pairs = PairCollector()
        self._patches = PatchCollector(STREAMS["images"], self.seed)
        self.compared = 0 if self.reference is None else min(self.total, len(self.reference))  # images a side of swd

    def watch(self, batches: Iterable[Batch], size: int) -> Iterator[Batch]:
        """The same batches, of `size` images but for the last; an image comes to the host only where it is needed there."""
        rounds = 0
        for images, count in batches:
            if self.metrics or sum(map(len, self._preview)) < PREVIEW:
                self._take(np.asarray(images)[:count])
            rounds += 1
            yield images, count
        nothing = np.zeros((0, *self.shape), np.uint8)
        if "ms_ssim" in self.metrics:
            # A process that had a batch less joins in the last exchange with nothing.
            for _ in range(rounds, -(-_share(self.total, 0) // size)):
                self._pairs.add(nothing)
        if "swd" in self.metrics and not rounds:
            self._patches.add(nothing)

    def _take(self, images: UInt8[np.ndarray, "b h w c"]) -> None:
        if sum(map(len, self._preview)) < PREVIEW:
            self._preview.append(images)
        if "ms_ssim" in self.metrics:
            self._pairs.add(images)
        if "swd" in self.metrics:
            wanted = _share(self.compared) - self._patches.count
            if wanted > 0:
                self._patches.add(images[:wanted])

    def preview(self) -> UInt8[np.ndarray, "n h w c"]:
        """The first images of this process."""
        empty = np.zeros((0, *(self.shape or (1, 1, 1))), np.uint8)
        return np.concatenate(self._preview)[:PREVIEW] if self._preview else empty

    def warnings(self) -> list[str]:
        """What a reader of the scores must know beside them, a line each."""
        if "swd" not in self.metrics or self.compared >= CUSTOMARY["swd"]:
            return [*self.left_out]
        return [
            *self.left_out,
            f"swd is of {self.compared:,} images a side, fewer than the paper's {CUSTOMARY['swd']:,}: compare it only with "
            "one of as many",
        ]

    def scores(self) -> dict[str, list[Score]]:
        """By the metric's name, when all batches have been seen; every process must call this."""
        found = {}
        if "ms_ssim" in self.metrics:
            values = self._pairs.result()
            error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
            kind = "" if error is None else "standard error over the pairs"
            found["ms_ssim"] = [Score("ms_ssim", float(values.mean()), error, kind, f"{len(values):,} pairs")]
        if "swd" in self.metrics:
            assert self.reference is not None
            found["swd"] = self._distances(self.reference)
        return found

    def _distances(self, reference: ImageSet) -> list[Score]:
        chosen = dataclasses.replace(reference, indices=reference.indices[: self.compared])
        theirs = PatchCollector(STREAMS["reference"], self.seed)
        theirs.add(np.zeros((0, *self.shape), np.uint8))  # a process may have no share
        share = chosen.share(jax.process_index(), jax.process_count())
        with progress_bar(0, self.compared, "patches of the reference", unit="image") as bar:
            for images, count in share.batches(AT_ONCE) if len(share) else ():
                theirs.add(images)
                bar.update(count * jax.process_count())
        distances = sliced_wasserstein_distances(self._patches.result(), theirs.result(), self.seed)
        note = f"times 1000; {self.compared:,} images a side, {PATCHES} patches each"
        levels = [Score(f"swd_{size}", value, note=note) for size, value in distances.items()]
        return [*levels, Score("swd", float(np.mean(list(distances.values()))), note=f"mean of the levels, {note}")]


def _share(total: int, process: int | None = None) -> int:
    """How many of `total` images a process sees; this one, unless another is named."""
    return len(range(jax.process_index() if process is None else process, total, jax.process_count()))
