"""A diffusion model that needs no network: the exact denoiser of pixels that are independent and Gaussian."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxdiff.config import SamplingConfig
from jaxdiff.diffusion.scheduler import DiscreteSchedule, linear_betas
from jaxdiff.generation.image_model import ImageModel

MEAN, STD, SIDE = -0.2, 0.3, 8
SCHEDULE = DiscreteSchedule.from_betas(linear_betas(1000))


def denoised(x, alpha, sigma, mean):
    """E[x0 | x_t] where x0 ~ N(mean, STD^2)."""
    return mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)


def network(params, x, time, condition):
    """The mean of the pixels is MEAN, or a tenth of the first token, or a tenth of the label."""
    alpha, sigma = (f(time + 1)[:, None, None, None] for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    mean = MEAN if condition is None else condition.reshape(-1, 1, 1, 1) / 10
    return params + denoised(x, alpha, sigma, mean)


def conditions(params, asked, guided):
    """Of text the context is the number of its letters, the empty text is as any other; the null label is 0."""
    if isinstance(asked, dict):
        context = asked["tokens"][:, :1].astype(jnp.float32)
        return context, asked["negative"][:, :1].astype(jnp.float32) if guided else None
    return asked, jnp.zeros_like(asked) if guided else None


def gaussian_model(**changes):
    model = ImageModel(SCHEDULE, "x0", False, (SIDE, SIDE, 1), (SIDE, SIDE, 1), network, conditions)
    return dataclasses.replace(model, **changes)


class Letters:
    """A tokenizer that counts letters."""

    def encode(self, texts):
        return np.array([[len(text), 0] for text in texts], np.int32)


@dataclasses.dataclass
class GaussianPipeline:
    """What `text_to_image` and its kin want."""

    model: ImageModel = dataclasses.field(default_factory=gaussian_model)
    tokenizer: Letters | None = None
    params: np.float32 = np.float32(0)
    settings: SamplingConfig = SamplingConfig(steps=10, clip="none", batch_per_device=2)


def pictures(num, seed=0, side=SIDE, channels=1):
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, channels), dtype=np.uint8)


def left_half():
    """A mask: the left half is to be made."""
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[:, : SIDE // 2] = 255
    return mask
