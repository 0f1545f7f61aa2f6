"""Scores by name, of the statistics of generated images, against those of real ones where a score needs them.

fid   Frechet inception distance: smaller is better, 0 is equal moments
sfid  the same of an inner layer's channels, which see where things are
is    inception score: larger is better
kid   kernel inception distance: smaller is better, may be negative
pr    precision (are the images like real ones?) and recall (are all kinds of real ones there?), each 0 to 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdiff.evaluation.frechet import frechet_distance, frechet_infinite, frechet_standard_error
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kernel import kernel_distance, kernel_standard_error
from jaxdiff.evaluation.neighbours import precision_recall
from jaxdiff.evaluation.statistics import NotComparableError, Provenance, Statistics, check_comparable

NEED_REFERENCE = ("fid", "sfid", "kid", "pr")


@dataclasses.dataclass(frozen=True)
class Score:
    """A number with all that it takes to make it again. `error` is what `error_kind` says."""

    name: str
    value: float
    error: float | None = None
    error_kind: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """How scores are worked out; the defaults are the customary ones."""

    splits: int = 10  # of the inception score
    marginal: str = (
        "generated"  # p(y) of the inception score: of the "generated" images (the paper) or of the "real" ones
    )
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # at most; all images where there are fewer
    neighbours: int = 3  # k of precision and recall
    bootstrap: int = 0  # replicates for the standard error of fid and kid; 0: none
    infinite: bool = False  # also FID extrapolated to infinitely many images
    seed: int = 0  # of the subsets and the bootstrap
    force: bool = False  # score even what is not comparable


def check_metrics(metrics: list[str], known: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown or missing name."""
    for name in metrics:
        if name not in known:
            raise ValueError(f"unknown metric {name!r}: there are {', '.join(known)}")
    if not metrics:
        raise ValueError(f"no metric was asked for: there are {', '.join(known)}")


def score(
    metrics: list[str], generated: Statistics, reference: Statistics | None = None, options: Options | None = None
) -> list[Score]:
    """The scores of that name, in order.

    Raises NotComparableError where the two were not made alike (unless `options.force`), ValueError where something that a
    score needs is missing.
    """
    options = options or Options()
    note = check_reference(metrics, generated.provenance, len(generated.mean), reference, options)
    scores = [s for name in metrics for s in _FUNCTIONS[name](generated, reference, options)]
    return [dataclasses.replace(s, note="; ".join(filter(None, (s.note, note)))) for s in scores]


def check_reference(
    metrics: list[str], provenance: Provenance, dimension: int, reference: Statistics | None, options: Options
) -> str:
    """Whether features of this provenance and dimension, yet to be made, can be scored against `reference`.

    Returns what must be noted beside the scores: why they are not comparable, where `options.force` lets that pass. Raises as
    `score` does, before hours are spent on features.
    """
    check_metrics(metrics, METRICS)
    wants = [name for name in metrics if name in NEED_REFERENCE]
    wants += ["is with p(y) of real images"] * ("is" in metrics and options.marginal == "real")
    if not wants:
        return ""
    if reference is None:
        raise ValueError(f"{', '.join(wants)}: a reference is needed")
    data, note = reference.provenance.data, ""
    try:
        check_comparable(provenance, reference.provenance)
    except NotComparableError as error:
        if not options.force:
            raise
        note = str(error)
    if len(reference.mean) != dimension:
        raise ValueError(f"{data}: its features have {len(reference.mean)} dimensions, those of the images {dimension}")
    for name, field in (("kid", "features"), ("pr", "features"), ("sfid", "spatial_mean")):
        if name in metrics and getattr(reference, field) is None:
            what = "features themselves" if field == "features" else "moments of an inner layer"
            raise ValueError(f"{name} needs the {what}, which {data} lacks")
    if "is" in metrics and options.marginal == "real" and reference.marginal is None:
        raise ValueError(f"p(y) of real images was asked for, which {data} lacks")
    return note


