"""An evaluation from beginning to end: what was asked for, its scores, and what is left to read and to look at."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff.config import Config, ConfigError, SamplingConfig
from jaxdiff.data.sources import open_source
from jaxdiff.evaluation.collect import provenance_of
from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.evaluation.images import ImageSet, open_images
from jaxdiff.evaluation.scores import (
    METRICS,
    NEED_REFERENCE,
    Options,
    Score,
    check_metrics,
    check_reference,
    score,
    warnings,
)
from jaxdiff.evaluation.statistics import Provenance, Statistics, is_statistics, load_statistics
from jaxdiff.files import replacing, write_text
from jaxdiff.generation.pictures import image_grid
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.likelihood import images_for_likelihood, likelihood_scores
from jaxdiff.tasks.reconstruct import METRICS as RECONSTRUCTION_METRICS
from jaxdiff.tasks.reconstruct import reconstruction_scores
from jaxdiff.tasks.run import Run
from jaxdiff.tasks.score import Scorer, cached_statistics, local_mesh, training_images

ALL_METRICS = (*METRICS, "bpd", *RECONSTRUCTION_METRICS)
UNSEEN = {"nine_tenths": "tenth"}  # split trained on -> split that it leaves out, where that is not called "test"


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """Scores, and all that it takes to make them again."""

    scores: Sequence[Score]
    images: Provenance
    reference: Provenance | None = None
    options: Options | None = None
    sampling: SamplingConfig | None = None
    warnings: Sequence[str] = ()
    preview: UInt8[np.ndarray, "n h w c"] | None = None
    marginals: tuple[Any, Any] | None = (
        None  # p(y) of the images and of the reference (or None), where `is` was asked for
    )

    def table(self) -> str:
        """The scores as lines of text."""
        width = max((len(s.name) for s in self.scores), default=0)
        sets = {"images": self.images} | ({} if self.reference is None else {"reference": self.reference})
        lines = []
        for name, provenance in sets.items():
            count = "N unknown" if provenance.num_images is None else f"N = {provenance.num_images:,}"
            lines.append(f"{name:9}  {provenance.data}, {count}")
        for s in self.scores:
            error = "" if s.error is None else f" +- {s.error:.4g}"
            notes = "; ".join(filter(None, (s.error_kind, s.note)))
            lines.append(f"{s.name:{width}}  {s.value:.6g}{error}" + (f"  ({notes})" if notes else ""))
        return "\n".join(lines)

    def save(self, path: pathlib.Path) -> list[pathlib.Path]:
        """Add the scores to the list in the JSON file `path`; draw evaluation.png beside it. Returns what was written."""
        entry = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        fields = ("scores", "images", "reference", "options", "sampling")
        entry |= {name: _plain(getattr(self, name)) for name in fields}
        write_text(path, json.dumps([*read_results(path), entry], indent=2) + "\n")
        if self.preview is None:
            return [path]
        picture = path.with_name(path.name.replace("results.json", "evaluation.png"))
        self._draw(picture)
        return [path, picture]

    def _draw(self, path: pathlib.Path) -> None:
        """Images and, for the inception score, the classes that the extractor sees in all of them, most frequent first."""
        from matplotlib.figure import Figure

        assert self.preview is not None
        figure = Figure(figsize=(11, 5) if self.marginals else (5.5, 5.5), layout="constrained")
        axes = figure.subplots(1, 2 if self.marginals else 1, squeeze=False)[0]
        grid = image_grid(self.preview, padding=2)
        axes[0].imshow(grid[..., 0] if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=255)
        axes[0].set_axis_off()
        axes[0].set_title(self.images.data)
        if self.marginals:
            ours, theirs = self.marginals
            order = np.argsort(ours)[::-1][:50]
            axes[1].bar(range(len(order)), ours[order], label="these images")
            if theirs is not None and theirs.shape == ours.shape:
                axes[1].plot(range(len(order)), theirs[order], "k.", label="reference")
            axes[1].set(xlabel=f"the 50 most frequent classes of {self.images.extractor}", ylabel="p(y)")
            axes[1].legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


def _plain(value: Any) -> Any:
    """Dataclasses, alone or in a sequence, as dictionaries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a results file; none where there is no file. Raises ConfigError where it holds something else."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not a results file ({error}): move it away") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: not a results file, which holds a list: move it away")
    return entries


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
        images = open_images(self.name, self.dir, self.split, size=self.image_size)
        return scorer.of_images(images, spatial=spatial)[0]


def check_extractor(metrics: Sequence[str], extractor: Extractor) -> None:
    """Raise ValueError for a score that this extractor cannot give."""
    if "sfid" in metrics and not extractor.has_spatial:
        raise ValueError(f"sfid needs features of an inner layer, which {extractor.name} does not give: use inception")


def evaluate_images(
    metrics: Sequence[str], images: ImageSet, reference: Reference | None, scorer: Scorer, options: Options
) -> Results:
    """Scores of any images. Raises ValueError or FileNotFoundError with one line."""
    check_metrics(list(metrics), METRICS)
    check_extractor(metrics, scorer.extractor)
    spatial = "sfid" in metrics
    statistics = None
    if reference is not None and _needs_reference(metrics, options):
        statistics = reference.statistics(scorer, spatial)
    _check(metrics, statistics, images.description, len(images), scorer, options)
    generated, preview = scorer.of_images(images, _keep(metrics, options), spatial)
    return _results(metrics, generated, statistics, scorer, options, preview, None)


def evaluate_samples(
    metrics: Sequence[str],
    run: Run,
    workdir: pathlib.Path,
    reference: Reference,
    scorer: Scorer,
    options: Options,
    num: int = 5000,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
) -> Results:
    """Scores of a run's samples. Statistics of the run's own data are kept in the workdir. Raises ValueError with one line."""
    check_metrics(list(metrics), METRICS)
    check_extractor(metrics, scorer.extractor)
    sampling = sampling or run.task.config.sampling
    spatial, statistics = "sfid" in metrics, None
    if _needs_reference(metrics, options):
        if reference.name:
            statistics = reference.statistics(scorer, spatial)
        else:
            data = run.task.config.data
            source = open_source(
                data.source, reference.dir or data.dir or None, data.split, max_bad_fraction=data.max_bad_fraction
            )
            path = workdir / f"reference-{scorer.extractor.name}.npz"
            statistics = cached_statistics(path, training_images(run.task.config, source), scorer, spatial)
    _check(metrics, statistics, "samples", num, scorer, options)
    generated, preview = scorer.of_run(run, num, seed, sampling, _keep(metrics, options), spatial)
    return _results(metrics, generated, statistics, scorer, options, preview, sampling)


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
    preview: Any, sampling: SamplingConfig | None,
) -> Results:  # fmt: skip
    scores = score(list(metrics), generated, reference, options)
    named = [dataclasses.replace(s, name=scorer.extractor.score_name(s.name)) for s in scores]
    return Results(
        scores=named,
        images=generated.provenance,
        reference=None if reference is None else reference.provenance,
        options=options,
        sampling=sampling,
        warnings=warnings(list(metrics), generated, reference),
        preview=preview,
        marginals=(generated.marginal, reference and reference.marginal) if "is" in metrics else None,
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
    statistics.save(path)
    return Results([], statistics.provenance, preview=preview)
