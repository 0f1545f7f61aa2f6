"""Samplers: from noise x_T to x_0 by a denoiser, each one `lax.scan`.

A step goes from t down to s. All samplers are written in (alpha, sigma) of x_t = alpha_t x0 + sigma_t noise, so they
serve discrete, flow-matching and EDM schedules alike, also where these start at alpha = 0 (flow at t = 1, zero terminal
SNR) and end at sigma = 0, where x_0 is exactly the denoiser's x0.

`timesteps` [N + 1] descend in the schedule's own time (see timesteps.py); as [N, 2] they are (t, s) of each step, for
rules whose steps do not end where the next begins. `key` is one key, or one key per image: then
image i is drawn from keys[i] alone, whatever the batch. Step number i uses fold_in(key, i), so skipped steps shift
nothing; the initial noise uses another fold of the same key. `start` (may be traced): the first `start` steps are
skipped and cost nothing; x_T is then taken as x at timesteps[start]. `constrain`: see `Constrain`.
"""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxdiff.diffusion.predictions import Denoised, Denoiser, learned_log_variance
from jaxdiff.diffusion.scheduler import EDMSchedule, Schedule, posterior, transition
from jaxdiff.diffusion.steps import (
    INITIAL_NOISE,
    Constrain,
    Images,
    Keys,
    Timesteps,
    arrival_times,
    at_least_float32,
    from_step,
    per_image,
    scan_steps,
    step_noise,
    step_pairs,
)

