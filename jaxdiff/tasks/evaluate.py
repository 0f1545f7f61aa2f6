"""An evaluation from beginning to end: what was asked for, and its scores."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax

from jaxdiff.config import Config, SamplingConfig
from jaxdiff.data.sources import open_source
from jaxdiff.evaluation.collect import provenance_of
from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.evaluation.images import ImageSet, open_images
from jaxdiff.evaluation.scores import (
    METRICS,
    NEED_REFERENCE,
    Options,
    check_metrics,
    check_reference,
    score,
    warnings,
)
from jaxdiff.evaluation.statistics import Provenance, Statistics, is_statistics, load_statistics
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.likelihood import images_for_likelihood, likelihood_scores
from jaxdiff.tasks.pixels import AT_ONCE, CUSTOMARY, Onlooker, check_pixels, fitting
from jaxdiff.tasks.pixels import METRICS as PIXEL_METRICS
from jaxdiff.tasks.reconstruct import METRICS as RECONSTRUCTION_METRICS
from jaxdiff.tasks.reconstruct import reconstruction_scores
from jaxdiff.tasks.results import Results
from jaxdiff.tasks.run import Run
from jaxdiff.tasks.score import (
    Scorer,
    cached_statistics,
    local_mesh,
    look,
    sample_shape,
    samples_name,
    samples_of,
    training_images,
)
from jaxdiff.training.processes import is_first

IMAGE_METRICS = (*METRICS, *PIXEL_METRICS)  # of any images
ALL_METRICS = (*IMAGE_METRICS, "bpd", *RECONSTRUCTION_METRICS)
WANT_REFERENCE = (*NEED_REFERENCE, "swd")
NUM_IMAGES = 5000  # samples to score, unless a metric is customarily of more
UNSEEN = {"nine_tenths": "tenth"}  # split trained on -> split that it leaves out, where that is not called "test"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What images are compared with: a statistics file, a folder, an .npz of images or a data source; "": a run's own data."""

    name: str = ""
    dir: str | None = None
    split: str = "train"
    image_size: int | None = None

    def statistics(self, scorer: Scorer, spatial: bool) -> Statistics:
        """Read or worked out. Raises ValueError or FileNotFoundError."""
        path = pathlib.Path(self.name).expanduser()
        if path.suffix == ".npz" and is_statistics(path):
            return load_statistics(path)
        return scorer.of_images(self.images(), spatial=spatial)[0]

    def images(self, channels: int | None = None) -> ImageSet:
        """The images themselves. Raises ValueError, also of a statistics file, or FileNotFoundError."""
        path = pathlib.Path(self.name).expanduser()
        if path.suffix == ".npz" and is_statistics(path):
            raise ValueError(f"{self.name}: swd compares images, and this file holds statistics only")
        return open_images(self.name, self.dir, self.split, size=self.image_size, channels=channels)

    def of_run(self, run: Run, size: int) -> ImageSet:
        """The data that a run has learnt from, at `size` pixels a side."""
        data = run.task.config.data
        folder = self.dir or data.dir or None
        source = open_source(data.source, folder, data.split, max_bad_fraction=data.max_bad_fraction)
        return training_images(run.task.config, source, size)


def check_extractor(metrics: Sequence[str], extractor: Extractor) -> None:
    """Raise ValueError for a score that this extractor cannot give."""
    if "sfid" in metrics and not extractor.has_spatial:
        raise ValueError(f"sfid needs features of an inner layer, which {extractor.name} does not give: use inception")


def default_num(metrics: Sequence[str]) -> int:
    """How many samples these metrics are customarily of."""
    return max(CUSTOMARY.get(name, NUM_IMAGES) for name in metrics)


def evaluate_images(
    metrics: Sequence[str],
    images: ImageSet,
    reference: Reference | None,
    make_scorer: Callable[[], Scorer] | None,
    options: Options,
) -> Results:
    """Scores of any images. Raises ValueError or FileNotFoundError with one line.

    `make_scorer` is called where features are needed, when nothing else is wrong; `swd` and `ms_ssim` do without. Those that
    images of this size cannot have are left out with a warning while others are left.
    """
    check_metrics(list(metrics), IMAGE_METRICS)
    shape = images.image(0).shape
    metrics, left_out = fitting(metrics, shape)
    onlooker = Onlooker(left_out=left_out)
    if pixels := [name for name in metrics if name in PIXEL_METRICS]:
        theirs = reference.images() if "swd" in pixels and reference is not None else None
        check_pixels(pixels, images.description, shape, len(images), theirs)
        onlooker = Onlooker(pixels, len(images), shape, theirs, options.seed, left_out)
    features, scorer = _features(metrics, make_scorer)
    if scorer is None:
        batches = images.share(jax.process_index(), jax.process_count()).batches(AT_ONCE)
        look(onlooker.watch(batches, AT_ONCE), len(images), "looking")
        provenance = Provenance(num_images=len(images), data=images.description, seed=images.seed)
        return _pixel_results(metrics, onlooker, provenance, options, None)
    spatial, statistics = "sfid" in metrics, None
    if reference is not None and _needs_reference(features, options):
        statistics = reference.statistics(scorer, spatial)
    _check(features, statistics, images.description, len(images), scorer, options)
    generated, _ = scorer.of_images(images, _keep(features, options), spatial, onlooker)
    return _results(metrics, generated, statistics, scorer, options, onlooker, None)


