"""Bits per dimension of a run on images, by the variational bound and by the probability-flow ODE, over all devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt8

from jaxdiff.diffusion.guidance import bind_condition
from jaxdiff.diffusion.likelihood import dequantize, ode_log_likelihood, variational_bound
from jaxdiff.diffusion.scheduler import DiscreteSchedule
from jaxdiff.evaluation.images import ImageSet
from jaxdiff.evaluation.scores import Score
from jaxdiff.generation.generate import from_uint8
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.run import Run

PerImage = Callable[[Any, UInt8[Array, "b h w c"], Any, Key[Array, " b"]], Float[Array, " b"]]


def make_bits_per_dim(task: DiffusionTask, ode_steps: int = 128) -> dict[str, PerImage]:
    """Functions (params, images, requests, keys) -> bits/dim of each image: "bpd_bound", where it is defined, and "bpd_ode".

    The bound takes as many network calls as there are noise levels, the ODE four times `ode_steps`, with their derivatives.
    Conditional models are asked for p(x | label or caption).
    """

    def denoiser(params: Any, requests: Any) -> Any:
        return bind_condition(task.denoiser(params), task.conditions(params, requests, guided=False)[0])

    def bound(params: Any, images: UInt8[Array, "b h w c"], requests: Any, keys: Any) -> Float[Array, " b"]:
        variance = "learned" if task.config.diffusion.learned_variance else task.config.sampling.variance
        assert isinstance(task.schedule, DiscreteSchedule)
        return variational_bound(denoiser(params, requests), task.schedule, from_uint8(images), keys, variance).total

    def ode(params: Any, images: UInt8[Array, "b h w c"], requests: Any, keys: Any) -> Float[Array, " b"]:
        spread, probes = jax.vmap(lambda key: jax.random.split(key))(keys).T
        x0 = dequantize(from_uint8(images), spread)
        return ode_log_likelihood(denoiser(params, requests), task.schedule, x0, probes, ode_steps).bits_per_dim

    return ({"bpd_bound": bound} if isinstance(task.schedule, DiscreteSchedule) else {}) | {"bpd_ode": ode}


def bits_per_dim(
    run: Run,
    images: UInt8[np.ndarray, "n h w c"],
    requests: Any,
    mesh: Mesh,
    batch_per_device: int = 16,
    seed: int = 0,
    ode_steps: int = 128,
) -> list[Score]:
    """Mean and standard error over the images. An image's value depends on its place in the list and `seed` alone."""
    split, copied = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    functions = make_bits_per_dim(run.task, ode_steps)
    params = jax.device_put(run.params, copied)
    batch, scores = mesh.size * batch_per_device, []
    for name, function in functions.items():

        def program(params: Any, images: Any, requests: Any, index: Any, function: PerImage = function) -> Any:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
            return function(params, images, requests, keys)

        compiled = jax.jit(program, in_shardings=(copied, split, split, split), out_shardings=split)
        values = []
        with progress_bar(0, len(images), name, unit="image") as bar:
            for start in range(0, len(images), batch):
                rows = np.minimum(np.arange(start, start + batch), len(images) - 1)  # the last batch is padded
                parts = jax.device_put((images[rows], jax.tree.map(lambda a, r=rows: a[r], requests), rows), split)
                count = min(batch, len(images) - start)
                values.append(np.asarray(compiled(params, *parts))[:count])
                bar.update(count)
        bits = np.concatenate(values).astype(np.float64)
        error = float(bits.std(ddof=1) / np.sqrt(len(bits))) if len(bits) > 1 else None
        scores.append(
            Score(name, float(bits.mean()), error, "standard error over the images", _note(run, name, ode_steps))
        )
    return scores


def _note(run: Run, name: str, ode_steps: int) -> str:
    config = run.task.config
    if name == "bpd_ode":
        return f"probability-flow ODE, {ode_steps} steps of RK4, one Hutchinson probe, uniform dequantisation"
    variance = "learned" if config.diffusion.learned_variance else config.sampling.variance
    return f"variational bound, {config.diffusion.num_timesteps} levels, variance {variance}"


def images_for_likelihood(run: Run, images: ImageSet, num: int | None) -> tuple[np.ndarray, Any]:
    """The first `num` images of a set (in its shuffled order) and what the model is told of them."""
    chosen = dataclasses.replace(images, indices=images.indices[:num])
    pixels = np.concatenate([part for part, _ in chosen.batches(256)])
    examples = [chosen.source[int(i)] for i in chosen.indices]
    if run.task.tokenizer is not None:
        return pixels, run.text([example["text"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    return pixels, labels if run.task.num_classes else None
