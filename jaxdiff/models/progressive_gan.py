"""The progressive GAN: generator and discriminator that grow from 4x4 pixels (Karras et al. 2018, table 2).

Paper: https://arxiv.org/abs/1710.10196. Stage k makes and judges images of 4 * 2^k pixels a side. All stages share one tree of
parameters, named by resolution: `block_8`, `to_rgb_8`, `from_rgb_8`. `init` makes all of it; a stage touches what `active_part`
gives. While stage k is young, `alpha` rises from 0 to 1: at 0 both networks are exactly those of stage k - 1 (the generator's
image doubled, the discriminator's halved), at 1 exactly those of stage k.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.models.equalized import EqualizedConv, EqualizedDense, minibatch_stddev, pixelwise_norm, widened
from jaxdiff.models.folded import patch_mean, patch_repeat
from jaxdiff.models.layers import depth_to_space, repeat_pixels, space_to_depth

FIRST = 4  # pixels a side at stage 0
SLOPE = 0.2  # of the leaky ReLU

Alpha = Float[Array, ""] | float


def resolution_of(stage: int) -> int:
    """Pixels a side: 4, 8, 16, ..."""
    return FIRST * 2**stage


def stage_of(resolution: int) -> int:
    """The inverse of `resolution_of`. Raises ValueError for what is no power of 2, or below 4."""
    stage = resolution.bit_length() - 3
    if stage < 0 or resolution_of(stage) != resolution:
        raise ValueError(f"progressive GAN: a resolution must be 4, 8, 16, ..., not {resolution}")
    return stage


def channels_at(resolution: int, base: int, most: int) -> int:
    """Feature maps at a resolution: inverse to it, but not above `most`; base 8192, most 512: 512 up to 32, 16 at 1024."""
    return min(2 * base // resolution, most)


def folds(stage: int, base: int, most: int, below: int) -> bool:
    """Whether a stage's features, of fewer channels than `below`, are folded: never those of 4x4 pixels."""
    return stage > 0 and channels_at(resolution_of(stage), base, most) < below


def fade(old: Float[Array, "*s"], new: Float[Array, "*s"], alpha: Alpha) -> Float[Array, "*s"]:
    """(1 - alpha) old + alpha new, computed at least in float32; exactly `old` at 0 and `new` at 1, whatever the other is."""
    # 0 times what is not finite were NaN, here and in the gradient: so the side that is not heard is not looked at.
    dtype = new.dtype
    old, new = jnp.where(alpha == 1, 0, widened(old)), jnp.where(alpha == 0, 0, widened(new))
    return ((1 - alpha) * old + alpha * new).astype(dtype)


def halve_pixels(x: Float[Array, "b 2h 2w c"]) -> Float[Array, "b h w c"]:
    """Mean of each 2x2 patch."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def fade_images(x: Float[Array, "b h w c"], alpha: Alpha, folded: bool = False) -> Float[Array, "b h w c"]:
    """Real images as detailed as what a generator can make at `alpha`: halved and doubled at 0, unchanged at 1."""
    return fade(patch_repeat(patch_mean(x)) if folded else repeat_pixels(halve_pixels(x)), x, alpha)


def active_part(params: dict[str, Any], stage: int) -> dict[str, Any]:
    """What a stage's networks use: the blocks up to its resolution, and to or from RGB at its own and the one below."""

    def used(name: str) -> bool:
        kind, resolution = name.rsplit("_", 1)
        at = stage_of(int(resolution))
        return at <= stage if kind == "block" else at in (stage - 1, stage)

    return {name: part for name, part in params.items() if used(name)}


