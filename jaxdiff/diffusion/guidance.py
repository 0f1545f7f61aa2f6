"""Guidance and thresholding: functions from a denoiser to a denoiser.

All keep alpha x0 + sigma noise = x_t, so every sampler may follow. They nest in any order; scales, quantiles and
interval ends may be traced, so changing them compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxdiff.diffusion.predictions import Denoised, Denoiser, data_std, from_x0_noise, to_x0_noise
from jaxdiff.diffusion.scheduler import Schedule, expand_like

Images = Float[Array, "b h w c"]
Scalar = Float[Array, ""] | float


def bind_condition(denoise: Denoiser, condition: Any) -> Denoiser:
    """The denoiser with its condition fixed, as samplers want it."""
    bound = condition

    def bound_denoise(x_t: Array, t: Array, condition: Any = None) -> Denoised:
        return denoise(x_t, t, bound if condition is None else condition)

    return bound_denoise


def classifier_free_guidance(
    denoise: Denoiser,
    condition: Any,
    null_condition: Any,
    scale: Float[Array, " b"] | Scalar,
    interval: tuple[Scalar, Scalar] | None = None,
    rescale: Scalar = 0.0,
    *,
    schedule: Schedule | None = None,
    prediction: str = "noise",
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + scale * (conditional - unconditional).

    `condition` and `null_condition` are pytrees of arrays [b ...], bound here; one call of `denoise` serves both.
    `scale`, a number or one per image: 1 is the conditional model, 0 the unconditional one. A learned variance is the
    conditional model's.

    `interval` = (low, high): guide only where low < t <= high, in the schedule's time (Kynkaanniemi et al. 2024,
    https://arxiv.org/abs/2404.07724); elsewhere the conditional model alone is evaluated, on the undoubled batch.

    `rescale` in [0, 1]: how far to bring the standard deviation of each image's guided prediction back to that of the
    conditional one (Lin et al. 2024, https://arxiv.org/abs/2305.08891, section 3.4). It works in the space of the
    network's `prediction`, and needs the `schedule`.
    """
    _check_conditions(condition, null_condition)
    rescaling = not (isinstance(rescale, int | float) and rescale == 0)
    if rescaling and schedule is None:
        raise ValueError("guidance rescale works on the network's prediction: pass schedule= and prediction=")
    bound = condition
    both_conditions = jax.tree.map(_in_turn, condition, null_condition)

    def guide(x_t: Images, t: Shaped[Array, " b"], scale: Array) -> Denoised:
        both = denoise(_in_turn(x_t, x_t), _in_turn(t, t), both_conditions)
        conditional, unconditional = _apart(both)
        # From the conditional side, so that scale 1 is exactly it.
        more = expand_like(scale, x_t) - 1
        x0 = conditional.x0 + more * (conditional.x0 - unconditional.x0)
        noise = conditional.noise + more * (conditional.noise - unconditional.noise)
        guided = conditional._replace(x0=x0, noise=noise)
        if rescaling and schedule is not None:
            guided = _rescale(guided, conditional, x_t, t, rescale, schedule, prediction)
        return guided

    def guided_denoise(x_t: Images, t: Shaped[Array, " b"], condition: Any = None) -> Denoised:
        if condition is not None:
            raise ValueError("guidance has bound its condition already: call the guided denoiser without one")
        if interval is None:
            return guide(x_t, t, jnp.asarray(scale))
        inside = (interval[0] < t) & (t <= interval[1])
        return lax.cond(
            jnp.any(inside),
            lambda: guide(x_t, t, jnp.where(inside, jnp.asarray(scale), 1.0)),
            lambda: denoise(x_t, t, bound),
        )

    return guided_denoise


def clip_x0(denoise: Denoiser, schedule: Schedule) -> Denoiser:
    """Clip x0 to [-1, 1], the range of images (DDPM's code), and move the noise accordingly."""
    return change_x0(denoise, schedule, lambda x0: jnp.clip(x0, -1.0, 1.0))


def dynamic_threshold(denoise: Denoiser, schedule: Schedule, quantile: Scalar = 0.995) -> Denoiser:
    """Clip x0 to [-a, a] and divide by a = max(1, quantile of the image's |x0|) (Imagen, Saharia et al. 2022, 2.3)."""

    def threshold(x0: Images) -> Images:
        largest = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), quantile, axis=1)
        largest = expand_like(jnp.maximum(largest, 1.0), x0)
        return jnp.clip(x0, -largest, largest) / largest

    return change_x0(denoise, schedule, threshold)


def change_x0(
    denoise: Denoiser, schedule: Schedule, change: Callable[[Images], Images], *, keep_noise: bool = False
) -> Denoiser:
    """The denoiser with another x0 and the noise that makes up for it: alpha x0 + sigma noise stays x_t.

    `keep_noise`: only x0 is changed, and that sum is no longer x_t (diffusers' DDIM).
    """

    def changed(x_t: Images, t: Shaped[Array, " b"], condition: Any = None) -> Denoised:
        denoised = denoise(x_t, t, condition)
        x0 = change(denoised.x0)
        if keep_noise:
            return denoised._replace(x0=x0)
        alpha, sigma = expand_like(schedule.alpha(t), x_t), expand_like(schedule.sigma(t), x_t)
        # By the difference: pixels left alone keep their noise to the bit, however small sigma. At 0 any noise will do.
        ratio = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1.0), 0.0)
        return denoised._replace(x0=x0, noise=denoised.noise + ratio * (denoised.x0 - x0))

    return changed


def _rescale(
    guided: Denoised,
    conditional: Denoised,
    x_t: Images,
    t: Shaped[Array, " b"],
    rescale: Scalar,
    schedule: Schedule,
    prediction: str,
) -> Denoised:
    """Lin et al. 2024, eq. 14 to 16, on what the network predicts."""
    alpha, sigma, sigma_data = schedule.alpha(t), schedule.sigma(t), data_std(schedule)
    output = from_x0_noise(prediction, guided.x0, guided.noise, alpha, sigma, sigma_data)
    target = from_x0_noise(prediction, conditional.x0, conditional.noise, alpha, sigma, sigma_data)
    axes = tuple(range(1, x_t.ndim))
    std, target_std = jnp.std(output, axes, keepdims=True), jnp.std(target, axes, keepdims=True)
    factor = rescale * jnp.where(std > 0, target_std / jnp.where(std > 0, std, 1.0), 1.0) + (1 - rescale)
    x0, noise = to_x0_noise(prediction, factor * output, x_t, alpha, sigma, sigma_data)
    return guided._replace(x0=x0, noise=noise)


def _in_turn(a: Array, b: Array) -> Array:
    """a0, b0, a1, b1, ...: where a batch is split over devices, both of an image stay on its own, and nothing travels."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def _apart(both: Denoised) -> tuple[Denoised, Denoised]:
    """The inverse of `_in_turn`."""
    pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), both)
    return jax.tree.map(lambda x: x[:, 0], pairs), jax.tree.map(lambda x: x[:, 1], pairs)


def _check_conditions(condition: Any, null_condition: Any) -> None:
    shapes, null_shapes = (jax.tree.map(jnp.shape, c) for c in (condition, null_condition))
    if shapes != null_shapes:
        raise ValueError(f"condition and null_condition must have the same shapes, got {shapes} and {null_shapes}")
