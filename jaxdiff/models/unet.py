"""The U-Net of DDPM (Ho et al. 2020, app. B), with labels, text context and patches at the door as options."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.models.attention import AttentionBlock, AttentionImplementation, SpatialTransformer
from jaxdiff.models.embeddings import TimeEmbedding
from jaxdiff.models.layers import (
    Downsample,
    ResidualBlock,
    Upsample,
    conv3x3,
    default_init,
    depth_to_space,
    group_norm,
    space_to_depth,
    zero_init,
)


class UNetBlock(nn.Module):
    """A residual block, then attention if this level has it; the unit of rematerialisation."""

    channels: int
    attention: bool
    num_heads: int
    dropout: float
    epsilon: float
    norm_groups: int | None
    scale_shift_norm: bool
    attention_implementation: AttentionImplementation
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        embedding: Float[Array, "b e"],
        context: Float[Array, "b n k"] | None,
        train: bool,
    ) -> Float[Array, "b h w d"]:
        """With a context the attention is latent diffusion's transformer, without it DDPM's attention block."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        residual = ResidualBlock(
            self.channels,
            self.dropout,
            self.epsilon,
            self.norm_groups,
            self.scale_shift_norm,
            name="residual",
            **dtypes,
        )
        x = residual(x, embedding, train=train)
        if not self.attention:
            return x
        heads: dict[str, Any] = {
            "num_heads": self.num_heads,
            "norm_groups": self.norm_groups,
            "implementation": self.attention_implementation,
        }
        if context is None:
            return AttentionBlock(name="attention", **heads, **dtypes)(x)
        return SpatialTransformer(name="transformer", dropout=self.dropout, **heads, **dtypes)(x, context, train=train)


