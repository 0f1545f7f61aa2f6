"""On the way from one image to another: through the noise that both begin with, or through what they are asked to show."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.samplers import Images


def expand(weight: Float[Array, " b"], like: Array) -> Array:
    """A number for each image, ready to multiply `like` [b ...]."""
    return weight.reshape((-1,) + (1,) * (like.ndim - 1))


def slerp(a: Images, b: Images, weight: Float[Array, " b"]) -> Images:
    """Spherical interpolation of Gaussian noise, which keeps its norm (DDIM, Song et al. 2020, eq. 67).

    sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, with theta the angle between a and b. Exactly a at w = 0
    and b at w = 1; along the straight line where a and b are parallel.
    """
    flat = tuple(range(1, a.ndim))
    norms = jnp.sqrt((a**2).sum(flat) * (b**2).sum(flat))
    cosine = (a * b).sum(flat) / jnp.where(norms > 0, norms, 1.0)
    parallel = jnp.abs(cosine) > 1 - 1e-6
    theta = jnp.arccos(jnp.where(parallel, 0.0, cosine))
    weight_a = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * theta) / jnp.sin(theta))
    weight_b = jnp.where(parallel, weight, jnp.sin(weight * theta) / jnp.sin(theta))
    return _ends_kept(expand(weight_a, a) * a + expand(weight_b, b) * b, a, b, weight)


def lerp(a: Any, b: Any, weight: Float[Array, " b"]) -> Any:
    """Linear interpolation of pytrees of arrays [b ...]; exactly a at w = 0 and b at w = 1."""

    def leaf(a: Array, b: Array) -> Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError("between two labels there is nothing: only seeds and texts can be interpolated")
        w = expand(weight, a)
        return _ends_kept((1 - w) * a + w * b, a, b, weight)

    return jax.tree.map(leaf, a, b)


def _ends_kept(between: Array, a: Array, b: Array, weight: Float[Array, " b"]) -> Array:
    w = expand(weight, a)
    return jnp.where(w == 0, a, jnp.where(w == 1, b, between))
