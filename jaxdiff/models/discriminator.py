"""PatchGAN (Isola et al. 2017, https://arxiv.org/abs/1611.07004): real or made, judged patch by patch.

As VQGAN and latent diffusion train their autoencoders with it (Esser et al. 2021, https://arxiv.org/abs/2012.09841), but for
the norm. Theirs is BatchNorm, by which an image's verdict depends on who stands beside it, on how the batch is split over
devices, and on running averages that would have to be a state beside the parameters. GroupNorm has none of that.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.layers import SYMMETRIC, group_norm


class PatchDiscriminator(nn.Module):
    """Images to a map of logits (high: real); with 3 layers each sees a patch of 70x70 pixels."""

    channels: int = 64
    num_layers: int = 3  # those of stride 2; one of stride 1 and the last follow
    norm: Literal["group", "none"] = "group"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q 1"]:
        """Float32 logits, a patch each; images in [-1, 1]."""
        if self.norm not in ("group", "none"):
            raise ValueError(f'discriminator: norm must be "group" or "none", not {self.norm!r}')
        if min(x.shape[1:3]) < 2**self.num_layers * 3:
            raise ValueError(
                f"discriminator: images of {x.shape[1]}x{x.shape[2]} pixels are too small for {self.num_layers} layers "
                f"of stride 2: at least {2**self.num_layers * 3} pixels a side"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = x.astype(self.dtype)
        for i in range(self.num_layers + 1):
            stride = 2 if i < self.num_layers else 1
            h = self._conv(self.channels * min(2**i, 8), stride, f"conv_{i}")(h)
            if i > 0 and self.norm == "group":
                h = group_norm(h.shape[-1], 1e-5, name=f"norm_{i}", **dtypes)(h)
            h = nn.leaky_relu(h, 0.2)
        return self._conv(1, 1, "conv_out")(h).astype(jnp.float32)

    def _conv(self, channels: int, stride: int, name: str) -> nn.Conv:
        return nn.Conv(
            channels,
            (4, 4),
            strides=stride,
            padding=SYMMETRIC,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )
