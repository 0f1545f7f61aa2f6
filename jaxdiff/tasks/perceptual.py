"""Networks through which an autoencoder's reconstructions are compared with the originals.

"lpips": VGG16 and learned weights of its channels (Zhang et al. 2018), from files that the user has. "efficientnet-lite0": the
network of the extra [offline], its channels alike. Both look at the images in their own size, as LPIPS does: what a network sees
in an enlarged image is mostly the enlarging, at twelve times the cost for 64 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config import AutoencoderConfig, ConfigError
from jaxdiff.losses import perceptual_distance
from jaxdiff.models.efficientnet_lite import EfficientNetLite0Maps
from jaxdiff.models.vgg import BLOCKS, VGG16
from jaxdiff.weights.efficientnet_lite import efficientnet_lite_params
from jaxdiff.weights.lpips import lpips_weights

# How LPIPS normalises images in [-1, 1] for VGG16, a number a channel.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True, eq=False)
class Perceptual:
    """A distance between images in [-1, 1], grey or RGB. `params` are an argument, so that no program has them baked in."""

    params: Any
    distance: Callable[[Any, Float[Array, "b h w c"], Float[Array, "b h w c"]], Float[Array, " b"]]


def lpips_distance(params: Any, x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """LPIPS, version 0.1, of `params` {"vgg16", "channels"}."""

    def maps(images: Float[Array, "b h w c"]) -> list[Array]:
        rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))
        scaled = (rgb - jnp.array(SHIFT)[None, None, None]) / jnp.array(SCALE)[None, None, None]
        return VGG16().apply({"params": params["vgg16"]}, scaled)  # type: ignore[return-value]

    return perceptual_distance(maps(x), maps(y), params["channels"])


def efficientnet_distance(params: Any, x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """The same of EfficientNet-Lite0's first five stages, all channels weighing alike."""

    def maps(images: Float[Array, "b h w c"]) -> list[Array]:
        rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))
        scaled = ((rgb + 1) * 127.5 - 127) / 128  # as that network is fed
        return EfficientNetLite0Maps().apply({"params": params}, scaled)  # type: ignore[return-value]

    return perceptual_distance(maps(x), maps(y))


def network_of(settings: AutoencoderConfig) -> str:
    """The network's name, or "none"; of "auto" LPIPS where the config says where its files are, else EfficientNet-Lite0."""
    if settings.perceptual == "auto":
        return "lpips" if settings.perceptual_files else "efficientnet-lite0"
    return settings.perceptual


def load_perceptual(settings: AutoencoderConfig) -> Perceptual | None:
    """What the config names; None where it is "none". Raises ConfigError where its weights cannot be had."""
    network = network_of(settings)
    try:
        if network == "lpips":
            weights = lpips_weights(settings.perceptual_files, BLOCKS)
            return Perceptual({"vgg16": weights.vgg16, "channels": weights.channels}, lpips_distance)
        if network == "efficientnet-lite0":
            params, _ = efficientnet_lite_params()
            used = {name: value for name, value in params.items() if name not in ("head", "classes")}
            return Perceptual(used, efficientnet_distance)
    except ValueError as error:
        raise ConfigError(f"config.autoencoder_kl.perceptual = {settings.perceptual!r}: {error}") from error
    return None