def evaluate_samples(
    metrics: Sequence[str],
    run: Run,
    workdir: str | pathlib.Path,
    reference: Reference,
    make_scorer: Callable[[], Scorer] | None,
    options: Options,
    num: int | None = None,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
) -> Results:
    """Scores of a run's samples. Statistics of the run's own data are kept in the workdir. Raises ValueError with one line.

    `make_scorer` and metrics that are left out: as with `evaluate_images`. `num`: None for what is customary.
    """
    check_metrics(list(metrics), IMAGE_METRICS)
    sampling = sampling or run.task.config.sampling
    shape = sample_shape(run, sampling)
    metrics, left_out = fitting(metrics, shape)
    num = num or default_num(metrics)
    reference = dataclasses.replace(reference, image_size=reference.image_size or shape[0])
    onlooker = Onlooker(left_out=left_out)
    if pixels := [name for name in metrics if name in PIXEL_METRICS]:
        theirs = None
        if "swd" in pixels:
            theirs = reference.images(shape[-1]) if reference.name else reference.of_run(run, shape[0])
            num = min(num, len(theirs)) if set(metrics) == {"swd"} else num  # no more are compared
        check_pixels(pixels, "samples", shape, num, theirs)
        onlooker = Onlooker(pixels, num, shape, theirs, options.seed, left_out)
    features, scorer = _features(metrics, make_scorer)
    if scorer is None:
        batches = samples_of(run, num, seed, sampling, local_mesh(run.task.config), onlooker)
        look(batches, num, "sampling")
        provenance = Provenance(num_images=num, data=samples_name(run, num), seed=seed)
        return _pixel_results(metrics, onlooker, provenance, options, sampling)
    spatial, statistics = "sfid" in metrics, None
    if _needs_reference(features, options):
        if reference.name:
            statistics = reference.statistics(scorer, spatial)
        else:
            path = pathlib.Path(workdir) / f"reference-{scorer.extractor.name}.npz"
            statistics = cached_statistics(path, reference.of_run(run, shape[0]), scorer, spatial)
    _check(features, statistics, "samples", num, scorer, options)
    generated, _ = scorer.of_run(run, num, seed, sampling, _keep(features, options), spatial, onlooker)
    return _results(metrics, generated, statistics, scorer, options, onlooker, sampling)


def _features(metrics: Sequence[str], make_scorer: Callable[[], Scorer] | None) -> tuple[list[str], Scorer | None]:
    """Those of the metrics that are of features, and a scorer if there are any. Raises ValueError where it cannot give them."""
    features = [name for name in metrics if name in METRICS]
    if not features:
        return features, None
    if make_scorer is None:
        raise ValueError(f"{', '.join(features)}: an extractor is needed")
    scorer = make_scorer()
    check_extractor(features, scorer.extractor)
    return features, scorer


def _check(
    metrics: Sequence[str], reference: Statistics | None, data: str, num: int, scorer: Scorer, options: Options
) -> None:
    """Refuse what cannot be scored before anything is extracted."""
    least = max(2, options.splits if "is" in metrics else 2, options.neighbours + 1 if "pr" in metrics else 2)
    if num < least:
        why = f"an inception score of {options.splits} splits" if least == options.splits else "a score"
        raise ValueError(f"{data}: {why} needs at least {least} images, not {num}")
    provenance = provenance_of(scorer.extractor, data)
    check_reference(list(metrics), provenance, scorer.extractor.dimension, reference, options)


def _needs_reference(metrics: Sequence[str], options: Options) -> bool:
    return any(name in NEED_REFERENCE for name in metrics) or options.marginal == "real"


def _keep(metrics: Sequence[str], options: Options) -> int | None:
    """How many features to keep: all where a score needs the features themselves, else none."""
    return None if {"kid", "pr"} & set(metrics) or options.bootstrap or options.infinite else 0


