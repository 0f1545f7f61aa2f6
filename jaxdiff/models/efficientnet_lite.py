"""EfficientNet-Lite0, for scores where Inception's weights are out of reach (Tan & Le 2019; the Lite kind of 2020).

Lite: no squeeze-and-excitation, ReLU6 for swish, stem and head of fixed width. 4.65 million parameters, 1000 ImageNet classes,
1280 features. BatchNorm (epsilon 1e-3) runs on stored statistics, so it is folded into the kernels when weights are loaded.
Convolutions pad as TensorFlow's SAME does: where stride 2 needs an odd number of pixels, bottom and right get one more.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from jaxdiff.models.features import Features

IMAGE_SIZE = 224
STEM, HEAD, NUM_CLASSES = 32, 1280, 1000

# Kernel size, stride of the first block, expansion, channels, blocks (Tan & Le 2019, table 1).
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def preprocess(images: UInt8[Array, "b h w c"]) -> Float[Array, "b 224 224 3"]:
    """uint8 images, grey or RGB, of any size as the network wants them: 224x224, (x - 127) / 128.

    Bilinear with half-pixel centres; when it shrinks, the triangle grows with the factor (antialias).
    """
    b, _, _, c = images.shape
    if c not in (1, 3):
        raise ValueError(f"EfficientNet-Lite0 wants images of 1 or 3 channels, not {c}")
    shape = (b, IMAGE_SIZE, IMAGE_SIZE, c)
    resized = jax.image.resize(
        images.astype(jnp.float32), shape, method="linear", antialias=True, precision=lax.Precision.HIGHEST
    )
    return jnp.broadcast_to((resized - 127) / 128, (*shape[:3], 3))


class EfficientNetLite0(nn.Module):
    """[b 224 224 3] images, as `preprocess` gives them, to 1280 pooled features and the logits of 1000 classes.

    The logits are those ImageNet classification uses: with their bias. There is no spatial map.
    """

    dtype: DTypeLike = jnp.float32
    precision: lax.Precision = lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "b 224 224 3"]) -> Features:
        """Features of a batch, in float32."""
        if x.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(
                f"EfficientNet-Lite0 wants images of 224x224x3, as preprocess gives them; got {x.shape[1:]}"
            )
        dense = partial(nn.Dense, dtype=self.dtype, precision=self.precision)
        stem = nn.Conv(STEM, (3, 3), strides=2, dtype=self.dtype, precision=self.precision, name="stem")
        x = nn.relu6(stem(x))
        blocks = ((k, s if i == 0 else 1, e, c) for k, s, e, c, num_blocks in STAGES for i in range(num_blocks))
        for index, (size, stride, expansion, channels) in enumerate(blocks):
            x = InvertedResidual(size, stride, expansion, channels, self.dtype, self.precision, name=f"block{index}")(x)
        x = nn.relu6(dense(HEAD, name="head")(x))
        pool = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = dense(NUM_CLASSES, name="classes")(pool)
        return Features(pool, logits.astype(jnp.float32), None)


class EfficientNetLite0Maps(nn.Module):
    """The first five stages for images of any size: their feature maps, of 1/2, 1/4, 1/8, 1/16 and 1/16 of the sides.

    Parameters are those of EfficientNetLite0 by the same names.
    """

    num_stages: int = 5
    dtype: DTypeLike = jnp.float32
    precision: lax.Precision = lax.Precision.DEFAULT

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """Maps of images scaled as `preprocess` does it, in float32."""
        stem = nn.Conv(STEM, (3, 3), strides=2, dtype=self.dtype, precision=self.precision, name="stem")
        x, maps, index = nn.relu6(stem(x)), [], 0
        for size, first_stride, expansion, channels, num_blocks in STAGES[: self.num_stages]:
            for i in range(num_blocks):
                stride, name = first_stride if i == 0 else 1, f"block{index}"
                block = InvertedResidual(size, stride, expansion, channels, self.dtype, self.precision, name=name)
                x, index = block(x), index + 1
            maps.append(x.astype(jnp.float32))
        return maps


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, project back; add the input where shapes agree (MobileNetV2)."""

    kernel_size: int
    stride: int
    expansion: int
    channels: int
    dtype: DTypeLike
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s d"]:
        """A dense layer over the channels is a 1x1 convolution."""
        dense = partial(nn.Dense, dtype=self.dtype, precision=self.precision)
        h = x
        if self.expansion != 1:
            h = nn.relu6(dense(x.shape[-1] * self.expansion, name="expand")(h))
        h = nn.relu6(Depthwise(self.kernel_size, self.stride, self.dtype, self.precision, name="depthwise")(h))
        h = dense(self.channels, name="project")(h)
        return x + h if self.stride == 1 and x.shape[-1] == self.channels else h


class Depthwise(nn.Module):
    """Convolution of each channel by itself."""

    kernel_size: int
    stride: int
    dtype: DTypeLike
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s c"]:
        """A grouped convolution, but for the CPU, where XLA's is several times slower than the rest of the network."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1), out_axis=()), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depthwise(x, kernel, self.stride, self.precision) + bias[None, None, None]


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], stride: int, precision: lax.Precision
) -> Float[Array, "b h/s w/s c"]:
    """Depthwise convolution with SAME padding, in the way that suits the platform it is compiled for."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: shifted_depthwise(x, kernel, stride),
        default=lambda x, kernel: grouped_depthwise(x, kernel, stride, precision),
    )


def grouped_depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], stride: int, precision: lax.Precision
) -> Float[Array, "b h/s w/s c"]:
    """As a convolution with as many groups as channels."""
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


def shifted_depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], stride: int
) -> Float[Array, "b h/s w/s c"]:
    """As a sum of shifted images, one for each place of the kernel: XLA fuses it into one loop over contiguous channels."""
    size = kernel.shape[0]
    height, width = (-(-extent // stride) for extent in x.shape[1:3])
    pads = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    shifted = (
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        * kernel[i, j][None, None, None]
        for i in range(size)
        for j in range(size)
    )
    return sum(shifted, start=jnp.zeros((), x.dtype))