class UNet(nn.Module):
    """Network of a diffusion model: noised images and their times to a prediction of the same size.

    A level of an odd height or width is halved to the larger half, and what comes back from there is cut to its size.

    attention_resolutions: heights of the feature maps that get attention (an image of 32 pixels with patch_size 1 has
        levels of 32, 16, 8 ... pixels; with patch_size 2 of 16, 8, 4 ...). The middle always has one.
    attention_levels: the same by level (0: the largest feature map), whatever the image's size; instead of the resolutions.
    num_heads or head_dim: heads of every attention, or the channels of one head (then num_heads is ignored).
    num_classes: labels 0 .. num_classes - 1; the embedding table has one more row, the null label of classifier-free
        guidance (`num_classes` itself, and what label=None means).
    context_dim: channels of the text context; None for a model without text.
    pooled_context: every residual block is told the mean of the context too, by the side of the time.
    position_embedding: every position is told where it is at the door. Zero padding tells it too, but slowly.
    scale_shift_norm: in the residual blocks the embedding scales and shifts what is normed instead of adding to it before.
    patch_size: each p x p patch of pixels is one position with p * p as many channels inside the network.
    norm_groups: groups of every GroupNorm; None for 32, or fewer where channels are few.
    norm_epsilon, frequency_shift, cosine_first: of the GroupNorms outside attention and of the time embedding. DDPM has
        1e-6, 1, False; Stable Diffusion 1e-5, 0, True.
    dtype, param_dtype: of the computation and of the parameters. Statistics, softmax and time embedding are float32.
    remat: recompute each block in the backward pass instead of keeping its activations.
    """

    out_channels: int
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    attention_levels: tuple[int, ...] | None = None
    num_heads: int = 1
    head_dim: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    context_dim: int | None = None
    pooled_context: bool = False
    position_embedding: bool = False
    patch_size: int = 1
    scale_shift_norm: bool = False
    norm_groups: int | None = None
    norm_epsilon: float = 1e-6
    frequency_shift: float = 1.0
    cosine_first: bool = False
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        label: Int[Array, " b"] | None = None,
        context: Float[Array, "b n k"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """Float32 prediction; exactly zero before training. With train=True dropout needs rngs={"dropout": key}."""
        self._check(x, label, context)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embedding = self._embedding(time, label, context)
        context = None if context is None else context.astype(self.dtype)
        last = len(self.channel_multipliers) - 1
        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]

        h = space_to_depth(x.astype(self.dtype), self.patch_size)
        h = conv3x3(self.channels, name="conv_in", **dtypes)(h)
        if self.position_embedding:
            h += position_embedding(*h.shape[1:]).astype(h.dtype)[None]
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = self._block(width, self._attends(level, h), f"down_{level}_{i}")(h, embedding, context, train)
                skips.append(h)
            if level < last:
                h = Downsample(name=f"down_{level}_downsample", **dtypes)(h)
                skips.append(h)

        h = self._block(widths[-1], True, "middle_0")(h, embedding, context, train)
        h = self._block(widths[-1], False, "middle_1")(h, embedding, context, train)

        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._block(width, self._attends(level, h), f"up_{level}_{i}")(h, embedding, context, train)
            if level > 0:
                h = Upsample(name=f"up_{level}_upsample", **dtypes)(h, skips[-1].shape[1:3])

        h = nn.swish(group_norm(h.shape[-1], self.norm_epsilon, name="norm_out", groups=self.norm_groups, **dtypes)(h))
        h = conv3x3(self.out_channels * self.patch_size**2, name="conv_out", kernel_init=zero_init, **dtypes)(h)
        return depth_to_space(h, self.patch_size).astype(jnp.float32)

    def _attends(self, level: int, x: Float[Array, "b h w c"]) -> bool:
        """Whether the blocks of a level, where the feature map is like x, have attention."""
        if self.attention_levels is not None:
            return level in self.attention_levels
        return x.shape[1] in self.attention_resolutions

    def _block(self, channels: int, attention: bool, name: str) -> nn.Module:
        """The block called `name`, rematerialised where that is wanted."""
        block = nn.remat(UNetBlock, static_argnums=(4,)) if self.remat else UNetBlock  # argument 4 is `train`
        return block(
            channels,
            attention=attention,
            num_heads=self.num_heads if self.head_dim is None else channels // self.head_dim,
            dropout=self.dropout,
            epsilon=self.norm_epsilon,
            norm_groups=self.norm_groups,
            scale_shift_norm=self.scale_shift_norm,
            attention_implementation=self.attention_implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _embedding(
        self, time: Float[Array, " b"], label: Int[Array, " b"] | None, context: Float[Array, "b n k"] | None
    ) -> Float[Array, "b e"]:
        """What every residual block is told: the time, plus the label or the pooled context where the model has them."""
        width = 4 * self.channels
        embed = TimeEmbedding(
            self.channels,
            width,
            self.frequency_shift,
            self.cosine_first,
            param_dtype=self.param_dtype,
            name="time_embedding",
        )
        embedding = embed(time)
        if self.pooled_context and context is not None:
            project = nn.Dense(width, kernel_init=default_init, param_dtype=self.param_dtype, name="pooled_context")
            embedding += project(context.astype(jnp.float32).mean(1))
        if self.num_classes == 0:
            return embedding
        if label is None:
            label = jnp.full(time.shape, self.num_classes)
        table = nn.Embed(
            self.num_classes + 1, width, dtype=jnp.float32, param_dtype=self.param_dtype, name="label_embedding"
        )
        return embedding + table(label)

    def _check(
        self, x: Float[Array, "b h w c"], label: Int[Array, " b"] | None, context: Float[Array, "b n k"] | None
    ) -> None:
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(
                f"U-Net: images of {x.shape[1]}x{x.shape[2]} pixels, but patch_size {self.patch_size} needs height and "
                f"width to be multiples of {self.patch_size}"
            )
        if label is not None and self.num_classes == 0:
            raise ValueError("U-Net: got labels, but num_classes is 0; set num_classes or leave the labels out")
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                f"U-Net: context_dim is {self.context_dim}, but "
                f"{'no context was given' if context is None else 'a context was given'}"
            )
        if context is not None and context.shape[-1] != self.context_dim:
            raise ValueError(f"U-Net: context has {context.shape[-1]} channels, context_dim is {self.context_dim}")


def position_embedding(height: int, width: int, channels: int) -> Float[Array, "h w c"]:
    """Sines and cosines of row and column, a quarter of the channels each, at wavelengths from 2 pi to 20,000 pi.

    As in the vision transformers that DiT is one of (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748).
    """
    if channels % 4:
        raise ValueError(f"U-Net: position_embedding needs a multiple of 4 channels, not {channels}")
    frequencies = 10_000.0 ** -(jnp.arange(channels // 4) / (channels // 4))
    rows = jnp.arange(height)[:, None] * frequencies[None]
    columns = jnp.arange(width)[:, None] * frequencies[None]
    shape = (height, width, channels // 4)
    parts = [jnp.broadcast_to(f(rows)[:, None], shape) for f in (jnp.sin, jnp.cos)]
    parts += [jnp.broadcast_to(f(columns)[None], shape) for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate(parts, axis=-1)
