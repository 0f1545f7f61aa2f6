"""A Gaussian with a diagonal covariance: what a variational autoencoder's encoder says of its latents (Kingma & Welling 2014)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# Beyond these the exponential is of no use to anybody: the range of Stable Diffusion's autoencoder.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


class Gaussian(NamedTuple):
    """q(z | x) = N(mean, exp(log_variance)), one for each example; a pytree, so it passes through jit and vmap."""

    mean: Float[Array, " b *s"]
    log_variance: Float[Array, " b *s"]

    @classmethod
    def from_moments(cls, moments: Float[Array, " b *s 2*d"]) -> Gaussian:
        """The two halves of a network's last axis, in float32: mean, then log variance clipped to [-30, 20]."""
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))

    @property
    def std(self) -> Float[Array, " b *s"]:
        """Standard deviation."""
        return jnp.exp(0.5 * self.log_variance)

    def sample(self, key: Key[Array, "*b"]) -> Float[Array, " b *s"]:
        """Reparameterised: mean + std * noise. One key, or one for each example (then example i sees keys[i] only)."""
        if key.ndim == 0:
            noise = jax.random.normal(key, self.mean.shape)
        else:
            noise = jax.vmap(lambda one: jax.random.normal(one, self.mean.shape[1:]))(key)
        return self.mean + self.std * noise

    def kl_to_standard(self) -> Float[Array, " b"]:
        """KL(q || N(0, 1)) in nats, summed over the latents (Kingma & Welling 2014, appendix B)."""
        # expm1 keeps the digits where the variance is near 1 and the KL near 0.
        return _sum(0.5 * (self.mean**2 + jnp.expm1(self.log_variance) - self.log_variance))

    def log_prob(self, z: Float[Array, " b *s"]) -> Float[Array, " b"]:
        """Log-density log q(z) in nats, summed over the latents."""
        squared = (z - self.mean) ** 2 * jnp.exp(-self.log_variance)
        return _sum(-0.5 * (squared + self.log_variance + math.log(2 * math.pi)))


def _sum(nats: Float[Array, " b *s"]) -> Float[Array, " b"]:
    return nats.sum(tuple(range(1, nats.ndim)))
