"""What is minimised. Diffusion: the plain loss and its weightings, the variational bound, the hybrid of both.

L_simple: Ho et al. 2020 (https://arxiv.org/abs/2006.11239), eq. 14. Min-SNR: Hang et al. 2023
(https://arxiv.org/abs/2303.09556). Hybrid: Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), eq. 16.
The terms of the bound are in `jaxdiff.diffusion.likelihood`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion.likelihood import (
    Variance,
    prior_term,
    variational_bound,
    variational_term,
)
from jaxdiff.diffusion.predictions import (
    PREDICTIONS,
    Denoised,
    Denoiser,
    Network,
    check_prediction,
    data_std,
    from_x0_noise,
    input_scale,
    split_variance,
    to_x0_noise,
)
from jaxdiff.diffusion.scheduler import DiscreteSchedule, Schedule, expand_like, q_sample

LOSSES = ("simple", "min_snr", "vlb", "hybrid")
HYBRID_WEIGHT = 0.001  # of the bound, beside L_simple


def squared_error(predicted: Float[Array, " b *s"], target: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Mean squared error of each image."""
    return ((predicted - target) ** 2).mean(tuple(range(1, target.ndim)))


def noise_mse(predicted_noise: Float[Array, "b h w c"], noise: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """L_simple of each image: the mean squared error of the noise (DDPM eq. 14)."""
    return squared_error(predicted_noise, noise)


def x0_weight(
    prediction: str, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"], sigma_data: float = 0.5
) -> Float[Array, "*b"]:
    """How the plain loss on `prediction` weighs the squared error of x0: mse(output) = x0_weight * mse(x0).

    noise: SNR; x0: 1; v: SNR + 1 (where alpha^2 + sigma^2 = 1); velocity: 1 / sigma^2; EDM (alpha = 1): the lambda of
    Karras et al. 2022, 1 / sigma^2 + 1 / sigma_data^2.
    """
    return _sigma_squared_x0_weight(prediction, alpha, sigma, sigma_data) / sigma**2


def min_snr_weight(
    prediction: str,
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
    gamma: float = 5.0,
    sigma_data: float = 0.5,
) -> Float[Array, "*b"]:
    """min(SNR, gamma) / x0_weight: the plain loss times this weighs x0's error by min(SNR, gamma) (Hang et al. 2023).

    Finite for alpha = 0 and sigma = 0. At zero terminal SNR the weight is 0: the last noise level is then not learned.
    """
    if prediction == "noise":
        return jnp.minimum(1.0, gamma * sigma**2 / alpha**2)
    if prediction == "x0":
        return jnp.minimum(alpha**2 / sigma**2, gamma)
    weight = _sigma_squared_x0_weight(prediction, alpha, sigma, sigma_data)
    return jnp.minimum(alpha**2, gamma * sigma**2) / weight


def _sigma_squared_x0_weight(
    prediction: str, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"], sigma_data: float
) -> Float[Array, "*b"]:
    # An error e of x0 at a given x_t is an error -(alpha / sigma) e of the noise; here is sigma times what they make.
    if prediction == "noise":
        return alpha**2
    if prediction == "x0":
        return sigma**2
    if prediction == "v":
        return (alpha**2 + sigma**2) ** 2
    if prediction == "velocity":
        return (alpha + sigma) ** 2
    if prediction == "edm":
        return (sigma / sigma_data) ** 2 + alpha**2
    raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")


def check_loss(loss: str, schedule: Schedule, prediction: str, learned_variance: bool = False) -> None:
    """Raise ValueError where this loss cannot train this parameterisation."""
    check_prediction(prediction, schedule, learned_variance)
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}")
    if loss in ("vlb", "hybrid") and not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"loss {loss!r} needs a DiscreteSchedule, not {type(schedule).__name__}: use 'simple'")
    if loss == "hybrid" and not learned_variance:
        raise ValueError("loss 'hybrid' trains a learned variance: set learned_variance, or use 'simple'")
    if loss in ("simple", "min_snr") and learned_variance:
        raise ValueError(f"loss {loss!r} does not train a learned variance: use 'hybrid' or 'vlb'")


def diffusion_loss(
    network: Network,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    condition: Any,
    keys: Key[Array, " b"],
    *,
    prediction: str,
    loss: str = "simple",
    learned_variance: bool = False,
    sigma_data: float | None = None,
    gamma: float = 5.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Loss of each image at one random time, and metrics; image i's time and noise come from keys[i] alone.

    "simple": mean squared error of the network's output against its target. For noise it is L_simple, for velocity the
    flow-matching loss, for EDM the loss of Karras et al. 2022, eq. 8. "min_snr": the same times `min_snr_weight`.
    "vlb": unbiased estimate of the variational bound in bits/dim (variance learned, else "fixed_small").
    "hybrid": simple + 0.001 vlb, where the bound trains the learned variance only.
    """
    check_loss(loss, schedule, prediction, learned_variance)
    sigma_data = data_std(schedule, sigma_data)
    t, noise = jax.vmap(lambda key: _time_and_noise(schedule, key, x0.shape[1:]))(keys)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = q_sample(schedule, x0, t, noise)
    scale = expand_like(input_scale(prediction, schedule, alpha, sigma, sigma_data), x_t)
    output = network(scale * x_t, schedule.network_time(t), condition).astype(jnp.float32)
    predicted, variance_fraction = split_variance(output, learned_variance)
    mse = squared_error(predicted, from_x0_noise(prediction, x0, noise, alpha, sigma, sigma_data))
    metrics = {"mse": mse, "t": t.astype(jnp.float32)}
    if loss == "simple":
        return mse, metrics
    if loss == "min_snr":
        return mse * min_snr_weight(prediction, alpha, sigma, gamma, sigma_data), metrics
    assert isinstance(schedule, DiscreteSchedule)
    denoised = Denoised(*to_x0_noise(prediction, predicted, x_t, alpha, sigma, sigma_data), variance_fraction)
    if loss == "hybrid":
        denoised = denoised._replace(x0=jax.lax.stop_gradient(denoised.x0))
    variance: Variance = "learned" if learned_variance else "fixed_small"
    # One of the T terms, times T, has the sum's expectation.
    vlb = prior_term(schedule, x0) + schedule.num_steps * variational_term(denoised, schedule, x0, t, variance)
    metrics["vlb"] = vlb
    return (vlb if loss == "vlb" else mse + HYBRID_WEIGHT * vlb), metrics


def _time_and_noise(schedule: Schedule, key: Key[Array, ""], shape: tuple[int, ...]) -> tuple[Array, Array]:
    time_key, noise_key = jax.random.split(key)
    return schedule.sample_time(time_key), jax.random.normal(noise_key, shape)


def elbo(
    denoise: Denoiser,
    schedule: DiscreteSchedule,
    x0: Float[Array, "b h w c"],
    key: Key[Array, "*b"],
    variance: Variance = "fixed_small",
) -> Float[Array, " b"]:
    """Negative evidence lower bound of each image in bits/dim, at least -log2 p(x0) / D; T network calls."""
    return variational_bound(denoise, schedule, x0, key, variance).total
