"""Scoring: images (of a run, or any) -> features -> statistics -> scores."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.config import Config, ConfigError, EvaluationConfig, SamplingConfig
from jaxdiff.data.sources import Source
from jaxdiff.evaluation.collect import Batch, Collector, make_extract, provenance_of
from jaxdiff.evaluation.extractors import Extractor, load_extractor
from jaxdiff.evaluation.images import ImageSet
from jaxdiff.evaluation.scores import NEED_REFERENCE, score
from jaxdiff.evaluation.statistics import Provenance, Statistics, load_statistics
from jaxdiff.generation.generate import keys_of, make_device_generator
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.autoencoder import host_copy
from jaxdiff.tasks.make import Task, at_step
from jaxdiff.tasks.pixels import METRICS as PIXEL_METRICS
from jaxdiff.tasks.pixels import Onlooker, check_pixels
from jaxdiff.tasks.run import Run, whole
from jaxdiff.training.processes import agreed, is_first
from jaxdiff.training.sharding import make_mesh

KEEP = 10_000  # features kept with reference statistics, for KID and for precision and recall


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """An extractor on the devices of a mesh."""

    extractor: Extractor
    mesh: Mesh
    batch_per_device: int = 16

    def of_images(
        self, images: ImageSet, keep: int | None = KEEP, spatial: bool = False, onlooker: Onlooker | None = None
    ) -> tuple[Statistics, Any]:
        """Statistics of images on the host (each process takes its share), and some of the images to look at."""
        size = self.mesh.size * self.batch_per_device
        batches = images.share(jax.process_index(), jax.process_count()).batches(size)
        onlooker = onlooker or Onlooker()
        provenance = provenance_of(self.extractor, images.description, images.seed)
        watched = onlooker.watch(batches, size)
        return self.of_batches(watched, len(images), provenance, keep, spatial, "features"), onlooker.preview()

    def of_run(
        self,
        run: Run,
        num: int,
        seed: int,
        settings: SamplingConfig,
        keep: int | None = None,
        spatial: bool = False,
        onlooker: Onlooker | None = None,
    ) -> tuple[Statistics, Any]:
        """Statistics of the samples of `samples_of`, which never leave the devices unless somebody looks; and some to look at."""
        onlooker = onlooker or Onlooker()
        provenance = provenance_of(self.extractor, samples_name(run, num), seed)
        watched = samples_of(run, num, seed, settings, self.mesh, onlooker)
        return self.of_batches(watched, num, provenance, keep, spatial, "sampling"), onlooker.preview()

    def of_batches(
        self, batches: Iterable[Batch], total: int, provenance: Provenance, keep: int | None, spatial: bool, name: str
    ) -> Statistics:
        """Statistics of this process's share of `total` images; `name`: for the progress bar."""
        collector = Collector(None if keep is None else -(-keep // jax.process_count()), spatial)
        extract = make_extract(self.extractor, self.mesh, self.batch_per_device)
        with progress_bar(0, total, f"{name}, {self.extractor.name}", unit="image") as bar:
            for features in extract(batches):
                collector.add(features)
                bar.update(len(features.pool) * jax.process_count())
        return collector.statistics(provenance)


def samples_name(run: Run, num: int) -> str:
    """What a provenance says of samples."""
    return f"{num:,} samples of step {run.step:,}"


def samples_of(
    run: Run, num: int, seed: int, settings: SamplingConfig, mesh: Mesh, onlooker: Onlooker
) -> Iterator[Batch]:
    """Samples with the seeds seed, seed + 1, ..., classes or captions in turn: this process's share, watched by `onlooker`.

    They come in the order of their seeds, but for ms_ssim in a random one: its neighbours must not be of classes in turn.
    """
    order = np.random.default_rng(seed).permutation(num) if "ms_ssim" in onlooker.metrics else np.arange(num)
    mine = order[jax.process_index() :: jax.process_count()]
    sample = sampler_for_scores(run.task, settings, mesh)
    requests = jax.tree.map(lambda a: a[mine], run.requests(num, seed))
    return onlooker.watch(sample(run.params, seed + mine, requests), mesh.size * settings.batch_per_device)


def look(batches: Iterable[Batch], total: int, name: str) -> None:
    """Let all batches pass, under a progress bar."""
    with progress_bar(0, total, name, unit="image") as bar:
        for _, count in batches:
            bar.update(count * jax.process_count())


def sample_shape(run: Run, settings: SamplingConfig) -> tuple[int, ...]:
    """Height, width and channels of a run's samples; nothing is computed."""
    task = run.task
    sample = task.make_sample(settings, task.is_guided(settings))
    seeds = jnp.zeros(1, jnp.uint32)
    return jax.eval_shape(
        lambda params: sample(params, keys_of(seeds), run.requests(1), task.make_knobs(settings)), run.params
    ).shape[1:]


def sampler_for_scores(task: Task, settings: SamplingConfig, mesh: Mesh) -> Callable[..., Iterator[Batch]]:
    """A function (params, seeds, requests) -> batches of samples that stay on the devices."""
    sample = task.make_sample(settings, task.is_guided(settings))
    generate = make_device_generator(sample, mesh, settings.batch_per_device)
    return lambda params, seeds, requests: generate(params, seeds, requests, task.make_knobs(settings))


def local_mesh(config: Config) -> Mesh:
    """The devices of this process: processes share out the images, not the arrays."""
    return make_mesh(dataclasses.replace(config.sharding, mode="jit", fsdp=1), jax.local_devices())


def training_images(config: Config, source: Source, size: int | None = None) -> ImageSet:
    """A run's data set as the network sees it, without flips and random crops; `size`: pixels a side, where others are asked."""
    return ImageSet.of(source, config.data.split, size or config.data.image_size, config.data.channels)


def cached_statistics(path: pathlib.Path, images: ImageSet, scorer: Scorer, spatial: bool) -> Statistics:
    """Statistics of `images` from the file at `path` if it holds them, else worked out and written there."""
    wanted = dataclasses.replace(provenance_of(scorer.extractor, images.description), num_images=len(images))
    if agreed(path.is_file()):
        try:
            found = load_statistics(path)
        except ValueError:
            found = None  # it is only a copy of what can be worked out again
        fits = found is not None and found.provenance == wanted and (found.spatial_mean is not None or not spatial)
        if agreed(fits):
            assert found is not None
            return found
    statistics, _ = scorer.of_images(images, spatial=spatial)
    if is_first():
        statistics.save(path)
    return statistics


def make_training_scores(
    task: Task,
    source: Source,
    captions: Sequence[str],
    config: EvaluationConfig,
    mesh: Mesh,
    workdir: pathlib.Path,
) -> Callable[[Any], dict[str, float]]:
    """A function from a training state to its scores; the training data's statistics are worked out once and kept.

    Images that have not grown yet to a size of which swd or ms_ssim can be told are not scored by them.
    """
    local = local_mesh(task.config) if mesh.is_multi_process else mesh
    features = [name for name in config.metrics if name not in PIXEL_METRICS]
    pixels = [name for name in config.metrics if name in PIXEL_METRICS]
    images, scorer, spatial = training_images(task.config, source), None, "sfid" in features
    try:
        check_pixels(pixels, "samples", images.image(0).shape, config.num_images, images)
        if features:
            scorer = Scorer(load_extractor(config.extractor, config.weights or None), local, config.batch_per_device)
    except ValueError as error:
        raise ConfigError(f"config.evaluation: {error}") from error
    reference: Statistics | None = None
    if scorer is not None and any(name in NEED_REFERENCE for name in features):
        path = workdir / f"reference-{scorer.extractor.name}.npz"
        reference = cached_statistics(path, images, scorer, spatial)
    settings = dataclasses.replace(task.config.sampling, resolution=0)  # as many pixels as there are by then

    def onlooker_of(run: Run) -> Onlooker:
        shape = sample_shape(run, settings)
        theirs = training_images(task.config, source, shape[0])
        fitting = [name for name in pixels if _can_score(name, shape, config.num_images, theirs)]
        return Onlooker(fitting, config.num_images, shape, theirs if "swd" in fitting else None)

    def scores(state: Any) -> dict[str, float]:
        step = int(state.step)
        params = whole(task, state.ema_params)
        params = host_copy(params, mesh) if mesh.is_multi_process else params
        run = Run(at_step(task, step), params, step, (), tuple(captions))
        onlooker, found = onlooker_of(run), {}
        if scorer is not None:
            keep = None if {"kid", "pr"} & set(features) else 0
            generated, _ = scorer.of_run(run, config.num_images, 0, settings, keep, spatial, onlooker)
            named = score(features, generated, reference)
            found = {scorer.extractor.score_name(s.name): s.value for s in named}
        elif onlooker.metrics:
            look(samples_of(run, config.num_images, 0, settings, local, onlooker), config.num_images, "sampling")
        return found | {s.name: s.value for of_metric in onlooker.scores().values() for s in of_metric}

    return scores


def _can_score(metric: str, shape: tuple[int, ...], num: int, reference: ImageSet) -> bool:
    try:
        check_pixels([metric], "samples", shape, num, reference)
    except ValueError:
        return False
    return True