class GeneratorBlock(nn.Module):
    """Two 3x3 convolutions, each with leaky ReLU and pixelwise normalisation; for 4x4 the first is a dense layer.

    folded: the features have 2x2 patches of pixels in their channels (of what comes out: [b h w 4*d]).
    """

    channels: int
    folded: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"] | Float[Array, "b z"]) -> Float[Array, "b 2*h 2*w d"]:
        """Features at twice the resolution, or at 4x4 of a latent vector."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if x.ndim == 2:
            # The gain is that of a 4x4 convolution which sees the vector in one pixel of its 16. As in a convolution, a
            # channel's 16 pixels share one bias.
            dense = EqualizedDense(FIRST**2 * self.channels, math.sqrt(2) / 4, use_bias=False, name="dense", **dtypes)
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), self.param_dtype)
            x = dense(x).reshape(-1, FIRST, FIRST, self.channels) + bias.astype(self.dtype)[None, None, None]
            x = pixelwise_norm(nn.leaky_relu(x, SLOPE))
            return pixelwise_norm(nn.leaky_relu(EqualizedConv(self.channels, name="conv", **dtypes)(x), SLOPE))
        for i in range(2):
            conv = EqualizedConv(self.channels, doubled=i == 0, folded=self.folded, name=f"conv_{i}", **dtypes)
            x = pixelwise_norm(nn.leaky_relu(conv(x), SLOPE), self.folded)
        return x


class Generator(nn.Module):
    """Latents [b latent_dim] (normal numbers) to images of a stage's resolution; no tanh at the end.

    num_classes: above 0, labels are appended to the latents as one-hot vectors.
    fold_below: features of fewer channels are folded, for a TPU (`jaxdiff.models.folded`); the numbers are the same.
    """

    resolution: int = 1024  # of the last stage
    image_channels: int = 3
    latent_dim: int = 512
    channel_base: int = 8192
    channel_max: int = 512
    num_classes: int = 0
    fold_below: int = 0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b latent_dim"],
        label: Int[Array, " b"] | None = None,
        *,
        stage: int | None = None,
        alpha: Alpha = 1.0,
        unfold: bool = True,
    ) -> Float[Array, "b h w c"]:
        """Float32 images, about [-1, 1] once trained and not clipped. `stage` is static (None: the last), `alpha` traced.

        unfold: False leaves images folded, where the features of their resolution are.
        """
        stage = _checked_stage(stage, self.resolution)
        if (label is None) != (self.num_classes == 0):
            raise ValueError(
                f"generator: with {self.num_classes} classes, labels are {'not ' * (label is not None)}needed"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if label is not None:
            z = jnp.concatenate([z, nn.one_hot(label, self.num_classes, dtype=z.dtype)], axis=-1)
        x: Array = pixelwise_norm(widened(z)).astype(self.dtype)
        images: list[Array] = []
        for at in range(stage + 1):
            resolution, folded = resolution_of(at), self.folds(at)
            channels = channels_at(resolution, self.channel_base, self.channel_max)
            x = GeneratorBlock(channels, folded, name=f"block_{resolution}", **dtypes)(x)
            if folded and at < stage:
                x, folded = depth_to_space(x, 2), False
            if at >= stage - 1 or self.is_initializing():
                to_rgb = EqualizedConv(
                    self.image_channels, 1, 1.0, folded=folded, name=f"to_rgb_{resolution}", **dtypes
                )
                images.append(widened(to_rgb(x)))
        image, folded = images[-1], self.folds(stage)
        if stage > 0:
            image = fade((patch_repeat if folded else repeat_pixels)(images[-2]), image, alpha)
        return depth_to_space(image, 2) if folded and unfold else image

    def folds(self, stage: int) -> bool:
        """Whether the features of a stage's resolution are folded."""
        return folds(stage, self.channel_base, self.channel_max, self.fold_below)


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions with leaky ReLU, and the mean of each 2x2 patch.

    folded: what comes in has 2x2 patches of pixels in its channels: [b h w 4*c].
    """

    channels: int
    next_channels: int
    folded: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b 2h 2w c"]) -> Float[Array, "b h w d"]:
        """Features at half the resolution."""
        for i, channels in enumerate((self.channels, self.next_channels)):
            conv = EqualizedConv(
                channels, folded=self.folded, dtype=self.dtype, param_dtype=self.param_dtype, name=f"conv_{i}"
            )
            x = nn.leaky_relu(conv(x), SLOPE)
        return patch_mean(x) if self.folded else halve_pixels(x)


class DiscriminatorHead(nn.Module):
    """Minibatch standard deviation, a 3x3 convolution, and two dense layers: `outputs` numbers an image."""

    channels: int
    hidden: int
    outputs: int
    group_size: int | None
    shards: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b 4 4 c"]) -> Float[Array, "b outputs"]:
        """Float32."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = minibatch_stddev(x, self.group_size, self.shards)
        x = nn.leaky_relu(EqualizedConv(self.channels, name="conv", **dtypes)(x), SLOPE)
        x = nn.leaky_relu(EqualizedDense(self.hidden, name="dense", **dtypes)(x.reshape(x.shape[0], -1)), SLOPE)
        return widened(EqualizedDense(self.outputs, 1.0, name="out", **dtypes)(x))


