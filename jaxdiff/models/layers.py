"""Bricks of convolutional image networks: norm, convolution, residual block, resampling, patches (DDPM, app. B).

Every module computes in `dtype` and keeps its parameters in `param_dtype`; statistics are float32 whatever these are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import variance_scaling, zeros_init
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.winograd import convolve3x3

# DDPM draws every weight uniformly with variance 2 / (fan_in + fan_out).
default_init: Initializer = variance_scaling(1.0, "fan_avg", "uniform")
zero_init: Initializer = zeros_init()

Padding = tuple[tuple[int, int], tuple[int, int]]

# One pixel on every side, as PyTorch's padding=1. At stride 2 "SAME" is something else: it pads bottom and right only.
SYMMETRIC: Padding = ((1, 1), (1, 1))
# How the VAE of Stable Diffusion pads before it halves the image.
BOTTOM_RIGHT: Padding = ((0, 1), (0, 1))


def num_groups(channels: int, most: int = 32) -> int:
    """Groups of a GroupNorm: 32, or fewer where channels are few (at least 4 channels a group), dividing `channels`."""
    most = max(1, min(most, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def group_norm(
    channels: int, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike, name: str, *, groups: int | None = None
) -> nn.GroupNorm:
    """Group normalisation (Wu & He 2018) whose statistics and affine map are float32, and the result `dtype`.

    groups: how many; None for as many as `num_groups` says. Raises ValueError if they don't divide the channels.
    """
    groups = num_groups(channels) if groups is None else groups
    if channels % groups:
        raise ValueError(f"{name}: {channels} channels cannot be split into norm_groups = {groups}")
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, name=name)


def conv3x3(
    features: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    name: str,
    *,
    stride: int = 1,
    padding: Padding = SYMMETRIC,
    kernel_init: Initializer = default_init,
    doubled: bool = False,
) -> nn.Conv:
    """3x3 convolution that pads one pixel on every side unless told otherwise; `doubled`: of its input's `repeat_pixels`."""
    plain = stride == 1 and padding == SYMMETRIC
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=padding,
        kernel_init=kernel_init,
        dtype=dtype,
        param_dtype=param_dtype,
        conv_general_dilated=convolve_doubled if doubled else convolve3x3 if plain else jax.lax.conv_general_dilated,
        name=name,
    )


class Dropout(nn.Module):
    """x / (1 - rate), or zero with probability `rate` (Srivastava et al. 2014); draws what Flax's own draws.

    What is kept is decided once and remembered. Left to itself a TPU's compiler draws the random bits anew inside each
    convolution that reads the result, three times a step.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*s"], *, train: bool = False) -> Float[Array, "*s"]:
        """Nothing changes unless `train`, which needs rngs={"dropout": key}."""
        if not train or self.rate == 0:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(jax.lax.optimization_barrier(kept), x / (1 - self.rate), 0)


class ResidualBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))) + dense(swish(embedding)))))); the last conv starts at zero.

    scale_shift: the embedding does not add to what is normed but scales and shifts the norm's result, (1 + scale) norm(h) + shift
        (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4.3): so it can multiply what a position knows.
    """

    channels: int
    dropout: float = 0.0
    epsilon: float = 1e-6
    norm_groups: int | None = None
    scale_shift: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"] | None = None, *, train: bool = False
    ) -> Float[Array, "b h w d"]:
        """`embedding`: what the block is told of time and label; None for a block without (a VAE's)."""
        dtypes = (self.dtype, self.param_dtype)
        h = group_norm(x.shape[-1], self.epsilon, *dtypes, name="norm1", groups=self.norm_groups)(x)
        h = conv3x3(self.channels, *dtypes, name="conv1")(nn.swish(h))
        norm2 = group_norm(self.channels, self.epsilon, *dtypes, name="norm2", groups=self.norm_groups)
        if embedding is None:
            h = norm2(h)
        else:
            projection = nn.Dense(
                self.channels * (1 + self.scale_shift),
                kernel_init=default_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="embedding_projection",
            )(nn.swish(embedding))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(projection, 2, axis=-1)
                h = (1 + scale) * norm2(h) + shift
            else:
                h = norm2(h + projection)
        h = Dropout(self.dropout)(nn.swish(h), train=train)
        h = conv3x3(self.channels, *dtypes, name="conv2", kernel_init=zero_init)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(
                self.channels, kernel_init=default_init, dtype=self.dtype, param_dtype=self.param_dtype, name="shortcut"
            )(x)
        return x + h


