"""Bilinear resizing as TensorFlow 1 did it: the rule under which the published Inception scores were taken.

Output pixel i is read at i * (size in / size out): corner to corner without the half-pixel shift that all later libraries
make, and without antialiasing, so a smaller picture skips pixels. FID moves by whole points with another rule
(Parmar et al. 2022, "On aliased resizing").
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num


def tf1_bilinear(images: Num[Array, "b h w c"], height: int, width: int) -> Float[Array, "b height width c"]:
    """Images of any size resized by TensorFlow 1's rule; uint8 or float in, float32 out on the same scale.

    The rule is linear and separable, so it is two small matrix products, which every backend does fast.
    """
    if images.ndim != 4 or 0 in images.shape[1:3]:
        raise ValueError(f"images to resize must be [b h w c] of at least one pixel; got shape {images.shape}")
    rows = jnp.asarray(interpolation_matrix(images.shape[1], height))
    columns = jnp.asarray(interpolation_matrix(images.shape[2], width))
    # Rows first: they are whole in memory, and those that a large picture loses are gone before its columns are touched.
    x = jnp.einsum("Hh,bhwc->bHwc", rows, images.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return jnp.einsum("Ww,bhwc->bhWc", columns, x, precision=lax.Precision.HIGHEST)


def interpolation_matrix(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Row i holds the one or two weights with which output pixel i reads the `size` input pixels."""
    # In float32, as TensorFlow reckons it: at 512 pixels that is 3e-5 of a pixel off, and all published scores have it.
    position = np.arange(new_size, dtype=np.float32) * np.float32(size / new_size)
    low = np.minimum(np.floor(position).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = position.astype(np.float64) - low
    matrix = np.zeros((new_size, size))
    index = np.arange(new_size)
    matrix[index, low] += 1 - fraction
    matrix[index, high] += fraction  # at the last pixel low == high, and the weights add up to 1
    return matrix.astype(np.float32)