class Discriminator(nn.Module):
    """Images of a stage's resolution to a number each (high: real), and class logits where there are classes (AC-GAN).

    group_size, shards: of `minibatch_stddev`. With as many shards as a batch has devices, no device needs another's features
    (under pmap, where a device sees its own share only, that is 1); with a fixed number any devices compute the same.
    fold_below: features of fewer channels are folded, for a TPU (`jaxdiff.models.folded`); the numbers are the same.
    """

    resolution: int = 1024  # of the last stage
    channel_base: int = 8192
    channel_max: int = 512
    num_classes: int = 0
    group_size: int | None = 4
    shards: int = 1
    fold_below: int = 0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, stage: int | None = None, alpha: Alpha = 1.0
    ) -> tuple[Float[Array, " b"], Float[Array, "b num_classes"] | None]:
        """Float32 scores and logits (None without classes); `stage` is static (None: the last), `alpha` traced.

        Where the features of their resolution are folded, images may come folded too.
        """
        stage = _checked_stage(stage, self.resolution)
        side, folded = resolution_of(stage), self.folds(stage)
        if folded and x.shape[1:3] == (side, side):
            x = space_to_depth(x, 2)
        if x.shape[1:3] != (side // (1 + folded),) * 2:
            raise ValueError(
                f"discriminator: stage {stage} judges images of {side}x{side} pixels, not {x.shape[1]}x{x.shape[2]}"
            )
        h = self._from_rgb(x, stage, folded)
        for at in range(stage, 0, -1):
            widths, folded = (self._channels(at), self._channels(at - 1)), self.folds(at)
            h = space_to_depth(h, 2) if folded and at < stage else h
            h = DiscriminatorBlock(*widths, folded, self.dtype, self.param_dtype, name=f"block_{resolution_of(at)}")(h)
            if at == stage or self.is_initializing():
                x = patch_mean(x) if folded and at == stage else halve_pixels(x)
                old = self._from_rgb(x, at - 1, False)
                h = fade(old, h, alpha) if at == stage else h
        head = DiscriminatorHead(
            channels=self._channels(0),
            hidden=min(self.channel_base, self.channel_max),
            outputs=1 + self.num_classes,
            group_size=self.group_size,
            shards=self.shards,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=f"block_{FIRST}",
        )
        out = head(h)
        return out[:, 0], out[:, 1:] if self.num_classes else None

    def _channels(self, stage: int) -> int:
        return channels_at(resolution_of(stage), self.channel_base, self.channel_max)

    def folds(self, stage: int) -> bool:
        """Whether the features of a stage's resolution are folded."""
        return folds(stage, self.channel_base, self.channel_max, self.fold_below)

    def _from_rgb(self, x: Array, stage: int, folded: bool) -> Array:
        conv = EqualizedConv(
            self._channels(stage),
            1,
            folded=folded,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=f"from_rgb_{resolution_of(stage)}",
        )
        return nn.leaky_relu(conv(x), SLOPE)


def _checked_stage(stage: int | None, resolution: int) -> int:
    last = stage_of(resolution)
    if stage is None:
        return last
    if not 0 <= stage <= last:
        raise ValueError(f"progressive GAN: stage must be 0 to {last} ({resolution}x{resolution} pixels), not {stage}")
    return stage
