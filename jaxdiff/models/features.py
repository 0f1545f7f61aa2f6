"""What a feature extractor says of a batch of images: the input of every score (FID, inception score, KID, sFID ...)."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Features(NamedTuple):
    """Outputs of a classification network, one row an image, always float32."""

    pool: Float[Array, "b d"]  # averaged over space, before the last dense layer: FID, KID, precision and recall
    logits: Float[Array, "b k"]  # before the softmax: inception score. Inception: WITHOUT the bias, as published
    spatial: Float[Array, "b s"] | None = None  # a map in the network's middle, flattened as h, w, c: sFID