class Downsample(nn.Module):
    """Halve the image by a 3x3 convolution of stride 2."""

    padding: Padding = SYMMETRIC
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
        """Pixel (i, j) of the result is centred on pixel (2i, 2j) of x under symmetric padding."""
        conv = conv3x3(x.shape[-1], self.dtype, self.param_dtype, "conv", stride=2, padding=self.padding)
        return conv(x)


class Upsample(nn.Module):
    """Double the image by repeating pixels (nearest neighbour), then a 3x3 convolution.

    size: height and width of the result, where they are not twice those of x but one less.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, ...] | None = None) -> Float[Array, "b 2h 2w c"]:
        """Double height and width, or bring them to `size`: what a level had that halving rounded up."""
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        doubled = (height, width) == (2 * x.shape[1], 2 * x.shape[2])
        conv = conv3x3(x.shape[-1], self.dtype, self.param_dtype, "conv", doubled=doubled)
        return conv(x if doubled else repeat_pixels(x)[:, :height, :width])


def repeat_pixels(x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
    """Nearest-neighbour doubling by broadcast and reshape, which no backend turns into a gather."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def convolve_doubled(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c d"],
    strides: object = None,
    padding: object = None,
    *,
    precision: jax.lax.PrecisionLike = None,
    **_: object,
) -> Float[Array, "b 2h 2w d"]:
    """3x3 convolution, one pixel padded, of `repeat_pixels(x)`, with 4 products for 9 and without making that image.

    Of nine pixels in a doubled image no more than four differ. Which of them are one depends on whether row and column are
    odd: four kernels of 2x2, sums of the given one's rows and columns, make the four kinds of pixels. To be given to
    `nn.Conv` as `conv_general_dilated`; strides, padding and layout are what has been said, whatever is passed.
    """
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    # One convolution of the image padded on all sides, with the four kernels side by side, is up to twice as slow on a CPU.
    kinds = []
    for i, rows in enumerate(rows_of_doubled(wide)):
        for j, both in enumerate(rows_of_doubled(rows.swapaxes(0, 1))):
            kinds.append(
                jax.lax.conv_general_dilated(
                    x,
                    both.swapaxes(0, 1).astype(kernel.dtype),
                    (1, 1),
                    ((1 - i, i), (1 - j, j)),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    precision=precision,
                )
            )
    return depth_to_space(jnp.concatenate(kinds, axis=-1), 2)


def rows_of_doubled(kernel: Float[Array, "3 ..."]) -> tuple[Float[Array, "2 ..."], Float[Array, "2 ..."]]:
    """What even and odd rows of the doubled image see of the image itself: the row before and its own; its own and the next."""
    before, own, after = kernel
    return jnp.stack([before, own + after]), jnp.stack([before + own, after])


def space_to_depth(x: Float[Array, "b h w c"], patch_size: int) -> Float[Array, "b h/p w/p p*p*c"]:
    """Fold each p x p patch of pixels into the channels of one; the inverse of `depth_to_space`."""
    if patch_size == 1:
        return x
    b, h, w, c = x.shape
    p = patch_size
    return x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: Float[Array, "b h w p*p*c"], patch_size: int) -> Float[Array, "b p*h p*w c"]:
    """Unfold channels into p x p patches of pixels; the inverse of `space_to_depth`."""
    if patch_size == 1:
        return x
    b, h, w, folded = x.shape
    p, c = patch_size, folded // patch_size**2
    return x.reshape(b, h, w, p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c)
