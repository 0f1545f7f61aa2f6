"""Samplers: from noise x_T to x_0 by a denoiser, each one `lax.scan`.

A step goes from t down to s. All samplers are written in (alpha, sigma) of x_t = alpha_t x0 + sigma_t noise, so they
serve discrete, flow-matching and EDM schedules alike, also where these start at alpha = 0 (flow at t = 1, zero terminal
SNR) and end at sigma = 0, where x_0 is exactly the denoiser's x0.

`timesteps` [N + 1] descend in the schedule's own time (see timesteps.py). `key` is one key, or one key per image: then
image i is drawn from keys[i] alone, whatever the batch. Step number i uses fold_in(key, i), so skipped steps shift
nothing; the initial noise uses another fold of the same key. `start` (may be traced): the first `start` steps are
skipped and cost nothing; x_T is then taken as x at timesteps[start].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxdiff.diffusion.predictions import Denoised, Denoiser, learned_log_variance
from jaxdiff.diffusion.scheduler import Schedule, posterior, transition

Images = Float[Array, "b h w c"]
Keys = Key[Array, ""] | Key[Array, " b"] | None
Timesteps = Shaped[Array, " n+1"] | Shaped[np.ndarray, " n+1"]
Scalar = Float[Array, ""] | float
Carry = TypeVar("Carry")

VARIANCES = ("fixed_small", "fixed_large", "learned")
INITIAL_NOISE = 2**31 - 1  # folded into the key for x_T: no step has this number


class Sampler(Protocol):
    """What every sampler answers to; some take options of their own besides."""

    def __call__(
        self,
        denoise: Denoiser,
        schedule: Schedule,
        x_T: Images,
        timesteps: Timesteps,
        key: Keys,
        *,
        start: Int[Array, ""] | int = 0,
    ) -> Images:
        """x_0 (x at timesteps[-1]) from x_T."""


def initial_noise(schedule: Schedule, key: Keys, shape: tuple[int, ...]) -> Images:
    """x_T ~ N(0, prior_std^2), from the same key(s) that the sampler gets."""
    return schedule.prior_std * _normal(key, INITIAL_NOISE, shape, jnp.float32)


def ddpm(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    variance: str = "fixed_small",
) -> Images:
    """Ancestral sampling (DDPM, Ho et al. 2020, algorithm 2), on any subset of the noise levels.

    `variance` of p(x_s | x_t): "fixed_small", the posterior's (beta-tilde); "fixed_large", the forward kernel's (beta);
    or "learned", between the two by `variance_fraction` (improved DDPM, eq. 15). The step to sigma = 0 adds no noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: use one of {', '.join(VARIANCES)}")
    t, s = _pairs(timesteps)
    small, large = posterior(schedule, s, t), transition(schedule, s, t).variance
    noisy = schedule.sigma(s) > 0
    # Where s is clean nothing is drawn, and the logarithm of a zero variance must not become NaN.
    log_small = jnp.log(jnp.where(noisy, small.variance, large))

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, x0_weight, x_t_weight, log_small, log_large, noisy = now
        denoised = denoise(x, _batch(t, x))
        log_variance = log_small if variance == "fixed_small" else log_large
        if variance == "learned":
            log_variance = learned_log_variance(_variance_fraction(denoised), log_large, log_small)
        std = jnp.where(noisy, jnp.exp(log_variance / 2), 0.0)
        return x0_weight * denoised.x0 + x_t_weight * x + std * _normal(key, index, x.shape, x.dtype)

    coefficients = (t, small.x0_weight, small.x_t_weight, log_small, jnp.log(large), noisy)
    return _scan_steps(step, _at_least_float32(x_T), coefficients, start)


def ddim(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    eta: Scalar = 0.0,
) -> Images:
    """Non-Markovian sampling (DDIM, Song et al. 2020, eq. 12, 16): deterministic at eta = 0, ancestral at eta = 1."""
    t, s = _pairs(timesteps)
    deterministic = isinstance(eta, int | float) and eta == 0
    sigma_s = schedule.sigma(s)
    # No more noise than sigma_s^2 fits into x_s, however large eta.
    variance = jnp.minimum(jnp.asarray(eta) ** 2 * posterior(schedule, s, t).variance, sigma_s**2)

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, alpha_s, direction, std = now
        denoised = denoise(x, _batch(t, x))
        x = alpha_s * denoised.x0 + direction * denoised.noise
        return x if deterministic else x + std * _normal(key, index, x.shape, x.dtype)

    coefficients = (t, schedule.alpha(s), jnp.sqrt(sigma_s**2 - variance), jnp.sqrt(variance))
    return _scan_steps(step, _at_least_float32(x_T), coefficients, start)


def euler(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
) -> Images:
    """Euler's method on the probability-flow ODE d(x / alpha) = noise d(sigma / alpha) (Karras et al. 2022, eq. 4).

    Multiplied by alpha_s the step reads x_s = alpha_s x0 + sigma_s noise: DDIM at eta = 0, and Euler in t for flow.
    """
    return ddim(denoise, schedule, x_T, timesteps, key, start=start)


