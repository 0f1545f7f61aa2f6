"""The sliced Wasserstein distance of two sets of images, by their small patches at each scale (Karras et al. 2018, section 5).

Paper: https://arxiv.org/abs/1710.10196. A Laplacian pyramid (Burt & Adelson 1983) is made of every image; of each of its levels
128 patches of 7x7 pixels are taken; a level's patches are normalised to mean 0 and standard deviation 1 per colour, each set by
its own numbers; the distance of the two clouds of patches is estimated by projecting both onto random directions, where it is
plain: sorted values are compared (Rabin et al. 2011). A small distance at 16 pixels tells of like shapes, one at the full
resolution of like details, edges and noise. The paper takes 16,384 images a side and gives 1000 times the distance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxdiff.evaluation.moments import gather_processes, gather_rows

SMALLEST = 16  # pixels a side of the coarsest level
PATCH = 7  # pixels a side
PATCHES = 128  # of each level of each image
REPEATS, DIRECTIONS = 4, 128  # random directions: so many, so many times
SCALE = 1000.0  # of what is reported
AT_ONCE = 16  # directions: two sets of 2,097,152 patches then take 270 MB while they are sorted
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def pyramid_sizes(height: int, width: int) -> list[int]:
    """The level's shorter sides: the image's own, and its halves down to 16. Raises ValueError for what cannot be halved."""
    sizes = [min(height, width)]
    if sizes[0] < PATCH:
        raise ValueError(f"swd compares patches of {PATCH}x{PATCH} pixels: images of {height}x{width} are too small")
    while sizes[-1] // 2 >= SMALLEST:
        factor = 2 ** len(sizes)
        if height % factor or width % factor:
            raise ValueError(f"swd halves images down to {SMALLEST} pixels: {height}x{width} cannot be halved so often")
        sizes.append(sizes[-1] // 2)
    return sizes


def laplacian_pyramid(x: Float[Array, "n h w c"], levels: int) -> list[Float[Array, "n _ _ c"]]:
    """Finest first: each level less its smoothed and halved self, doubled again; the last as it is."""
    pyramid = [x]
    for _ in range(levels - 1):
        x = halve(x)
        pyramid[-1] -= double(x)
        pyramid.append(x)
    return pyramid


def halve(x: Float[Array, "n 2h 2w c"]) -> Float[Array, "n h w c"]:
    """Smooth by the binomial 1 4 6 4 1 along both axes, mirrored at the edges, and keep every second pixel."""
    for axis in (1, 2):
        padded = jnp.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(4)], mode="reflect")
        size = x.shape[axis]
        x = sum(w * jax.lax.slice_in_dim(padded, i, i + size, 2, axis) for i, w in enumerate(BINOMIAL))  # type: ignore[assignment]
    return x


def double(x: Float[Array, "n h w c"]) -> Float[Array, "n 2h 2w c"]:
    """Zeros between all pixels, then four times the same smoothing, mirrored at the edges of the doubled image.

    So (1 6 1) / 8 of its neighbours at a pixel, and the mean of both neighbours between two. The mirror is at the first pixel;
    after the last there is a zero still, by which it mirrors onto itself.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        before, after = (jax.lax.slice_in_dim(x, i, i + 1, 1, axis) for i in (min(1, size - 1), size - 1))
        padded = jnp.concatenate([before, x, after], axis)
        left, right = (jax.lax.slice_in_dim(padded, i, i + size, 1, axis) for i in (0, 2))
        both = jnp.stack([(left + 6 * x + right) / 8, (x + right) / 2], axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


@dataclasses.dataclass
class PatchCollector:
    """Takes images in, a batch at a time, and keeps `patches` random patches of each one's every level.

    Image i's places depend on (seed, stream, i) only: the two sets that are compared have a stream each. Of several processes,
    process p of P takes in the images p, p + P, p + 2P, ... Keeps 75 kB a level of a colour image: 1.2 GB for 16,384.
    """

    stream: int
    seed: int = 0
    patches: int = PATCHES

    def __post_init__(self) -> None:
        self.count = 0
        self._found: dict[int, list[np.ndarray]] = {}

    def add(self, batch: UInt8[np.ndarray, "b h w c"]) -> None:
        """Take a batch in, which may be empty. Raises ValueError where images cannot be halved down to the coarsest level."""
        sizes = pyramid_sizes(*batch.shape[1:3])
        numbers = jax.process_index() + jax.process_count() * np.arange(self.count, self.count + len(batch))
        for level, x in enumerate(_pyramid(batch, len(sizes))):
            randoms = (np.random.default_rng([self.seed, self.stream, int(number), level]) for number in numbers)
            taken = [
                _patches(image, self.patches, random) for image, random in zip(np.asarray(x), randoms, strict=True)
            ]
            rows = np.array(taken, np.float32).reshape(len(batch), self.patches * PATCH**2 * batch.shape[-1])
            self._found.setdefault(sizes[level], []).append(rows)
        self.count += len(batch)

    def result(self) -> dict[int, Float[np.ndarray, "m d"]]:
        """The patches of all images, of all processes, by the level's size, not yet normalised; d = 7 * 7 * c.

        Every process must call this, and have taken in a batch.
        """
        total = int(gather_processes(np.array([self.count])).sum())
        rows = {size: gather_rows(np.concatenate(parts), total) for size, parts in self._found.items()}
        return {size: row.reshape(total * self.patches, -1) for size, row in rows.items()}


def collect_patches(
    batches: Iterable[UInt8[np.ndarray, "b h w c"]], stream: int, seed: int = 0, patches: int = PATCHES
) -> dict[int, Float[np.ndarray, "m d"]]:
    """What a `PatchCollector` finds in these images."""
    collector = PatchCollector(stream, seed, patches)
    for batch in batches:
        collector.add(batch)
    return collector.result()


@functools.partial(jax.jit, static_argnums=1)
def _pyramid(x: UInt8[Array, "n h w c"], levels: int) -> list[Float[Array, "n _ _ c"]]:
    return laplacian_pyramid(x.astype(jnp.float32), levels)


def _patches(
    image: Float[np.ndarray, "h w c"], count: int, random: np.random.Generator
) -> Float[np.ndarray, "count d"]:
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH), axis=(0, 1))  # [h-6 w-6 c 7 7]
    rows, columns = random.integers(0, windows.shape[:2], (count, 2)).T
    return windows[rows, columns].reshape(count, -1)


