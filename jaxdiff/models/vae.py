"""Autoencoders with a Gaussian latent: the textbook's (Kingma & Welling 2014) and latent diffusion's (Rombach et al. 2022).

AutoencoderKL is the network of the CompVis and diffusers code, layer by layer; its defaults are Stable Diffusion 1 and 2.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxdiff.models.attention import AttentionBlock, AttentionImplementation
from jaxdiff.models.gaussian import Gaussian
from jaxdiff.models.layers import (
    BOTTOM_RIGHT,
    Downsample,
    ResidualBlock,
    Upsample,
    conv3x3,
    default_init,
    group_norm,
)


class MiddleBlock(nn.Module):
    """Residual block, attention over all pixels with one head, residual block."""

    channels: int
    norm_groups: int | None = None
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The feature map of the lowest resolution, changed."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm: dict[str, Any] = {"norm_groups": self.norm_groups}
        x = ResidualBlock(self.channels, name="residual_0", **norm, **dtypes)(x)
        x = AttentionBlock(implementation=self.attention_implementation, name="attention", **norm, **dtypes)(x)
        return ResidualBlock(self.channels, name="residual_1", **norm, **dtypes)(x)


class Encoder(nn.Module):
    """Images to 2 * latent_channels moments, smaller by 2 for each level but the first."""

    latent_channels: int = 4
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int | None = None
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/f w/f 2*d"]:
        """Mean and log variance of the latents, as yet unclipped."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        last = len(self.channel_multipliers) - 1
        h = conv3x3(self.channels, name="conv_in", **dtypes)(x.astype(self.dtype))
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                h = ResidualBlock(
                    self.channels * multiplier, norm_groups=self.norm_groups, name=f"down_{level}_{i}", **dtypes
                )(h)
            if level < last:
                h = Downsample(padding=BOTTOM_RIGHT, name=f"down_{level}_downsample", **dtypes)(h)
        h = MiddleBlock(h.shape[-1], self.norm_groups, self.attention_implementation, name="middle", **dtypes)(h)
        h = nn.swish(group_norm(h.shape[-1], 1e-6, name="norm_out", groups=self.norm_groups, **dtypes)(h))
        return conv3x3(2 * self.latent_channels, name="conv_out", **dtypes)(h)


class Decoder(nn.Module):
    """Latents back to images: the encoder's mirror, with one residual block more a level."""

    image_channels: int = 3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int | None = None
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h/f w/f d"]) -> Float[Array, "b h w c"]:
        """Float32 images, not clipped."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
        h = conv3x3(widths[-1], name="conv_in", **dtypes)(z.astype(self.dtype))
        h = MiddleBlock(widths[-1], self.norm_groups, self.attention_implementation, name="middle", **dtypes)(h)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = ResidualBlock(width, norm_groups=self.norm_groups, name=f"up_{level}_{i}", **dtypes)(h)
            if level > 0:
                h = Upsample(name=f"up_{level}_upsample", **dtypes)(h)
        h = nn.swish(group_norm(h.shape[-1], 1e-6, name="norm_out", groups=self.norm_groups, **dtypes)(h))
        # The last kernel: latent diffusion weighs its discriminator by the gradients that arrive here.
        return conv3x3(self.image_channels, name="conv_out", **dtypes)(h).astype(jnp.float32)


class AutoencoderKL(nn.Module):
    """The first stage of latent diffusion: images [b h w c] to latents [b h/f w/f d], f = 2^(levels - 1).

    quant_conv: a pointwise layer after the encoder and one before the decoder, as Stable Diffusion 1 and 2 have them.
    norm_groups: groups of every GroupNorm; None for 32, or fewer where channels are few.
    """

    image_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    quant_conv: bool = True
    norm_groups: int | None = None
    attention_implementation: AttentionImplementation = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Name the parts; Linen calls this."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shared: dict[str, Any] = {
            "channels": self.channels,
            "channel_multipliers": self.channel_multipliers,
            "num_res_blocks": self.num_res_blocks,
            "norm_groups": self.norm_groups,
            "attention_implementation": self.attention_implementation,
            **dtypes,
        }
        self.encoder = Encoder(self.latent_channels, **shared)
        self.decoder = Decoder(self.image_channels, **shared)
        if self.quant_conv:
            self.moments_projection = nn.Dense(2 * self.latent_channels, kernel_init=default_init, **dtypes)
            self.latents_projection = nn.Dense(self.latent_channels, kernel_init=default_init, **dtypes)

    @property
    def downsampling(self) -> int:
        """Pixels of an image along one side of a latent pixel: 8 for Stable Diffusion."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def encode(self, x: Float[Array, "b h w c"]) -> Gaussian:
        """q(z | x) of images in [-1, 1], in float32; Stable Diffusion's scaling factor is not in it."""
        if x.shape[1] % self.downsampling or x.shape[2] % self.downsampling:
            raise ValueError(
                f"autoencoder: images of {x.shape[1]}x{x.shape[2]} pixels, but {len(self.channel_multipliers)} levels "
                f"need height and width to be multiples of {self.downsampling}"
            )
        moments = self.encoder(x)
        return Gaussian.from_moments(self.moments_projection(moments) if self.quant_conv else moments)

    def decode(self, latents: Float[Array, "b h/f w/f d"]) -> Float[Array, "b h w c"]:
        """Images of latents; float32, about [-1, 1] and not clipped."""
        return self.decoder(self.latents_projection(latents) if self.quant_conv else latents)

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, "*b"] | None = None
    ) -> tuple[Float[Array, "b h w c"], Gaussian]:
        """Reconstruction and q(z | x); z is drawn with the key, or is the mean where there is none."""
        posterior = self.encode(x)
        return self.decode(posterior.mean if key is None else posterior.sample(key)), posterior


