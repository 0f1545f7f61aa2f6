"""Convolutions of images whose 2x2 patches of pixels lie in the channels of one position (`space_to_depth`).

A TPU computes with rows of 128 numbers, along which an image's channels lie: with 16 channels seven eighths of each row, and of
the memory it takes, are padding. Folded they are 64. A kernel of the image has an equal for the folded one, with zeros in it:
four times the products, of which the TPU does far more than four times as many in that time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.layers import rows_of_doubled

PIXELS = 4  # of a patch


def fold_kernel(kernel: Float[Array, "s s c d"]) -> Float[Array, "t t 4*c 4*d"]:
    """What does to the folded image what a kernel of odd size, stride 1 and zero padding ("SAME") does to the image."""
    return _both_ways(kernel, _row_pairs)


def fold_doubling_kernel(kernel: Float[Array, "3 3 c d"]) -> Float[Array, "3 3 c 4*d"]:
    """What makes of an image the folded result of the 3x3 convolution of its `repeat_pixels`: twice as large, not unfolded."""

    def row_pairs(kernel: Array) -> Array:
        even, odd = rows_of_doubled(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
        rows = jnp.stack([_padded(even, 0, 1), _padded(odd, 1, 0)])
        return rows[:, :, None]

    return _both_ways(kernel, row_pairs).astype(kernel.dtype)


def _both_ways(kernel: Array, row_pairs: Callable[[Array], Array]) -> Array:
    """`row_pairs` makes of rows [s ...] those of both rows of a patch: [to, t, from, ...]; the same is done to the columns."""
    rows = row_pairs(kernel)  # [k a i v c d]
    both = row_pairs(jnp.moveaxis(rows, 3, 0))  # [l b j k a i c d]
    right, b, j, below, a, i, c, d = both.shape
    return both.transpose(4, 1, 5, 2, 6, 3, 0, 7).reshape(a, b, i * j * c, below * right * d)


def _row_pairs(kernel: Array) -> Array:
    """Rows that an even and an odd row see: row u of the kernel falls on row u - (s - 1) / 2 + to of the patches' rows."""
    size = kernel.shape[0]
    reach = (size // 2 + 1) // 2  # patches to each side
    pairs = []
    for to in range(2):
        before = 2 * reach - size // 2 + to
        rows = _padded(kernel, before, 2 * (2 * reach + 1) - size - before)
        pairs.append(rows.reshape(2 * reach + 1, 2, *rows.shape[1:]))
    return jnp.stack(pairs)


def _padded(rows: Array, before: int, after: int) -> Array:
    return jnp.pad(rows, [(before, after)] + [(0, 0)] * (rows.ndim - 1))


def patch_mean(x: Float[Array, "*b 4*c"]) -> Float[Array, "*b c"]:
    """Mean of the four pixels of each patch: `halve_pixels` of a folded image, which it leaves unfolded."""
    # Products with matrices here and below: for the sum over a part of a row it would have to be taken apart.
    averages = jnp.tile(jnp.eye(x.shape[-1] // PIXELS, dtype=x.dtype) / PIXELS, (PIXELS, 1))
    return jnp.matmul(x, averages, precision=jax.lax.Precision.HIGHEST)


def patch_repeat(x: Float[Array, "*b c"]) -> Float[Array, "*b 4*c"]:
    """Each pixel four times: the folded `repeat_pixels` of an image that is not folded."""
    return jnp.tile(x, PIXELS)


def channel_means(x: Float[Array, "*b 4*c"]) -> Float[Array, "*b 4*c"]:
    """Each number's mean over the channels of its own pixel."""
    channels = x.shape[-1] // PIXELS
    averages = jnp.kron(jnp.eye(PIXELS, dtype=x.dtype), jnp.full((channels, channels), 1 / channels, x.dtype))
    return jnp.matmul(x, averages, precision=jax.lax.Precision.HIGHEST)