def euler_ancestral(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    eta: Scalar = 1.0,
) -> Images:
    """Euler down to sigma_down, then fresh noise of sigma_up (Crowson's k-diffusion), in x / alpha.

    With r = sigma / alpha: r_up = eta r_s sqrt(1 - r_s^2 / r_t^2), r_down^2 = r_s^2 - r_up^2. Multiplied by alpha_s
    that is DDIM's step with the same eta.
    """
    return ddim(denoise, schedule, x_T, timesteps, key, start=start, eta=eta)


def heun(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
) -> Images:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): N steps to sigma = 0 denoise 2 N - 1 times.

    The trapezoid rule for x / w along sigma / w, with w = alpha (that of EDM), or w = alpha + sigma on a schedule that
    reaches alpha = 0 (that is Heun in t for flow). In x_s both amount to Euler's step plus
    (w_s / w_t) (sigma_t alpha_s / sigma_s - alpha_t) (x0(x_s) - x0(x_t)) / 2.
    """
    t, s = _pairs(timesteps)
    alpha_t, alpha_s, sigma_t, sigma_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t), schedule.sigma(s)
    w_t, w_s = (alpha_t + sigma_t, alpha_s + sigma_s) if schedule.zero_terminal_snr else (alpha_t, alpha_s)
    clean = sigma_s == 0  # the last step stays Euler's
    correction = w_s / w_t * (sigma_t * alpha_s / jnp.where(clean, 1.0, sigma_s) - alpha_t) / 2

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, s, alpha_s, sigma_s, correction = now
        denoised = denoise(x, _batch(t, x))
        x = alpha_s * denoised.x0 + sigma_s * denoised.noise

        def correct(x: Images) -> Images:
            return x + correction * (denoise(x, _batch(s, x)).x0 - denoised.x0)

        return lax.cond(sigma_s > 0, correct, lambda x: x, x)

    return _scan_steps(step, _at_least_float32(x_T), (t, s, alpha_s, sigma_s, correction), start)


def dpmpp_2m(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
) -> Images:
    """DPM-Solver++(2M), second-order multistep (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2).

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t and r = h_previous / h, the step is DDIM's plus
    (alpha_s - sigma_s alpha_t / sigma_t) (x0 - x0_previous) / (2 r). The first step and the one to sigma = 0 are of
    first order.
    """
    t, s = _pairs(timesteps)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
    first = jnp.arange(len(t)) <= start
    # After a step from alpha = 0, h_previous is infinite and the correction 0: first order there too.
    inverse_r = jnp.where(first | (sigma_s == 0), 0.0, h / jnp.roll(h, 1))
    correction = (alpha_s - sigma_s * schedule.alpha(t) / schedule.sigma(t)) * inverse_r / 2

    def step(carry: tuple[Images, Images], index: Array, now: tuple[Array, ...]) -> tuple[Images, Images]:
        x, x0_previous = carry
        t, alpha_s, sigma_s, correction = now
        x0, noise, _ = denoise(x, _batch(t, x))
        x = alpha_s * x0 + sigma_s * noise + correction * (x0 - x0_previous)
        return x, x0

    x_T = _at_least_float32(x_T)
    return _scan_steps(step, (x_T, jnp.zeros_like(x_T)), (t, alpha_s, sigma_s, correction), start)[0]


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
}


def _scan_steps(
    step: Callable[[Carry, Array, tuple[Array, ...]], Carry],
    carry: Carry,
    coefficients: tuple[Array, ...],
    start: Int[Array, ""] | int,
) -> Carry:
    """Fold step(carry, index, coefficients at index) over index = start .. N - 1; `cond` makes skipped steps free."""

    def body(carry: Carry, now: tuple[Array, tuple[Array, ...]]) -> tuple[Carry, None]:
        def run(carry: Carry) -> Carry:
            # A denoiser may answer in another precision; the state keeps its own.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), step(carry, *now), carry)

        return lax.cond(now[0] >= start, run, lambda carry: carry, carry), None

    return lax.scan(body, carry, (jnp.arange(len(coefficients[0])), coefficients))[0]


def _pairs(timesteps: Timesteps) -> tuple[Array, Array]:
    """(t, s) of each step."""
    timesteps = jnp.asarray(timesteps)
    if timesteps.ndim != 1 or len(timesteps) < 2:
        raise ValueError(f"timesteps must be a vector of at least 2 times, got shape {timesteps.shape}")
    return timesteps[:-1], timesteps[1:]


def _batch(t: Array, x: Images) -> Shaped[Array, " b"]:
    return jnp.full(x.shape[:1], t)


def _at_least_float32(x: Images) -> Images:
    """At least float32: half precision is the network's affair, the sum over steps is not."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal(key: Keys, index: Array | int, shape: tuple[int, ...], dtype: Any) -> Images:
    """Standard normal noise of one step; with a batch of keys each image's comes from its own key."""
    if key is None:
        raise ValueError("this sampler draws noise: give it a key, or one key per image")
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), shape, dtype)
    if key.shape != shape[:1]:
        raise ValueError(f"{shape[0]} images need one key or {shape[0]} keys, got keys of shape {key.shape}")
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), shape[1:], dtype))(key)


def _variance_fraction(denoised: Denoised) -> Images:
    if denoised.variance_fraction is None:
        raise ValueError("variance 'learned' needs a network with learned variance: use 'fixed_small' or 'fixed_large'")
    return denoised.variance_fraction
