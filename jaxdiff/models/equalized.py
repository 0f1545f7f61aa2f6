"""Layers with an equalised learning rate, and the two normalisations of the progressive GAN (Karras et al. 2018, section 4).

Paper: https://arxiv.org/abs/1710.10196. A weight is drawn from N(0, 1) and multiplied by He's constant each time it is used, so
that Adam, whose step does not depend on a gradient's scale, moves every layer at the same relative speed.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.folded import PIXELS, channel_means, fold_doubling_kernel, fold_kernel
from jaxdiff.models.layers import convolve_doubled

HE_GAIN = math.sqrt(2)  # before a leaky ReLU
EPSILON = 1e-8  # of both normalisations, under the root


class EqualizedConv(nn.Module):
    """Convolution (size x size, zero padding, stride 1) by kernel * gain / sqrt(fan_in); the bias is not scaled.

    doubled: of the image with each pixel repeated 2x2 (size 3 only).
    folded: what comes in and what goes out have 2x2 patches of pixels in their channels (`jaxdiff.models.folded`); with
        `doubled` only what goes out. The parameters and the numbers are the same.
    """

    features: int
    size: int = 3
    gain: float = HE_GAIN
    doubled: bool = False
    folded: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Unit variance in, `gain`^2 out, at initialisation."""
        channels = x.shape[-1] // PIXELS if self.folded and not self.doubled else x.shape[-1]
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        kernel = _scaled(kernel, self.gain, self.dtype)
        if self.folded:
            kernel = (fold_doubling_kernel if self.doubled else fold_kernel)(kernel)
            bias = jnp.tile(bias, PIXELS)
        convolve = convolve_doubled if self.doubled and not self.folded else jax.lax.conv_general_dilated
        x = convolve(x.astype(self.dtype), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x + bias.astype(self.dtype)[None, None, None]


class EqualizedDense(nn.Module):
    """x @ (kernel * gain / sqrt(fan_in)) + bias; the bias is not scaled."""

    features: int
    gain: float = HE_GAIN
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        """Unit variance in, `gain`^2 out, at initialisation."""
        kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], self.features), self.param_dtype)
        x = x.astype(self.dtype) @ _scaled(kernel, self.gain, self.dtype)
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return x + bias.astype(self.dtype)[None]


def _scaled(kernel: Array, gain: float, dtype: DTypeLike) -> Array:
    fan_in = math.prod(kernel.shape[:-1])
    return (widened(kernel) * (gain / math.sqrt(fan_in))).astype(dtype)


def widened(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The same numbers with at least the precision of float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pixelwise_norm(x: Float[Array, "*b c"], folded: bool = False) -> Float[Array, "*b c"]:
    """Root mean square 1 over the channels: x / sqrt(mean x^2 + 1e-8), at least in float32 (section 4.2).

    folded: x has 2x2 patches of pixels in its channels, each of which is normed by itself.
    """
    wide = widened(x)
    means = channel_means(wide**2) if folded else (wide**2).mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(means + EPSILON)).astype(x.dtype)


def minibatch_stddev(
    x: Float[Array, "b h w c"], group_size: int | None = 4, shards: int = 1
) -> Float[Array, "b h w c+1"]:
    """Append to each image one map: how much its group differs, on average over pixels and channels (section 3).

    The batch is `shards` parts, one after the other (those of the devices that share it); each is split into groups of
    `group_size` images that stand as far apart as can be: no group reaches beyond a part. Of 16 images in one part, 0, 4, 8
    and 12 are a group. Where 4 does not divide a part, groups are the largest that do; None: a part is one group.
    Raises ValueError where the batch cannot be split so.
    """
    b, h, w, c = x.shape
    if b % shards:
        raise ValueError(f"minibatch standard deviation: a batch of {b} cannot be split into {shards} equal parts")
    size = _group_size(b // shards, group_size)
    groups = widened(x).reshape(shards, size, -1, h, w, c)
    variance = ((groups - groups.mean(1, keepdims=True)) ** 2).mean(1)
    value = jnp.sqrt(variance + EPSILON).mean((2, 3, 4))[:, None]  # [shards, 1, groups]
    value = jnp.broadcast_to(value, (shards, size, value.shape[-1])).reshape(b, 1, 1, 1)
    return jnp.concatenate([x, jnp.broadcast_to(value, (b, h, w, 1)).astype(x.dtype)], axis=-1)


def _group_size(part: int, group_size: int | None) -> int:
    most = part if group_size is None else min(group_size, part)
    size = next(size for size in range(most, 0, -1) if part % size == 0)
    if size == 1 < part and group_size != 1:
        raise ValueError(
            f"minibatch standard deviation: {part} images (a device's share) cannot be split into groups of 2 to "
            f"{group_size}: use a multiple of {group_size}"
        )
    return size