def warnings(metrics: list[str], generated: Statistics, reference: Statistics | None) -> list[str]:
    """What a reader of the scores must know beside them, a line each."""
    lines = []
    if reference is not None and (unknown := reference.provenance.unknown()):
        lines.append(f"{reference.provenance.data}: a file of another tool: its {', '.join(unknown)} are unknown")
    dimension = len(generated.mean)
    for what, statistics in (("the images are", generated), ("the reference is", reference)):
        count = None if statistics is None else statistics.provenance.num_images
        if "fid" in metrics and count is not None and count <= dimension:
            lines.append(
                f"{what} only {count:,}, fewer than the features' {dimension:,} dimensions: FID is biased upwards; "
                "compare it only with a FID of as many images"
            )
    return lines


def _fid(generated: Statistics, reference: Any, options: Options) -> list[Score]:
    to = (reference.mean, reference.covariance)
    scores = [Score("fid", frechet_distance(generated.mean, generated.covariance, *to))]
    if options.bootstrap:
        error = frechet_standard_error(_features(generated, "bootstrap"), *to, options.bootstrap, options.seed)
        scores[0] = dataclasses.replace(scores[0], error=error, error_kind=_bootstrap(options))
    if options.infinite:
        limit = frechet_infinite(_features(generated, "extrapolation"), *to, seed=options.seed)
        scores.append(Score("fid_infinite", limit, note="extrapolated to infinitely many images"))
    return scores


def _bootstrap(options: Options) -> str:
    return f"bootstrap standard error, {options.bootstrap} replicates; 95% interval: 1.96 times it"


def _sfid(generated: Statistics, reference: Any, options: Options) -> list[Score]:
    moments: list[Any] = []
    for statistics in (generated, reference):
        if statistics.spatial_mean is None:
            raise ValueError(f"sfid needs the moments of an inner layer, which {statistics.provenance.data} lacks")
        moments += [statistics.spatial_mean, statistics.spatial_covariance]
    return [Score("sfid", frechet_distance(*moments))]


def _is(generated: Statistics, reference: Any, options: Options) -> list[Score]:
    if generated.probabilities is None:
        raise ValueError(f"is needs p(y|x) of every image, which {generated.provenance.data} lacks")
    marginal = reference.marginal if options.marginal == "real" else None
    mean, std = inception_score(generated.probabilities, options.splits, marginal)
    note = f"p(y) of the {'real' if marginal is not None else 'generated'} images"
    return [Score("is", mean, std, f"std over {options.splits} splits", note)]


def _kid(generated: Statistics, reference: Any, options: Options) -> list[Score]:
    x, y = _features(generated, "kid"), _features(reference, "kid")
    size = min(options.kid_subset_size, len(x), len(y))
    mean, std = kernel_distance(x, y, options.kid_subsets, size, options.seed)
    note = f"{options.kid_subsets} subsets of {size}"
    if not options.bootstrap:
        return [Score("kid", mean, std, "std over the subsets", note)]
    error = kernel_standard_error(x, y, options.bootstrap, options.seed)
    return [Score("kid", mean, error, _bootstrap(options), note)]


def _pr(generated: Statistics, reference: Any, options: Options) -> list[Score]:
    real, fake = _features(reference, "pr"), _features(generated, "pr")
    values = precision_recall(real, fake, options.neighbours)
    note = f"k = {options.neighbours}, {len(fake):,} images against {len(real):,}"
    return [Score("precision", values.precision, note=note), Score("recall", values.recall, note=note)]


def _features(statistics: Statistics, what: str) -> np.ndarray:
    if statistics.features is None:
        raise ValueError(f"{what} needs the features themselves, and {statistics.provenance.data} holds moments only")
    return statistics.features


_FUNCTIONS: dict[str, Callable[[Statistics, Any, Options], list[Score]]] = {
    "fid": _fid, "sfid": _sfid, "is": _is, "kid": _kid, "pr": _pr,
}  # fmt: skip
METRICS = tuple(_FUNCTIONS)
