"""From seeds to images: sampling in batches, spread over all devices.

Image i depends on (parameters, settings, seed i) only: its noise comes from its own key, and every device always computes
the same number of images at a time, so that neither the size of the request nor the number of devices changes a bit of it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt8, UInt32

# sample(params, keys [b], request with leading axis b, knobs) -> images [b h w c] in [-1, 1]
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
    """The images that count of batches on the devices; of those of several processes, all on each."""
    for images, count in batches:
        whole = images if images.is_fully_addressable else multihost_utils.process_allgather(images, tiled=True)
        yield np.asarray(whole)[:count]


def keys_of(seeds: UInt32[Array, " b"] | UInt32[Array, "b k"]) -> Key[Array, " b"]:
    """The key of each image: of its seed, or with the key data given."""
    return jax.vmap(jax.random.key)(seeds) if seeds.ndim == 1 else jax.random.wrap_key_data(seeds)


def make_generator(sample: Sample, mesh: Mesh, batch_per_device: int) -> Generate:
    """As `make_device_generator`, but the images come to the host as NumPy arrays."""
    generate = make_device_generator(sample, mesh, batch_per_device)
    return lambda *args, **knobs: to_host(generate(*args, **knobs))


@functools.lru_cache(maxsize=16)
def make_device_generator(sample: Sample, mesh: Mesh, batch_per_device: int) -> GenerateOnDevices:
    """A function generate(params, seeds, request, knobs) that yields uint8 images in order, some at a time.

    `seeds`: uint32 [n], or the data of keys, uint32 [n k]; `request`: pytree of arrays [n ...] or None; `knobs`: pytree of
    numbers that may change without a recompilation. One program is compiled, for `batch_per_device` images on each device; a
    last partial batch is padded, so each batch comes with the number of images that count. They stay on the devices, split
    over all of them. The same arguments give the same function, so that a notebook's next call compiles nothing.
    """
    batch = mesh.size * batch_per_device
    split, copied = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())

    @jax.jit
    def program(params: Any, seeds: Any, request: Any, knobs: Any) -> UInt8[Array, "b h w c"]:
        images = sample(params, keys_of(seeds), request, knobs)
        return jax.lax.with_sharding_constraint(to_uint8(images), split)

    def stay(leaf: Any) -> jax.Array:
        """A parameter that is spread over this mesh stays as it is; any other is copied to every device."""
        there = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else copy(leaf)

    def copy(leaf: Any) -> jax.Array:
        if not mesh.is_multi_process:
            return jax.device_put(leaf, copied)
        whole = np.asarray(leaf)  # every process has the same, and brings it to its own devices
        return jax.make_array_from_callback(whole.shape, copied, lambda index: whole[index])

    def take(array: Any, start: int) -> jax.Array:
        part = np.asarray(array)[start : start + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        return jax.make_array_from_callback(padded.shape, split, lambda index: padded[index])

    def generate(
        params: Any, seeds: Any, request: Any = None, knobs: Any = None
    ) -> Iterator[tuple[UInt8[Array, "b h w c"], int]]:
        params, knobs = jax.tree.map(stay, params), jax.tree.map(copy, knobs)
        seeds = np.asarray(seeds, np.uint32)
        for start in range(0, len(seeds), batch):
            parts = [jax.tree.map(lambda a, s=start: take(a, s), tree) for tree in (seeds, request)]
            yield program(params, *parts, knobs), min(batch, len(seeds) - start)

    return generate
