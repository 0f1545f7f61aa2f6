"""Networks that turn images into features, with their real weights: what every score but the likelihood looks through."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from jaxdiff.models.efficientnet_lite import EfficientNetLite0, preprocess
from jaxdiff.models.features import Features
from jaxdiff.models.inception import inception_features
from jaxdiff.weights.efficientnet_lite import efficientnet_lite_params
from jaxdiff.weights.inception import INCEPTION_SHA256, inception_params, inception_weights

EXTRACTORS = ("inception", "efficientnet-lite0")
PRECISIONS = ("float32", "bfloat16")
INCEPTION = "inception-2015-12-05"


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network with its weights: `features(params, images)` takes uint8 images of any size, grey or RGB.

    `resize` and `precision` say in words how it looks at them. Scores made through the published Inception network have their
    plain names; those of any other network, or other weights, carry its name, as in fid[efficientnet-lite0].
    """

    name: str
    weights_sha256: str
    resize: str
    precision: str
    dimension: int
    has_spatial: bool  # whether there are features of an inner layer, for sFID
    params: Any
    features: Callable[[Any, UInt8[Array, "b h w c"]], Features]

    def score_name(self, score: str) -> str:
        """The name under which a score made through this extractor is printed."""
        if self.weights_sha256 == INCEPTION_SHA256:
            return score
        return f"{score}[{self.name}{' with other weights' * (self.name == INCEPTION)}]"


def load_extractor(
    name: str = "inception", weights: str | pathlib.Path | None = None, precision: str = "float32"
) -> Extractor:
    """The extractor of that name. Raises ValueError with one line for an unknown name or weights that cannot be had.

    "inception": the network of FID and of the inception score; its weights come from the file `weights`, or are downloaded
    once. "efficientnet-lite0": from the package of the extra [offline], for machines without a network.
    `precision`: "float32" (the full one, on every accelerator), or "bfloat16", quicker there and less exact.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    dtype = jnp.dtype(precision)
    if name == "inception":
        params, sha256 = inception_params(pathlib.Path(weights) if weights else inception_weights())
        features = functools.partial(inception_features, dtype=dtype)
        return Extractor(INCEPTION, sha256, "tf1-bilinear-299", precision, 2048, True, params, features)
    if name == "efficientnet-lite0":
        if weights:
            raise ValueError("the weights of efficientnet-lite0 come from its package: leave --weights out")
        params, sha256 = efficientnet_lite_params()
        features = functools.partial(_efficientnet_features, EfficientNetLite0(dtype=dtype))
        return Extractor(name, sha256, "antialiased-bilinear-224", precision, 1280, False, params, features)
    raise ValueError(f"unknown extractor {name!r}: there are {', '.join(EXTRACTORS)}")


def _efficientnet_features(network: EfficientNetLite0, params: Any, images: UInt8[Array, "b h w c"]) -> Features:
    features = network.apply({"params": params}, preprocess(images))
    return jax.tree.map(lambda a: a.astype(jnp.float32), features)