def _results(
    metrics: Sequence[str], generated: Statistics, reference: Statistics | None, scorer: Scorer, options: Options,
    onlooker: Onlooker, sampling: SamplingConfig | None,
) -> Results:  # fmt: skip
    scores = onlooker.scores()
    features = [name for name in metrics if name in METRICS]
    for name in features:
        found = score([name], generated, reference, options)
        scores[name] = [dataclasses.replace(s, name=scorer.extractor.score_name(s.name)) for s in found]
    return Results(
        scores=[s for name in metrics for s in scores[name]],
        images=generated.provenance,
        reference=None if reference is None else reference.provenance,
        options=options,
        sampling=sampling,
        warnings=[*warnings(features, generated, reference), *onlooker.warnings()],
        preview=onlooker.preview(),
        marginals=(generated.marginal, reference and reference.marginal) if "is" in metrics else None,
    )


def _pixel_results(
    metrics: Sequence[str], onlooker: Onlooker, images: Provenance, options: Options, sampling: SamplingConfig | None
) -> Results:
    """Of metrics that all need pixels only."""
    scores, theirs = onlooker.scores(), onlooker.reference
    return Results(
        scores=[s for name in metrics for s in scores[name]],
        images=images,
        reference=None if theirs is None else Provenance(num_images=len(theirs), data=theirs.description),
        options=options,
        sampling=sampling,
        warnings=onlooker.warnings(),
        preview=onlooker.preview(),
    )


def evaluate_likelihood(
    run: Run,
    dir: str | None = None,
    split: str | None = None,
    num: int | None = 256,
    seed: int = 0,
    ode_steps: int = 128,
) -> Results:
    """Likelihood of a run on `num` images of its data set: unseen ones where there are any, unless `split` says otherwise."""
    config = run.task.config
    images, warnings = unseen_images(config, dir, split, seed)
    pixels, requests = images_for_likelihood(run, images, num)
    batch = config.sampling.batch_per_device
    scores = likelihood_scores(run, pixels, requests, local_mesh(config), batch, seed, ode_steps)
    provenance = Provenance(num_images=len(pixels), data=images.description, seed=seed)
    return Results(scores, provenance, warnings=warnings)


def unseen_images(config: Config, dir: str | None, split: str | None, seed: int) -> tuple[ImageSet, list[str]]:
    """Images that a run has not learnt from where there are any, unless `split` says otherwise; and a warning if it has."""
    data, source, used = config.data, None, split or UNSEEN.get(config.data.split, "test")
    try:
        source = open_source(data.source, dir or data.dir or None, used, max_bad_fraction=data.max_bad_fraction)
    except (ValueError, FileNotFoundError):
        if split is not None:
            raise
        used = data.split
        source = open_source(data.source, dir or data.dir or None, used, max_bad_fraction=data.max_bad_fraction)
    images = ImageSet.of(source, used, data.image_size, data.channels, seed=seed)
    seen = [f"these are images of the split {used!r}, which the model has seen"] if used == data.split else []
    return images, seen


def evaluate_reconstructions(
    metrics: Sequence[str],
    run: Run,
    make_scorer: Callable[[], Scorer],
    dir: str | None = None,
    split: str | None = None,
    num: int | None = None,
    seed: int = 0,
) -> Results:
    """How an autoencoder's run reconstructs `num` images of its data set (default: all), unseen ones where there are any.

    `make_scorer` is called where rfid is asked for. Raises ValueError with one line.
    """
    check_metrics(list(metrics), RECONSTRUCTION_METRICS)
    if not isinstance(run.task, AutoencoderTask):
        raise ValueError(
            f"{', '.join(metrics)}: only an autoencoder reconstructs, and this is a {run.task.config.task}"
        )
    images, warnings = unseen_images(run.task.config, dir, split, seed)
    chosen = dataclasses.replace(images, indices=images.indices[:num])
    scorer = make_scorer() if "rfid" in metrics else None
    if scorer is not None and len(chosen) <= scorer.extractor.dimension:
        warnings.append(
            f"{len(chosen):,} images are fewer than the features' {scorer.extractor.dimension:,} dimensions: compare rfid only "
            "with an rfid of as many images"
        )
    scores, preview = reconstruction_scores(metrics, run.task, run.params, chosen, scorer, local_mesh(run.task.config))
    data = f"reconstructions of {chosen.description}"
    provenance = Provenance(data=data, seed=seed) if scorer is None else provenance_of(scorer.extractor, data, seed)
    provenance = dataclasses.replace(provenance, num_images=len(chosen))
    return Results(scores, provenance, warnings=warnings, preview=preview)


def make_reference(images: ImageSet, scorer: Scorer, path: pathlib.Path) -> Results:
    """Write the statistics of images (with the first 10,000 features) to a file. Raises ValueError with one line."""
    statistics, preview = scorer.of_images(images, spatial=True)
    if is_first():
        statistics.save(path)
    return Results([], statistics.provenance, preview=preview)
