"""What a network predicts, turned into (x0, noise) and back.

With x_t = alpha x0 + sigma noise, one of x0, noise or a combination of them determines the others. The combinations are
v = alpha noise - sigma x0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512), the velocity of flow matching
noise - x0 = dx_t/dt, and EDM's preconditioned output (Karras et al. 2022, eq. 7 and table 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxdiff.diffusion.scheduler import DiscreteSchedule, EDMSchedule, FlowSchedule, Schedule, expand_like

PREDICTIONS = ("noise", "x0", "v", "velocity", "edm")

# network(x, network_time, condition) -> output with as many channels as x, or twice as many with learned variance
Network = Callable[[Float[Array, "b h w c"], Float[Array, " b"], Any], Float[Array, "b h w c2"]]


class Denoised(NamedTuple):
    """A denoiser's answer; `variance_fraction` (in [0, 1], None unless learned) is the v of improved DDPM eq. 15."""

    x0: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    variance_fraction: Float[Array, "b h w c"] | None = None


class Denoiser(Protocol):
    """Estimates E[x0 | x_t] and the noise that goes with it; t [b] is in the schedule's own time."""

    def __call__(self, x_t: Float[Array, "b h w c"], t: Shaped[Array, " b"], condition: Any = None) -> Denoised:
        """Denoise a batch."""


def check_prediction(prediction: str, schedule: Schedule, learned_variance: bool = False) -> None:
    """Raise ValueError where this prediction means nothing on this schedule."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")
    if prediction == "noise" and schedule.zero_terminal_snr:
        raise ValueError(
            "prediction 'noise' cannot tell x0 where alpha = 0, which this schedule reaches "
            "(zero terminal SNR or flow): use 'v', 'x0', 'velocity' (flow) or 'edm'"
        )
    if prediction == "velocity" and not isinstance(schedule, FlowSchedule):
        raise ValueError(f"prediction 'velocity' belongs to FlowSchedule, not {type(schedule).__name__}: use 'v'")
    if learned_variance and not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"learned variance needs a DiscreteSchedule, not {type(schedule).__name__}")


def to_x0_noise(
    prediction: str,
    output: Float[Array, "b h w c"],
    x_t: Float[Array, "b h w c"],
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
    sigma_data: float = 0.5,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """(x0, noise) from a network's output; alpha and sigma are scalars or one per image.

    "noise" needs alpha > 0. "x0" at sigma = 0, where nothing is known of the noise, answers noise = 0. "velocity"
    supposes flow matching's alpha + sigma = 1. The others hold for every alpha and sigma.
    """
    alpha, sigma = expand_like(alpha, x_t), expand_like(sigma, x_t)
    if prediction == "noise":
        return (x_t - sigma * output) / alpha, output
    if prediction == "x0":
        clean = sigma == 0
        return output, jnp.where(clean, 0.0, (x_t - alpha * output) / jnp.where(clean, 1.0, sigma))
    if prediction == "v":
        norm = alpha**2 + sigma**2  # 1 in a variance-preserving process
        return (alpha * x_t - sigma * output) / norm, (sigma * x_t + alpha * output) / norm
    if prediction == "velocity":
        return x_t - sigma * output, x_t + alpha * output
    if prediction == "edm":
        # D = c_skip x + c_out F in x = x_t / alpha at noise level sigma / alpha, multiplied out: finite at alpha = 0.
        variance = sigma**2 + (alpha * sigma_data) ** 2
        scaled = sigma_data / jnp.sqrt(variance) * output
        return alpha * sigma_data**2 / variance * x_t + sigma * scaled, sigma / variance * x_t - alpha * scaled
    raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")


def from_x0_noise(
    prediction: str,
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
    sigma_data: float = 0.5,
) -> Float[Array, "b h w c"]:
    """The output a perfect network would give (the training target): the inverse of `to_x0_noise`."""
    alpha, sigma = expand_like(alpha, x0), expand_like(sigma, x0)
    if prediction == "noise":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * noise - sigma * x0
    if prediction == "velocity":
        return noise - x0
    if prediction == "edm":
        # F = (x0 - c_skip x) / c_out, multiplied out so that sigma = 0 is finite.
        std = jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
        return (sigma * x0 - alpha * sigma_data**2 * noise) / (std * sigma_data)
    raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")


def input_scale(
    prediction: str, schedule: Schedule, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"], sigma_data: float
) -> Float[Array, "*b"]:
    """What x_t is multiplied by at the network's door: c_in of EDM (and of all EDM schedules), 1 elsewhere."""
    if prediction == "edm" or isinstance(schedule, EDMSchedule):
        return 1 / jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
    return jnp.ones_like(alpha)


def data_std(schedule: Schedule, sigma_data: float | None = None) -> float:
    """Standard deviation of the data for EDM's preconditioning: as given, else the schedule's own, else 0.5."""
    if sigma_data is not None:
        return sigma_data
    return schedule.sigma_data if isinstance(schedule, EDMSchedule) else 0.5


def split_variance(
    output: Float[Array, "b h w c2"], learned_variance: bool
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"] | None]:
    """(prediction, variance fraction): with learned variance the second half of the channels, mapped by (o + 1) / 2."""
    if not learned_variance:
        return output, None
    prediction, o = jnp.split(output, 2, axis=-1)
    return prediction, (o + 1) / 2


def learned_log_variance(
    variance_fraction: Float[Array, "*shape"], log_beta: Float[Array, "*shape"], log_beta_tilde: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Logarithm of the variance: v log beta_t + (1 - v) log beta-tilde_t (improved DDPM eq. 15)."""
    return variance_fraction * log_beta + (1 - variance_fraction) * log_beta_tilde


def make_denoiser(
    network: Network,
    schedule: Schedule,
    prediction: str,
    learned_variance: bool = False,
    sigma_data: float | None = None,
) -> Denoiser:
    """The network as a denoiser: scales its input, tells it the time, turns its output into x0 and noise (float32).

    `sigma_data` (EDM's preconditioning) defaults to the EDM schedule's own, 0.5 for other schedules.
    """
    check_prediction(prediction, schedule, learned_variance)
    std = data_std(schedule, sigma_data)

    def denoise(x_t: Float[Array, "b h w c"], t: Shaped[Array, " b"], condition: Any = None) -> Denoised:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scale = expand_like(input_scale(prediction, schedule, alpha, sigma, std), x_t)
        output = network(scale * x_t, schedule.network_time(t), condition).astype(jnp.float32)
        if output.shape[-1] != x_t.shape[-1] * (1 + learned_variance):
            raise ValueError(
                f"the network answered {output.shape[-1]} channels for {x_t.shape[-1]}: "
                f"with learned_variance={learned_variance} it must answer {x_t.shape[-1] * (1 + learned_variance)}"
            )
        predicted, variance_fraction = split_variance(output, learned_variance)
        x0, noise = to_x0_noise(prediction, predicted, x_t, alpha, sigma, std)
        return Denoised(x0, noise, variance_fraction)

    return denoise
