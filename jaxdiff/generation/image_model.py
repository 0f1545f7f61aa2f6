"""What it takes to make images with a diffusion model, as pure functions of its parameters.

A pixel model, a latent model (Rombach et al. 2022, https://arxiv.org/abs/2112.10752) and Stable Diffusion each give one
`ImageModel`; everything in this folder works on it and knows no network.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8, UInt32

from jaxdiff.diffusion.predictions import Denoiser, make_denoiser
from jaxdiff.diffusion.scheduler import Schedule
from jaxdiff.generation.masks import to_latents


class Known(NamedTuple):
    """The condition of a network with mask channels: what any network is told, and what it sees beside x_t."""

    condition: Any
    channels: Float[
        Array, "b h w d+1"
    ]  # the mask (1 = to be made), then the latents of the image without what it covers


class Blend(NamedTuple):
    """The far end of an interpolation, for each image."""

    seed: UInt32[Array | np.ndarray, " b"] | UInt32[Array | np.ndarray, "b k"]  # as `make_device_generator` takes them
    condition: Any  # as Request.condition; None = that of the request, all along
    weight: Float[Array | np.ndarray, " b"]  # 0 = the request itself, 1 = the far end


class Request(NamedTuple):
    """What is asked for, every leaf with one entry an image. Which of the parts are there is compiled in."""

    condition: Any = None  # labels int32 [b], {"tokens", "negative"} int32 [b n], or None
    image: UInt8[Array | np.ndarray, "b h w c"] | None = None  # to begin from
    mask: UInt8[Array | np.ndarray, "b h w 1"] | None = (
        None  # 255 = to be made anew, 0 = kept (split at 128); goes with an image
    )
    blend: Blend | None = None


def _same_as_pixels(params: Any, x: Array, keys: Any = None) -> Array:
    """The first stage of a model that works on the pixels themselves."""
    return x


@dataclasses.dataclass(frozen=True, eq=False)
class ImageModel:
    """A diffusion model: network, schedule, first stage and how to tell the network what is asked for.

    network: (params, x, network time [b], condition) -> prediction. conditions: (params, Request.condition, guided) ->
    (condition, null condition or None), pytrees with a leading axis b. encode: (params, x, a key for each image) ->
    latents; decode: (params, latents) -> x; x in [-1, 1]. mask_channels: the network's condition is a `Known`. num_classes:
    of a model that is asked by labels, else 0.
    scheduler: diffusers' scheduler_config.json where the model came with one; it then decides how levels are visited, and
    `schedule` and `prediction` are those of training.
    """

    schedule: Schedule
    prediction: str
    learned_variance: bool
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    network: Callable[[Any, Array, Array, Any], Array]
    conditions: Callable[[Any, Any, bool], tuple[Any, Any]]
    encode: Callable[[Any, Array, Key[Array, " b"]], Array] = _same_as_pixels
    decode: Callable[[Any, Array], Array] = _same_as_pixels
    mask_channels: bool = False
    num_classes: int = 0
    scheduler: Mapping[str, Any] | None = None

    def denoiser(self, params: Any, schedule: Schedule | None = None, prediction: str | None = None) -> Denoiser:
        """The denoiser with these parameters, as a function of (x_t, t, condition); t of the schedule given, or the own."""

        def network(x: Array, time: Array, condition: Any) -> Array:
            return self.network(params, x, time, condition)

        return make_denoiser(network, schedule or self.schedule, prediction or self.prediction, self.learned_variance)

    def mask_and_known(
        self, params: Any, x: Float[Array, "b h w c"], mask: Float[Array, "b h w 1"], keys: Key[Array, " b"]
    ) -> Float[Array, "b l k d+1"]:
        """What a network with mask channels sees of an image: the mask, and the latents of the image greyed out under it."""
        known = self.encode(params, x * (1 - mask), keys)
        return jnp.concatenate([to_latents(mask, self.latent_shape), known], axis=-1)

    def nothing_known(self, params: Any, keys: Key[Array, " b"]) -> Float[Array, "b l k d+1"]:
        """What such a network sees where the whole image is to be made."""
        x = jnp.zeros((keys.shape[0], *self.image_shape))
        return self.mask_and_known(params, x, jnp.ones_like(x[..., :1]), keys)