class ConvVAE(nn.Module):
    """The textbook's autoencoder: an image [b h w c] to a latent vector z [b d] and back; for MNIST-sized images.

    Each level halves the image by a convolution of stride 2. decode gives logits or means, as the likelihood likes it.
    learned_std: one number, the log standard deviation of a Gaussian decoder (Rybkin et al. 2021), kept as `log_std`.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    latent_dim: int = 20
    channels: tuple[int, ...] = (32, 64)
    hidden: int = 256
    learned_std: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Name the parts; Linen calls this."""
        height, width, image_channels = self.image_shape
        factor = 2 ** len(self.channels)
        if height % factor or width % factor:
            raise ValueError(
                f"ConvVAE: images of {height}x{width} pixels, but {len(self.channels)} levels need height and width "
                f"to be multiples of {factor}"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: dict[str, Any] = {"kernel_init": default_init, **dtypes}
        self.smallest = (height // factor, width // factor, self.channels[-1])
        self.encoder_convs = [
            conv3x3(channels, name=f"encoder_conv_{i}", stride=2, **dtypes) for i, channels in enumerate(self.channels)
        ]
        self.encoder_hidden = nn.Dense(self.hidden, **dense)
        self.encoder_out = nn.Dense(2 * self.latent_dim, **dense)
        self.decoder_in = nn.Dense(self.hidden, **dense)
        self.decoder_hidden = nn.Dense(self.smallest[0] * self.smallest[1] * self.smallest[2], **dense)
        widths = (*self.channels[-2::-1], image_channels)
        self.decoder_convs = [
            conv3x3(width, name=f"decoder_conv_{i}", doubled=True, **dtypes) for i, width in enumerate(widths)
        ]
        if self.learned_std:
            self.log_std = self.param("log_std", nn.initializers.zeros, (), jnp.float32)

    def encode(self, x: Float[Array, "b h w c"]) -> Gaussian:
        """q(z | x) of images in [-1, 1], in float32."""
        h = x.astype(self.dtype)
        for conv in self.encoder_convs:
            h = nn.swish(conv(h))
        h = nn.swish(self.encoder_hidden(h.reshape(h.shape[0], -1)))
        return Gaussian.from_moments(self.encoder_out(h))

    def decode(self, z: Float[Array, "b d"]) -> Float[Array, "b h w c"]:
        """What p(x | z) is made of, a number a pixel: a Gaussian's mean or a Bernoulli's logit; float32."""
        h = nn.swish(self.decoder_in(z.astype(self.dtype)))
        h = self.decoder_hidden(h).reshape(z.shape[0], *self.smallest)
        for conv in self.decoder_convs:
            h = conv(nn.swish(h))
        return h.astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, "*b"] | None = None
    ) -> tuple[Float[Array, "b h w c"], Gaussian]:
        """decode(z) and q(z | x); z is drawn with the key, or is the mean where there is none."""
        posterior = self.encode(x)
        return self.decode(posterior.mean if key is None else posterior.sample(key)), posterior
