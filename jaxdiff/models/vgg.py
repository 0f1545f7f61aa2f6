"""The convolutions of VGG16 (Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556): what LPIPS sees with."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.layers import SYMMETRIC

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions; max pooling between blocks


class VGG16(nn.Module):
    """Images, normalised as the weights want them, to the last feature map of each of the five blocks.

    Blocks of 3x3 convolutions with ReLU; between two blocks the largest of 2x2 pixels is kept (an odd last one is left out).
    """

    blocks: tuple[tuple[int, int], ...] = BLOCKS
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """Maps of sides h, h/2, h/4 ..., in float32."""
        least = 2 ** (len(self.blocks) - 1)
        if min(x.shape[1:3]) < least:
            raise ValueError(f"VGG16: images of {x.shape[1]}x{x.shape[2]} pixels, at least {least} a side are needed")
        maps, h = [], x.astype(self.dtype)
        for block, (channels, count) in enumerate(self.blocks):
            h = nn.max_pool(h, (2, 2), (2, 2)) if block else h
            for i in range(count):
                h = nn.relu(nn.Conv(channels, (3, 3), padding=SYMMETRIC, dtype=self.dtype, name=f"conv_{block}_{i}")(h))
            maps.append(h.astype(jnp.float32))
        return maps
