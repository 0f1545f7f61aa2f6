"""Masks of inpainting: 1 where the image is to be made, 0 where it is known."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

WHOLE = 0.25  # share of the training masks that cover the whole image, so that the model also makes images from nothing
RECTANGLES = 4  # at most, in the others
SIDES = (0.125, 0.75)  # of a rectangle, as a share of the image's


def random_mask(key: Key[Array, ""], height: int, width: int) -> Float[Array, "h w 1"]:
    """A training mask: everything (one in four), or the union of one to four rectangles centred anywhere.

    In the spirit of LaMa (Suvorov et al. 2022, https://arxiv.org/abs/2109.07161), whose masks Stable Diffusion's inpainting
    model was trained on; sides are uniform between an eighth and three quarters of the image's, which may cut them off.
    """
    whole_key, count_key, side_key, place_key = jax.random.split(key, 4)
    count = jax.random.randint(count_key, (), 1, RECTANGLES + 1)
    size = jnp.array([height, width], jnp.float32)
    sides = jax.random.uniform(side_key, (RECTANGLES, 2), minval=SIDES[0], maxval=SIDES[1])
    sides = jnp.maximum(jnp.round(sides * size[None]), 1)
    centres = jnp.floor(jax.random.uniform(place_key, (RECTANGLES, 2)) * size[None])
    first = centres - jnp.floor(sides / 2)  # beyond the edge where a rectangle is cut by it

    def inside(axis: int, length: int) -> Array:
        place = jnp.arange(length)[None]
        begin, end = first[:, axis, None], (first + sides)[:, axis, None]
        return (begin <= place) & (place < end)

    rectangles = inside(0, height)[:, :, None] & inside(1, width)[:, None, :]
    drawn = (jnp.arange(RECTANGLES) < count)[:, None, None]
    whole = jax.random.bernoulli(whole_key, WHOLE)
    return (jnp.any(rectangles & drawn, axis=0) | whole).astype(jnp.float32)[..., None]


def to_latents(mask: Float[Array, "b h w 1"], latent_shape: tuple[int, int, int]) -> Float[Array, "b l k 1"]:
    """The mask at the latents' size: of each block of pixels the first, as PyTorch's nearest-neighbour resize takes it."""
    down, across = mask.shape[1] // latent_shape[0], mask.shape[2] // latent_shape[1]
    return mask[:, ::down, ::across]
