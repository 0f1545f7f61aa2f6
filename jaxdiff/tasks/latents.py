"""Encoding a data set once, for training in latents without the autoencoder at every step."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxdiff.config import Config, ConfigError
from jaxdiff.data.latents import FORMAT, LatentInfo, LatentLoader, open_latents, write_latents
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import Example, Source, open_source
from jaxdiff.generation.generate import from_uint8
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.first_stage import FirstStage, load_first_stage
from jaxdiff.tasks.pretrained import open_pretrained
from jaxdiff.training.sharding import batch_sharding, make_mesh, replicated
from jaxdiff.training.state import Params

BATCH_PER_DEVICE = 16
TIMED_BATCHES = 20  # read back to see how fast the latents come


def moments(stage: FirstStage, params: Params, images: UInt8[Array, "b h w c"]) -> Float[Array, "b p q 2*d"]:
    """Mean and log variance of images, side by side: what a record holds, and what a latent model's batch holds."""
    posterior = stage.posterior(params, from_uint8(images))
    return jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1)


def encode_data(config: Config, out: pathlib.Path) -> str:
    """Encode the config's data with its autoencoder into the folder `out`; returns what was done and how fast, in words.

    Raises ConfigError for a config without autoencoder, a random crop, or a folder that is there already.
    """
    data = config.data
    if not config.autoencoder and not config.model.pretrained:
        raise ConfigError(
            "config.autoencoder is empty, and so is config.model.pretrained: one must name the autoencoder that encodes"
        )
    if data.crop != "centre":
        raise ConfigError(f"config.data.crop = {data.crop!r}: latents are kept of centre crops only")
    if data.source == "latents":
        raise ConfigError("config.data.source = 'latents': these are encoded already")
    if out.exists():
        raise ConfigError(f"--out {out} exists already: choose another place, or remove it first")
    stage = load_first_stage(config.autoencoder) if config.autoencoder else open_pretrained(config).first_stage()
    check_stage(stage, config)
    try:
        source = open_source(data.source, data.dir or None, data.split, max_bad_fraction=data.max_bad_fraction)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data: {error}") from error
    shape = stage.latent_shape((data.image_size, data.image_size, data.channels))
    info = LatentInfo(
        format=FORMAT,
        sha256=stage.sha256,
        shape=(*shape[:2], 2 * shape[2]),
        flips=1 + data.flip,
        image_size=data.image_size,
        channels=data.channels,
        num_examples=0,
        class_names=source.class_names,
        has_text=source.has_text,
        origin=source.describe(),
        files=(),
    )
    done: list[tuple[int, float]] = []
    try:
        write_latents(out, info, _encoded(config, stage, source, info.flips, done))
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error
    return f"encoded {len(source):,} images{' and their mirror images' * data.flip} into {out}; {_speeds(config, out, done)}"


def _speeds(config: Config, out: pathlib.Path, done: list[tuple[int, float]]) -> str:
    """How fast images were encoded, after the first batch with its compilation, and how fast latents are read."""
    read = _reading_speed(config, out)
    if len(done) == 1:
        return f"they are read back at {read:.0f} a second; how fast they are encoded one batch, with compilation, cannot tell"
    (first, begin), (last, end) = done[0], done[-1]
    encoded = (last - first) / (end - begin)
    return (
        f"at {encoded:.0f} a second, compilation apart, and they are read back at {read:.0f} a second: "
        f"{read / encoded:.0f} times as fast"
    )


def check_stage(stage: FirstStage, config: Config) -> None:
    """Raise ConfigError where images of the config's size cannot be encoded."""
    size, factor = config.data.image_size, stage.model.downsampling
    if size % factor:
        raise ConfigError(
            f"config.data.image_size = {size} must be divisible by {factor}, by which the autoencoder shrinks images"
        )
    if config.data.channels != stage.model.image_channels:
        raise ConfigError(
            f"config.data.channels = {config.data.channels}, but the autoencoder's images have {stage.model.image_channels}"
        )


def _encoded(
    config: Config, stage: FirstStage, source: Source, flips: int, done: list[tuple[int, float]]
) -> Iterator[Example]:
    """Every example of the source with its moments, in order; devices share the work. `done`: how many, and when, by batch."""
    data = config.data
    mesh = make_mesh(dataclasses.replace(config.sharding, mode="jit", fsdp=1))
    batch = mesh.size * BATCH_PER_DEVICE
    params = jax.device_put(stage.params, replicated(mesh))

    @jax.jit
    def encode(params: Params, images: UInt8[Array, "b h w c"]) -> Float[Array, "b f p q 2*d"]:
        versions = [images, images[:, :, ::-1]][:flips]
        return jnp.stack([moments(stage, params, version) for version in versions], axis=1)

    cut = Loader(source, 1, 0, image_size=data.image_size, channels=data.channels, memory_limit=0)
    with progress_bar(0, len(source), "encoding", unit="image") as bar:
        for start in range(0, len(source), batch):
            rows = [cut.canvas(i) for i in range(start, min(start + batch, len(source)))]
            images = np.stack([row[0] for row in rows])
            padded = np.concatenate([images, np.repeat(images[-1:], batch - len(images), axis=0)])
            encoded = np.asarray(encode(params, jax.device_put(padded, batch_sharding(mesh))))
            done.append((start + len(rows), time.perf_counter()))
            for (_, label, text), array in zip(rows, encoded, strict=False):
                told: dict[str, Any] = {"label": label} | ({} if text is None else {"text": text})
                yield told | {"moments": array}
            bar.update(len(rows))


def _reading_speed(config: Config, folder: pathlib.Path) -> float:
    """Images whose latents a loader gives in a second."""
    data, source = config.data, open_latents(folder)
    size = min(config.training.batch_size, len(source))
    loader = LatentLoader(
        source, size, 0, image_size=data.image_size, channels=data.channels, crop="centre", flip=data.flip,
        num_threads=data.num_threads,
    )  # fmt: skip
    batches = loader.iterate(0)
    next(batches)
    started = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        next(batches)
    batches.close()
    return TIMED_BATCHES * size / (time.perf_counter() - started)
