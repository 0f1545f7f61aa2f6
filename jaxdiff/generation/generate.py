"""From seeds to images: sampling in batches, spread over all devices.

Image i depends on (parameters, settings, seed i) only: its noise comes from its own key, and every device always computes
the same number of images at a time, so that neither the size of the request nor the number of devices changes a bit of it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt8

# sample(params, keys [b], condition with leading axis b, knobs) -> images [b h w c] in [-1, 1]
Sample = Callable[[Any, Key[Array, " b"], Any, Any], Float[Array, "b h w c"]]
Generate = Callable[..., Iterator[UInt8[np.ndarray, "b h w c"]]]
GenerateOnDevices = Callable[..., Iterator[tuple[UInt8[Array, "b h w c"], int]]]


def from_uint8(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """0..255 to [-1, 1], as every network here wants its images."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """[-1, 1] to 0..255, rounded to the nearest level."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def to_host(batches: Iterable[tuple[UInt8[Array, "b h w c"], int]]) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """The images that count of batches on the devices."""
    for images, count in batches:
        yield np.asarray(images)[:count]


def make_generator(sample: Sample, mesh: Mesh, batch_per_device: int) -> Generate:
    """As `make_device_generator`, but the images come to the host as NumPy arrays."""
    generate = make_device_generator(sample, mesh, batch_per_device)
    return lambda *args, **knobs: to_host(generate(*args, **knobs))


def make_device_generator(sample: Sample, mesh: Mesh, batch_per_device: int) -> GenerateOnDevices:
    """A function generate(params, seeds, condition, knobs) that yields uint8 images in order, some at a time.

    `seeds`: uint32 [n]; `condition`: pytree of arrays [n ...] or None; `knobs`: pytree of numbers that may change without a
    recompilation. One program is compiled, for `batch_per_device` images on each device; a last partial batch is padded, so
    each batch comes with the number of images that count. They stay on the devices, split over all of them.
    """
    batch = mesh.size * batch_per_device
    split, copied = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())

    @jax.jit
    def program(params: Any, seeds: Any, condition: Any, knobs: Any) -> UInt8[Array, "b h w c"]:
        images = sample(params, jax.vmap(jax.random.key)(seeds), condition, knobs)
        return jax.lax.with_sharding_constraint(to_uint8(images), split)

    def take(array: Any, start: int) -> jax.Array:
        part = np.asarray(array)[start : start + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        return jax.make_array_from_callback(padded.shape, split, lambda index: padded[index])

    def generate(
        params: Any, seeds: Any, condition: Any = None, knobs: Any = None
    ) -> Iterator[tuple[UInt8[Array, "b h w c"], int]]:
        params, knobs = jax.device_put((params, knobs), copied)
        seeds = np.asarray(seeds, np.uint32)
        for start in range(0, len(seeds), batch):
            parts = [jax.tree.map(lambda a, s=start: take(a, s), tree) for tree in (seeds, condition)]
            yield program(params, *parts, knobs), min(batch, len(seeds) - start)

    return generate
