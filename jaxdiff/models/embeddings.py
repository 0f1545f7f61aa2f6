"""How a network is told a number: the sinusoidal time embedding (Vaswani et al. 2017; DDPM, Ho et al. 2020)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def sinusoidal_embedding(
    t: Float[Array, " b"],
    dim: int,
    *,
    max_period: float = 10_000.0,
    frequency_shift: float = 1.0,
    cosine_first: bool = False,
) -> Float[Array, "b dim"]:
    """[sin(w_0 t), sin(w_1 t) .. cos(w_0 t), cos(w_1 t) ..] with w_i = max_period^(-i / (h - shift)), i < h = dim / 2.

    The defaults are DDPM's: sines first, the last frequency exactly 1 / max_period. Stable Diffusion has cosines first
    and frequency_shift = 0. Always float32: in bfloat16 t = 999 and t = 1000 are the same number. An odd `dim` is
    padded with one zero.
    """
    half = dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / max(half - frequency_shift, 1.0)
    angles = t.astype(jnp.float32)[:, None] * (max_period**-exponents)[None, :]
    sines_cosines = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(sines_cosines[::-1] if cosine_first else sines_cosines, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then a perceptron of two layers; float32 throughout, which costs nothing here."""

    channels: int
    embedding_channels: int
    frequency_shift: float = 1.0
    cosine_first: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b e"]:
        """Embedding of times t."""
        h = sinusoidal_embedding(t, self.channels, frequency_shift=self.frequency_shift, cosine_first=self.cosine_first)
        h = nn.Dense(self.embedding_channels, dtype=jnp.float32, param_dtype=self.param_dtype, name="dense_0")(h)
        return nn.Dense(self.embedding_channels, dtype=jnp.float32, param_dtype=self.param_dtype, name="dense_1")(
            nn.swish(h)
        )
