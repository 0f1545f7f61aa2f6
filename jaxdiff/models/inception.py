"""Inception v3 as FID uses it: the TensorFlow graph of 2015-12-05 (Szegedy et al. 2015; Heusel et al. 2017).

The published graph differs from the paper and from the later Inception v3 of other libraries; scores are only comparable
when all of this is kept:

- BatchNorm's epsilon is 1e-3. It runs on stored statistics, so it is folded into the kernels when weights are loaded.
- The 3x3 average pools divide by the number of pixels inside the image: padding is not counted.
- The pool branch of the last block, Mixed_7c, takes the maximum where all others average.
- There are 1008 logits, 8 more than ImageNet has classes, and the inception score uses them without the bias.
- Images come in as (x - 128) / 128 at 299x299, resized by TensorFlow 1's bilinear rule (`resize.tf1_bilinear`).

Layers bear the names of the common PyTorch port. The TensorFlow graph counts blocks from 0: mixed = Mixed_5b, mixed_1 =
5c, mixed_2 = 5d, mixed_3 = 6a, mixed_4 .. mixed_7 = 6b .. 6e, mixed_8 = 7a, mixed_9 = 7b, mixed_10 = 7c.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from jaxdiff.models.features import Features
from jaxdiff.models.resize import tf1_bilinear

IMAGE_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # of 192 in mixed_6/conv: what sFID keeps, 17 * 17 * 7 = 2023 numbers

Images = Float[Array, "b h w c"]


def inception_features(
    params: Any,
    images: UInt8[Array, "b h w c"],
    dtype: DTypeLike = jnp.float32,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> Features:
    """Features of uint8 images of any size, grey or RGB: resize, scaling and network, as the published graph does them."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"Inception wants images of 1 or 3 channels, not {images.shape[-1]}")
    network = InceptionV3(dtype, precision)

    def extract(images: UInt8[Array, "b h w c"]) -> Features:
        x = (tf1_bilinear(images, IMAGE_SIZE, IMAGE_SIZE) - 128) / 128
        features: Any = network.apply({"params": params}, jnp.broadcast_to(x, (*x.shape[:3], 3)))
        return features

    # On CPU a whole batch falls out of the caches between layers: image by image is about 1.5 times as quick.
    return lax.platform_dependent(images, cpu=functools.partial(one_by_one, extract), default=extract)


def one_by_one(extract: Callable[[Array], Features], images: UInt8[Array, "b h w c"]) -> Features:
    """The features of a batch, computed an image at a time."""
    return jax.tree.map(lambda rows: rows[:, 0], lax.map(extract, images[:, None]))


class InceptionV3(nn.Module):
    """[b 299 299 3] images, as (x - 128) / 128, to 2048 pooled features, 1008 unbiased logits and sFID's 2023 numbers.

    Scores want float32 and `Precision.HIGHEST`: accelerators choose TF32 or bfloat16 by default, which moves them.
    """

    dtype: DTypeLike = jnp.float32
    precision: lax.Precision = lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "b 299 299 3"]) -> Features:
        """Features of a batch, in float32."""
        if x.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"Inception wants images of 299x299x3, resized by tf1_bilinear; got {x.shape[1:]}")
        how = (self.dtype, self.precision)
        x = Conv(*how, 32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(*how, 32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Conv(*how, 64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = max_pool(x, 2, "VALID")
        x = Conv(*how, 80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = Conv(*how, 192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = max_pool(x, 2, "VALID")
        x = Block35(*how, 32, name="Mixed_5b")(x)
        x = Block35(*how, 64, name="Mixed_5c")(x)
        x = Block35(*how, 64, name="Mixed_5d")(x)
        x = Reduction17(*how, name="Mixed_6a")(x)
        x = Block17(*how, 128, name="Mixed_6b")(x)
        x = Block17(*how, 160, name="Mixed_6c")(x)
        x = Block17(*how, 160, name="Mixed_6d")(x)
        # The block's first channels are those of its branch1x1, which is mixed_6/conv of the TensorFlow graph.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = Block17(*how, 192, name="Mixed_6e")(x)
        x = Reduction8(*how, name="Mixed_7a")(x)
        x = Block8(*how, average_pool, name="Mixed_7b")(x)
        x = Block8(*how, max_pool, name="Mixed_7c")(x)
        pool = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = nn.Dense(NUM_CLASSES, use_bias=False, dtype=self.dtype, precision=self.precision, name="fc")(pool)
        return Features(pool, logits.astype(jnp.float32), spatial.astype(jnp.float32))


class Conv(nn.Module):
    """Convolution, bias and ReLU; the bias holds what BatchNorm adds, and the kernel what it multiplies by."""

    dtype: DTypeLike
    precision: lax.Precision
    features: int
    window: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """A 1x1 convolution is a matrix product over the channels, and quicker as such on CPU."""
        shape = (*self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.window == (1, 1):
            y = jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0], precision=self.precision)
        else:
            y = lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=self.precision,
            )
        return nn.relu(y + bias[None, None, None])


def max_pool(x: Images, stride: int = 1, padding: str = "SAME") -> Images:
    """Maximum over 3x3 pixels."""
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def average_pool(x: Images) -> Images:
    """Mean over those of 3x3 pixels that lie inside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


class Block35(nn.Module):
    """35x35 pixels (Szegedy et al. 2015, figure 5): 1x1, 5x5, two 3x3, pool."""

    dtype: DTypeLike
    precision: lax.Precision
    pool_features: int

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """256 or 288 channels."""
        how = (self.dtype, self.precision)
        a = Conv(*how, 64, (1, 1), name="branch1x1")(x)
        b = Conv(*how, 48, (1, 1), name="branch5x5_1")(x)
        b = Conv(*how, 64, (5, 5), name="branch5x5_2")(b)
        c = Conv(*how, 64, (1, 1), name="branch3x3dbl_1")(x)
        c = Conv(*how, 96, (3, 3), name="branch3x3dbl_2")(c)
        c = Conv(*how, 96, (3, 3), name="branch3x3dbl_3")(c)
        d = Conv(*how, self.pool_features, (1, 1), name="branch_pool")(average_pool(x))
        return jnp.concatenate([a, b, c, d], axis=-1)


class Reduction17(nn.Module):
    """From 35x35 to 17x17 pixels (figure 10): 3x3, two 3x3, maximum."""

    dtype: DTypeLike
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """768 channels."""
        how = (self.dtype, self.precision)
        a = Conv(*how, 384, (3, 3), 2, "VALID", name="branch3x3")(x)
        b = Conv(*how, 64, (1, 1), name="branch3x3dbl_1")(x)
        b = Conv(*how, 96, (3, 3), name="branch3x3dbl_2")(b)
        b = Conv(*how, 96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
        return jnp.concatenate([a, b, max_pool(x, 2, "VALID")], axis=-1)


class Block17(nn.Module):
    """17x17 pixels (figure 6): a 7x7 convolution as 1x7 and 7x1, and two of them."""

    dtype: DTypeLike
    precision: lax.Precision
    width: int

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """768 channels."""
        how, width = (self.dtype, self.precision), self.width
        a = Conv(*how, 192, (1, 1), name="branch1x1")(x)
        b = Conv(*how, width, (1, 1), name="branch7x7_1")(x)
        b = Conv(*how, width, (1, 7), name="branch7x7_2")(b)
        b = Conv(*how, 192, (7, 1), name="branch7x7_3")(b)
        c = Conv(*how, width, (1, 1), name="branch7x7dbl_1")(x)
        c = Conv(*how, width, (7, 1), name="branch7x7dbl_2")(c)
        c = Conv(*how, width, (1, 7), name="branch7x7dbl_3")(c)
        c = Conv(*how, width, (7, 1), name="branch7x7dbl_4")(c)
        c = Conv(*how, 192, (1, 7), name="branch7x7dbl_5")(c)
        d = Conv(*how, 192, (1, 1), name="branch_pool")(average_pool(x))
        return jnp.concatenate([a, b, c, d], axis=-1)


class Reduction8(nn.Module):
    """From 17x17 to 8x8 pixels: 3x3, 7x7 and 3x3, maximum."""

    dtype: DTypeLike
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """1280 channels."""
        how = (self.dtype, self.precision)
        a = Conv(*how, 192, (1, 1), name="branch3x3_1")(x)
        a = Conv(*how, 320, (3, 3), 2, "VALID", name="branch3x3_2")(a)
        b = Conv(*how, 192, (1, 1), name="branch7x7x3_1")(x)
        b = Conv(*how, 192, (1, 7), name="branch7x7x3_2")(b)
        b = Conv(*how, 192, (7, 1), name="branch7x7x3_3")(b)
        b = Conv(*how, 192, (3, 3), 2, "VALID", name="branch7x7x3_4")(b)
        return jnp.concatenate([a, b, max_pool(x, 2, "VALID")], axis=-1)


class Block8(nn.Module):
    """8x8 pixels (figure 7): the last convolutions of a branch lie side by side, 1x3 and 3x1."""

    dtype: DTypeLike
    precision: lax.Precision
    pool: Callable[[Images], Images]

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """2048 channels."""
        how = (self.dtype, self.precision)
        a = Conv(*how, 320, (1, 1), name="branch1x1")(x)
        b = Conv(*how, 384, (1, 1), name="branch3x3_1")(x)
        b_wide = Conv(*how, 384, (1, 3), name="branch3x3_2a")(b)
        b_tall = Conv(*how, 384, (3, 1), name="branch3x3_2b")(b)
        c = Conv(*how, 448, (1, 1), name="branch3x3dbl_1")(x)
        c = Conv(*how, 384, (3, 3), name="branch3x3dbl_2")(c)
        c_wide = Conv(*how, 384, (1, 3), name="branch3x3dbl_3a")(c)
        c_tall = Conv(*how, 384, (3, 1), name="branch3x3dbl_3b")(c)
        d = Conv(*how, 192, (1, 1), name="branch_pool")(self.pool(x))
        return jnp.concatenate([a, b_wide, b_tall, c_wide, c_tall, d], axis=-1)
