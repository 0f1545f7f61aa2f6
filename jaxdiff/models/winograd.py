"""3x3 convolutions with 4 products for 9, by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016).

Paper: https://arxiv.org/abs/1509.09308, section 4.1. Each 2x2 patch of the result needs 4x4 pixels of the image. Sums of those
pixels, and of the kernel's nine numbers, are made such that 16 products of the two are enough, where 2 x 2 x 9 = 36 were. For all
patches and channels together a product is a product of matrices, which a processor does at its best.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Where a CPU gains by it: below, making the sums takes what the products save.
LEAST_CHANNELS, LEAST_PIXELS = 32, 256
MOST_NUMBERS = 2**24  # of an image, in or out; its sums take four times the memory


def convolve3x3(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c d"],
    strides: object = None,
    padding: object = None,
    *,
    precision: jax.lax.PrecisionLike = None,
    **_: object,
) -> Float[Array, "b h w d"]:
    """3x3 convolution of stride 1, one pixel padded: on a CPU in float32 by `winograd`, where that is quicker, else by XLA's.

    What is differentiated is always XLA's: a training step does not change. To be given to `nn.Conv` as `conv_general_dilated`;
    strides, padding and layout are what has been said, whatever is passed.
    """
    plain = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=LAYOUT,
        precision=precision,
    )
    (h, w, c), d = x.shape[1:], kernel.shape[-1]
    large = min(c, d) >= LEAST_CHANNELS and h * w >= LEAST_PIXELS and h * w * max(c, d) <= MOST_NUMBERS
    if not large or h % 2 or w % 2 or x.dtype != jnp.float32:
        return plain(x, kernel)

    @jax.custom_jvp
    def convolve(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=plain)

    @convolve.defjvp
    def differentiated(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.jvp(plain, primals, tangents)

    return convolve(x, kernel)


def winograd(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """The same for even h and w; errors are some times larger than a convolution's (4e-6 of numbers around 1, in float32)."""
    (b, h, w, c), d = x.shape, kernel.shape[-1]
    # Adds nothing; without it a network's kernels are all made ready at once, before there is an image, and fill the memory.
    kernel = kernel + 0.0 * jnp.isnan(x[0, 0, 0, 0])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    products = [
        # A product of matrices each: as one product of 16 matrices it takes up to twice as long.
        [jnp.matmul(pixels.reshape(b * (h // 2) * (w // 2), c), weights) for pixels, weights in zip(*row, strict=True)]
        for row in zip(
            [_of_image(rows, 2) for rows in _of_image(padded, 1)],
            [_of_kernel(rows) for rows in _of_kernel(kernel)],
            strict=True,
        )
    ]
    columns = [_of_products(column) for column in zip(*products, strict=True)]
    rows = jnp.stack([jnp.stack(_of_products(row), axis=1) for row in zip(*columns, strict=True)], axis=1)
    return rows.reshape(b, h // 2, w // 2, 2, 2, d).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, d)


def _of_image(x: Array, axis: int) -> list[Array]:
    """B^T d of the paper's eq. 9, for all patches: four pixels in a row, of every second one."""
    end = x.shape[axis] - 3
    a, b, c, d = (jax.lax.slice_in_dim(x, first, first + end, 2, axis) for first in range(4))
    return [a - c, b + c, c - b, b - d]


def _of_kernel(rows: Array) -> list[Array]:
    """G g."""
    a, b, c = rows
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _of_products(m: Sequence[Array]) -> tuple[Array, Array]:
    """A^T m."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
