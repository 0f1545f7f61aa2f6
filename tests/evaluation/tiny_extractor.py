"""An extractor that needs no weights: a few fixed projections of the pixels, by whole numbers.

Whole numbers of this size are exact in float32, so that an image's features do not depend on how XLA sums for one batch size or
another, and moments can be compared to the last digits.
"""

import jax.numpy as jnp
import numpy as np

from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.models.features import Features


def tiny_extractor(name="tiny", weights_sha256="0" * 64, dimension=6, classes=4, spatial=True):
    """Takes images of any size; grey images count as RGB."""
    rng = np.random.default_rng(0)
    params = {"w": rng.integers(-2, 3, (3 * 4 * 4, dimension)).astype(np.float32)}

    def features(params, images):
        x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
        x = x[:, :: images.shape[1] // 4, :: images.shape[2] // 4][:, :4, :4].reshape(len(images), -1)
        pool = x @ params["w"] / 1024
        return Features(pool, pool[:, :classes], pool[:, :3] / 2 if spatial else None)

    return Extractor(name, weights_sha256, "nearest-4", "float32", dimension, spatial, params, features)