Scalar = Float[Array, ""] | float
# Weights of the latest outputs, newest first, in network call number 0, 1, 2, 3 and all later ones of PLMS.
PLMS_WEIGHTS = (
    (1, 0, 0, 0),
    (1 / 2, 1 / 2, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
AVERAGES = ("noise", "velocity", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned")


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
        constrain: Constrain | None = None,
    ) -> Images:
        """x_0 (x at timesteps[-1]) from x_T."""


def initial_noise(schedule: Schedule, key: Keys, shape: tuple[int, ...]) -> Images:
    """x_T ~ N(0, prior_std^2), from the same key(s) that the sampler gets."""
    return schedule.prior_std * step_noise(key, INITIAL_NOISE, shape, jnp.float32)


def ddpm(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
    variance: str = "fixed_small",
    noise_at_end: bool = False,
) -> Images:
    """Ancestral sampling (DDPM, Ho et al. 2020, algorithm 2), on any subset of the noise levels.

    `variance` of p(x_s | x_t): "fixed_small", the posterior's (beta-tilde); "fixed_large", the forward kernel's (beta);
    or "learned", between the two by `variance_fraction` (improved DDPM, eq. 15). The step to sigma = 0 adds no noise,
    unless `noise_at_end`: then "fixed_large" does, except from the first noise level.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: use one of {', '.join(VARIANCES)}")
    t, s = step_pairs(timesteps)
    small, large = posterior(schedule, s, t), transition(schedule, s, t).variance
    noisy = (schedule.sigma(s) > 0) | (noise_at_end & (variance == "fixed_large") & (t > 1))
    # Where s is clean nothing is drawn, and the logarithm of a zero variance must not become NaN.
    log_small = jnp.log(jnp.where(noisy, small.variance, large))

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, x0_weight, x_t_weight, log_small, log_large, noisy = now
        denoised = denoise(x, per_image(t, x))
        log_variance = log_small if variance == "fixed_small" else log_large
        if variance == "learned":
            log_variance = learned_log_variance(_variance_fraction(denoised), log_large, log_small)
        std = jnp.where(noisy, jnp.exp(log_variance / 2), 0.0)
        return x0_weight * denoised.x0 + x_t_weight * x + std * step_noise(key, index, x.shape, x.dtype)

    coefficients = (t, small.x0_weight, small.x_t_weight, log_small, jnp.log(large), noisy)
    return scan_steps(
        step, at_least_float32(x_T), coefficients, arrival_times(t, s), from_step(start, len(t)), constrain
    )


def ddim(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
    eta: Scalar = 0.0,
) -> Images:
    """Non-Markovian sampling (DDIM, Song et al. 2020, eq. 12, 16): deterministic at eta = 0, ancestral at eta = 1."""
    t, s = step_pairs(timesteps)
    deterministic = isinstance(eta, int | float) and eta == 0
    sigma_s = schedule.sigma(s)
    # No more noise than sigma_s^2 fits into x_s, however large eta.
    variance = jnp.minimum(jnp.asarray(eta) ** 2 * posterior(schedule, s, t).variance, sigma_s**2)

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, alpha_s, direction, std = now
        denoised = denoise(x, per_image(t, x))
        x = alpha_s * denoised.x0 + direction * denoised.noise
        return x if deterministic else x + std * step_noise(key, index, x.shape, x.dtype)

    coefficients = (t, schedule.alpha(s), jnp.sqrt(sigma_s**2 - variance), jnp.sqrt(variance))
    return scan_steps(
        step, at_least_float32(x_T), coefficients, arrival_times(t, s), from_step(start, len(t)), constrain
    )


def euler(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
) -> Images:
    """Euler's method on the probability-flow ODE d(x / alpha) = noise d(sigma / alpha) (Karras et al. 2022, eq. 4).

    Multiplied by alpha_s the step reads x_s = alpha_s x0 + sigma_s noise: DDIM at eta = 0, and Euler in t for flow.
    """
    return ddim(denoise, schedule, x_T, timesteps, key, start=start, constrain=constrain)


def euler_ancestral(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
    eta: Scalar = 1.0,
) -> Images:
    """Euler down to sigma_down, then fresh noise of sigma_up (Crowson's k-diffusion), in x / alpha.

    With r = sigma / alpha: r_up = eta r_s sqrt(1 - r_s^2 / r_t^2), r_down^2 = r_s^2 - r_up^2. Multiplied by alpha_s
    that is DDIM's step with the same eta.
    """
    return ddim(denoise, schedule, x_T, timesteps, key, start=start, constrain=constrain, eta=eta)


def heun(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
) -> Images:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): N steps to sigma = 0 denoise 2 N - 1 times.

    The trapezoid rule for x / w along sigma / w, with w = alpha (that of EDM), or w = alpha + sigma on a schedule that
    reaches alpha = 0 (that is Heun in t for flow). In x_s both amount to Euler's step plus
    (w_s / w_t) (sigma_t alpha_s / sigma_s - alpha_t) (x0(x_s) - x0(x_t)) / 2.
    """
    t, s = step_pairs(timesteps)
    alpha_t, alpha_s, sigma_t, sigma_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t), schedule.sigma(s)
    w_t, w_s = (alpha_t + sigma_t, alpha_s + sigma_s) if schedule.zero_terminal_snr else (alpha_t, alpha_s)
    clean = sigma_s == 0  # the last step stays Euler's
    correction = w_s / w_t * (sigma_t * alpha_s / jnp.where(clean, 1.0, sigma_s) - alpha_t) / 2

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, s, alpha_s, sigma_s, correction = now
        denoised = denoise(x, per_image(t, x))
        x = alpha_s * denoised.x0 + sigma_s * denoised.noise

        def correct(x: Images) -> Images:
            seen = x if constrain is None else constrain(x, s)
            return x + correction * (denoise(seen, per_image(s, x)).x0 - denoised.x0)

        return lax.cond(sigma_s > 0, correct, lambda x: x, x)

    return scan_steps(
        step,
        at_least_float32(x_T),
        (t, s, alpha_s, sigma_s, correction),
        arrival_times(t, s),
        from_step(start, len(t)),
        constrain,
    )


def dpmpp_2m(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
    lower_order_final: bool = False,
) -> Images:
    """DPM-Solver++(2M), second-order multistep (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2).

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t and r = h_previous / h, the step is DDIM's plus
    (alpha_s - sigma_s alpha_t / sigma_t) (x0 - x0_previous) / (2 r). The first step and the one to sigma = 0 (with
    `lower_order_final` the last wherever it ends) are of first order.
    """
    t, s = step_pairs(timesteps)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
    first = jnp.arange(len(t)) <= start
    # After a step from alpha = 0, h_previous is infinite and the correction 0: first order there too.
    last = (jnp.arange(len(t)) == len(t) - 1) & lower_order_final
    inverse_r = jnp.where(first | last | (sigma_s == 0), 0.0, h / jnp.roll(h, 1))
    correction = (alpha_s - sigma_s * schedule.alpha(t) / schedule.sigma(t)) * inverse_r / 2

    def step(carry: tuple[Images, Images], index: Array, now: tuple[Array, ...]) -> tuple[Images, Images]:
        x, x0_previous = carry
        t, alpha_s, sigma_s, correction = now
        x0, noise, _ = denoise(x, per_image(t, x))
        x = alpha_s * x0 + sigma_s * noise + correction * (x0 - x0_previous)
        return x, x0

    x_T = at_least_float32(x_T)
    carry = (x_T, jnp.zeros_like(x_T))
    return scan_steps(
        step, carry, (t, alpha_s, sigma_s, correction), arrival_times(t, s), from_step(start, len(t)), constrain
    )[0]


def pndm(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys = None,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
    average: str | None = None,
    fixed_repeat: bool = False,
) -> Images:
    """PLMS, the linear multistep method of PNDM (Liu et al. 2022, https://arxiv.org/abs/2202.09778, eq. 9, 12).

    N steps denoise N + 1 times: the first step is made twice, by the noise at its start and then by the mean of those at
    its ends; the second and third are Adams-Bashforth of order 2 and 3, the others of order 4. These weights are meant
    for times evenly spaced; as the steps in sigma / alpha are not, the method is of order 2. `average`: what they are
    applied to: "noise", or, where alpha may be 0, "velocity" (noise - x0; by default only there), or "v" (as diffusers
    does for networks that predict it; order 1). `fixed_repeat`: wherever it starts, row i of the N + 1 network calls
    looks at timesteps[i - (i > 1)], as diffusers' image to image does; x_T is then taken at that time of row `start`.
    """
    average = average or ("velocity" if schedule.zero_terminal_snr else "noise")
    if average not in AVERAGES:
        raise ValueError(f"unknown average {average!r}: use one of {', '.join(AVERAGES)}")
    t, s = step_pairs(timesteps)
    num, row = len(t), jnp.arange(len(t) + 1)
    count = row - start  # network calls made before
    second = count == 1
    index = row - ((row if fixed_repeat else count) > 1)
    now, after = jnp.append(t, s[-1])[index], jnp.append(s, s[-1])[index]
    # The step made again is the one that leads to `now`; where steps are not joined all are as long as the first.
    before = now + (t[0] - s[0]) if jnp.ndim(timesteps) == 2 else jnp.append(t, s[-1])[jnp.maximum(index - 1, 0)]
    begin, end = jnp.where(second, before, now), jnp.where(second, now, after)
    alpha, sigma, alpha_end, sigma_end = (f(u) for u in (now, end) for f in (schedule.alpha, schedule.sigma))
    x_weight, output_weight = _transfer(schedule, begin, end, average)

    def step(carry: tuple[Images, ...], row: Array, coefficients: tuple[Array, ...]) -> tuple[Images, ...]:
        x, x_first, *past = carry
        count, now, alpha, sigma, alpha_end, sigma_end, x_weight, output_weight = coefficients
        x0, noise, _ = denoise(x, per_image(now, x))
        output = noise if average == "noise" else noise - x0
        if average == "v":
            output = (alpha * noise - sigma * x0) / jnp.sqrt(alpha**2 + sigma**2)
        weights = jnp.asarray(PLMS_WEIGHTS, x.dtype)[jnp.clip(count, 0, 4)]
        mean = sum((w * o for w, o in zip(weights[1:], past, strict=True)), weights[0] * output)
        again = count == 1
        # DDIM's step and what the mean adds to it: without differences of large numbers where alpha is small.
        ddim_step = alpha_end * x0 + sigma_end * noise + output_weight * (mean - output)
        x_next = jnp.where(again, x_weight * x_first + output_weight * mean, ddim_step)
        # The second answer belongs to a guess of x at this time: it is used once and not remembered.
        past = [jnp.where(again, old, new) for old, new in zip(past, [output, *past[:-1]], strict=True)]
        return x_next, jnp.where(count == 0, x, x_first), *past

    x_T = at_least_float32(x_T)
    active = (row >= start) & (index < num) & (start < num)
    coefficients = (count, now, alpha, sigma, alpha_end, sigma_end, x_weight, output_weight)
    carry = (x_T, *[jnp.zeros_like(x_T)] * 4)
    return scan_steps(step, carry, coefficients, arrival_times(now, s), active, constrain)[0]


def lcm(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: Images,
    timesteps: Timesteps,
    key: Keys,
    *,
    start: Int[Array, ""] | int = 0,
    constrain: Constrain | None = None,
    timestep_scaling: float = 10.0,
) -> Images:
    """Multistep consistency sampling (Luo et al. 2023, https://arxiv.org/abs/2310.04378, algorithm 3).

    Each step goes to clean data by f = c_skip x_t + c_out x0 and from there, with fresh noise, to x_s. For networks
    distilled to be consistent: others lose detail. c_skip and c_out are functions of the network's time.
    """
    if isinstance(schedule, EDMSchedule):
        raise ValueError("sampler 'lcm' needs a network time that is 0 on clean data, which EDMSchedule's is not")
    t, s = step_pairs(timesteps)
    scaled, sigma_data = timestep_scaling * schedule.network_time(t), 0.5
    norm = scaled**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / norm, scaled / jnp.sqrt(norm)

    def step(x: Images, index: Array, now: tuple[Array, ...]) -> Images:
        t, c_skip, c_out, alpha_s, sigma_s = now
        clean = c_skip * x + c_out * denoise(x, per_image(t, x)).x0
        return alpha_s * clean + sigma_s * step_noise(key, index, x.shape, x.dtype)

    coefficients = (t, c_skip, c_out, schedule.alpha(s), schedule.sigma(s))
    return scan_steps(
        step, at_least_float32(x_T), coefficients, arrival_times(t, s), from_step(start, len(t)), constrain
    )


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
    "pndm": pndm,
    "lcm": lcm,
}


def _variance_fraction(denoised: Denoised) -> Images:
    if denoised.variance_fraction is None:
        raise ValueError("variance 'learned' needs a network with learned variance: use 'fixed_small' or 'fixed_large'")
    return denoised.variance_fraction


def _transfer(
    schedule: Schedule, t: Shaped[Array, " n"], s: Shaped[Array, " n"], average: str
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Weights of x_t and of the output in x_s, where DDIM's step is written with x_t and one output instead of x0."""
    alpha_t, alpha_s, sigma_t, sigma_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t), schedule.sigma(s)
    if average == "noise":  # x / alpha along sigma / alpha
        return alpha_s / alpha_t, sigma_s - alpha_s * sigma_t / alpha_t
    if average == "velocity":  # x / w along sigma / w with w = alpha + sigma
        w_t, w_s = alpha_t + sigma_t, alpha_s + sigma_s
        return w_s / w_t, sigma_s - w_s / w_t * sigma_t
    norm = jnp.sqrt(alpha_t**2 + sigma_t**2)  # (x, v) turn by an angle
    cos, sin = (alpha_s * alpha_t + sigma_s * sigma_t) / norm, (sigma_s * alpha_t - alpha_s * sigma_t) / norm
    return cos / norm, sin
