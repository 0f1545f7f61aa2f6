"""How well an autoencoder reconstructs: PSNR, SSIM, and rFID, the Frechet distance between reconstructions and the originals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from jaxdiff.config import ConfigError, EvaluationConfig
from jaxdiff.data.sources import Source
from jaxdiff.evaluation.collect import Batch, provenance_of
from jaxdiff.evaluation.extractors import load_extractor
from jaxdiff.evaluation.images import ImageSet
from jaxdiff.evaluation.moments import gather_processes
from jaxdiff.evaluation.reconstruction import WINDOW, check_size, peak_signal_to_noise_ratio, structural_similarity
from jaxdiff.evaluation.scores import Score, score
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.autoencoder import AutoencoderTask, host_copy, interleaved
from jaxdiff.tasks.score import Scorer, local_mesh, training_images

PIXELS = {"psnr": (peak_signal_to_noise_ratio, "dB"), "ssim": (structural_similarity, "")}
METRICS = (*PIXELS, "rfid")
PREVIEW = 32  # originals that are shown beside their reconstructions


@dataclasses.dataclass
class _Reconstructions:
    """Reconstructions of this process's share of a set, made batch by batch, and what was seen of them on the way."""

    task: AutoencoderTask
    params: Any
    images: ImageSet
    mesh: Mesh
    metrics: Sequence[str]

    def __post_init__(self) -> None:
        self.values: dict[str, list[np.ndarray]] = {name: [] for name in self.metrics if name in PIXELS}
        self.preview: list[tuple[np.ndarray, np.ndarray]] = []

    def __iter__(self) -> Iterator[Batch]:
        split, copied = NamedSharding(self.mesh, P(self.mesh.axis_names)), NamedSharding(self.mesh, P())
        program = jax.jit(self.task.reconstruct, in_shardings=(copied, split), out_shardings=split)
        params = jax.device_put(self.params, copied)
        size = self.mesh.size * self.task.config.sampling.batch_per_device
        share = self.images.share(jax.process_index(), jax.process_count())
        for originals, count in share.batches(size):
            padded = np.concatenate([originals, np.repeat(originals[-1:], size - count, axis=0)])
            again = np.asarray(program(params, jax.device_put(padded, split)))[:count]
            for name, values in self.values.items():
                values.append(PIXELS[name][0](again, originals))
            if sum(len(part) for part, _ in self.preview) < PREVIEW:
                self.preview.append((originals, again))
            yield again, count

    def shown(self) -> UInt8[np.ndarray, "n h w c"]:
        """Rows of originals above rows of reconstructions."""
        originals, again = (np.concatenate(parts)[:PREVIEW] for parts in zip(*self.preview, strict=True))
        return interleaved(originals, again)


def reconstruction_scores(
    metrics: Sequence[str], task: AutoencoderTask, params: Any, images: ImageSet, scorer: Scorer | None, mesh: Mesh
) -> tuple[list[Score], UInt8[np.ndarray, "n h w c"]]:
    """Scores of the reconstructions of `images`, by the mean of q(z | x) and rounded to 256 levels; and some to look at.

    `scorer`: for rfid; `mesh`: devices of this process. Raises ValueError for images too small for SSIM.
    """
    if "ssim" in metrics:
        check_size(task.config.data.image_size)
    made, found = _Reconstructions(task, params, images, mesh, metrics), {}
    if "rfid" in metrics:
        assert scorer is not None
        originals, _ = scorer.of_images(images, keep=0)
        data = f"reconstructions of {images.description}"
        provenance = provenance_of(scorer.extractor, data, images.seed)
        again = scorer.of_batches(made, len(images), provenance, 0, False, "reconstructions")
        (frechet,) = score(["fid"], again, originals)
        found["rfid"] = dataclasses.replace(frechet, name=scorer.extractor.score_name("rfid"))
    else:
        with progress_bar(0, len(images), "reconstructing", unit="image") as bar:
            for _, count in made:
                bar.update(count * jax.process_count())
    for name, parts in made.values.items():
        values = np.concatenate(parts)
        count, total, squares = gather_processes(np.array([len(values), values.sum(), (values**2).sum()])).sum(0)
        mean = total / count
        variance = max(squares - count * mean**2, 0.0) / max(count - 1, 1) if np.isfinite(mean) else np.nan
        error = float(np.sqrt(variance / count)) if count > 1 and np.isfinite(variance) else None
        found[name] = Score(name, float(mean), error, "standard error over the images", PIXELS[name][1])
    return [found[name] for name in metrics], made.shown()


def make_training_reconstruction_scores(
    task: AutoencoderTask, source: Source, config: EvaluationConfig, mesh: Mesh
) -> Callable[[Any], dict[str, float]]:
    """A function from a training state to PSNR, SSIM and rFID of training images; `config.metrics` has no say."""
    local = local_mesh(task.config)
    try:
        scorer = Scorer(load_extractor(config.extractor, config.weights or None), local, config.batch_per_device)
    except ValueError as error:
        raise ConfigError(f"config.evaluation: {error}") from error
    images = training_images(task.config, source)
    chosen = dataclasses.replace(images, indices=images.indices[: config.num_images])
    metrics = [name for name in METRICS if name != "ssim" or task.config.data.image_size >= WINDOW]

    def scores(state: Any) -> dict[str, float]:
        found, _ = reconstruction_scores(metrics, task, host_copy(state.ema_params, mesh), chosen, scorer, local)
        return {s.name: s.value for s in found}

    return scores
