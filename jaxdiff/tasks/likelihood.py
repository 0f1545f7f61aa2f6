"""Likelihood of a run on images, as its task works it out, over all devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from jaxdiff.evaluation.images import ImageSet
from jaxdiff.evaluation.moments import interleave_processes
from jaxdiff.evaluation.scores import Score
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.run import Run


def likelihood_scores(
    run: Run,
    images: UInt8[np.ndarray, "n h w c"],
    requests: Any,
    mesh: Mesh,
    batch_per_device: int = 16,
    seed: int = 0,
    ode_steps: int = 128,
) -> list[Score]:
    """Mean and standard error over the images. An image's value depends on its place in the list and `seed` alone.

    `mesh`: devices of this process, which takes its share of the images.
    """
    mine = np.arange(jax.process_index(), len(images), jax.process_count())
    split, copied = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    params = jax.device_put(run.params, copied)
    batch, scores = mesh.size * batch_per_device, []
    for note, function in run.task.likelihoods(ode_steps).items():

        def program(params: Any, images: Any, requests: Any, index: Any, function: Any = function) -> Any:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
            return function(params, images, requests, keys)

        compiled = jax.jit(program, in_shardings=(copied, split, split, split), out_shardings=split)
        values = []
        with progress_bar(0, len(images), note.split(",")[0], unit="image") as bar:
            for start in range(0, max(1, len(mine)), batch):
                rows = np.resize(np.append(mine[start : start + batch], 0), batch)  # the last batch is padded
                parts = jax.device_put((images[rows], jax.tree.map(lambda a, r=rows: a[r], requests), rows), split)
                count = min(batch, len(mine) - start)
                values.append({name: np.asarray(v)[:count] for name, v in compiled(params, *parts).items()})
                bar.update(count * jax.process_count())
        for name in values[0]:
            found = interleave_processes(np.concatenate([part[name] for part in values])).astype(np.float64)
            error = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
            scores.append(Score(name, float(found.mean()), error, "standard error over the images", note))
    return scores


def images_for_likelihood(run: Run, images: ImageSet, num: int | None) -> tuple[np.ndarray, Any]:
    """The first `num` images of a set (in its shuffled order) and what the model is told of them."""
    chosen = dataclasses.replace(images, indices=images.indices[:num])
    pixels = np.concatenate([part for part, _ in chosen.batches(256)])
    examples = [chosen.source[int(i)] for i in chosen.indices]
    if run.task.tokenizer is not None:
        return pixels, run.text([example["text"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    return pixels, labels if run.task.num_classes else None