def normalize_patches(patches: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    """Mean 0 and standard deviation 1 of each channel, over all patches and their pixels (in float64, kept in float32)."""
    by_channel = patches.reshape(len(patches), -1, PATCH * PATCH)
    mean = by_channel.mean((0, 2), dtype=np.float64, keepdims=True)
    std = by_channel.std((0, 2), dtype=np.float64, keepdims=True)
    if not std.all():
        raise ValueError("swd: the patches of a level are all of one colour: they cannot be normalised")
    return ((by_channel - mean.astype(np.float32)) / std.astype(np.float32)).reshape(patches.shape)


def sliced_wasserstein(
    x: Float[np.ndarray, "m d"],
    y: Float[np.ndarray, "m d"],
    seed: int = 0,
    repeats: int = REPEATS,
    directions: int = DIRECTIONS,
) -> float:
    """Mean, over random directions, of the mean distance of sorted projections: the 1-Wasserstein distance along each."""
    if x.shape != y.shape:
        raise ValueError(
            f"swd: both sets must have as many patches, of one size, not {list(x.shape)} and {list(y.shape)}"
        )
    random, distances = np.random.default_rng(seed), []
    for _ in range(repeats):
        onto = random.standard_normal((directions, x.shape[1]))
        onto /= np.linalg.norm(onto, axis=1, keepdims=True)
        for some in np.split(onto.astype(np.float32), range(AT_ONCE, directions, AT_ONCE)):
            sorted_x, sorted_y = (np.sort(some @ side.T, axis=1) for side in (x, y))
            distances.append(np.abs(sorted_x - sorted_y).mean(1, dtype=np.float64))
    return float(np.concatenate(distances).mean())


def sliced_wasserstein_distances(
    generated: dict[int, Float[np.ndarray, "m d"]], reference: dict[int, Float[np.ndarray, "m d"]], seed: int = 0
) -> dict[int, float]:
    """1000 times the distance at each level's size, of what `collect_patches` took. Raises ValueError where they differ in size.

    The paper gives these and their mean.
    """
    if generated.keys() != reference.keys():
        raise ValueError(f"swd: images of {max(generated)} and of {max(reference)} pixels cannot be compared")
    return {
        size: SCALE * sliced_wasserstein(normalize_patches(patches), normalize_patches(reference[size]), seed)
        for size, patches in generated.items()
    }
