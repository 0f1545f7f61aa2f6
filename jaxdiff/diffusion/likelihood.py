"""How probable the data are under the model, in bits per dimension: the variational bound and the probability-flow ODE.

The bound is DDPM's (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 5 and section 3.3), summed over every noise
level; the ODE gives the likelihood itself (Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix D.2).

Images have 256 levels scaled to [-1, 1], so a level is 2 / 255 wide. The bound scores levels: it is in bits per
dimension as it stands. The ODE scores a density p(x): spread the levels with `dequantize` and
bits/dim = -log2 p(x) / D + log2(127.5), D = height x width x channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion.predictions import Denoised, Denoiser, learned_log_variance
from jaxdiff.diffusion.scheduler import DiscreteSchedule, EDMSchedule, Schedule, expand_like, q_sample

Images = Float[Array, "b h w c"]
LEVEL_WIDTH = 2 / 255
Variance = Literal["fixed_small", "fixed_large", "learned"]
State = tuple[Images, Float[Array, " b"]]  # of the ODE: x^ and the log volume per dimension
Probe = Literal["rademacher", "gaussian", "exact"]

# Densities ----------------------------------------------------------------------------------------------------------


def gaussian_kl(
    mean_q: Float[Array, "*s"],
    log_variance_q: Float[Array, "*s"],
    mean_p: Float[Array, "*s"],
    log_variance_p: Float[Array, "*s"],
) -> Float[Array, "*s"]:
    """KL(N(mean_q, variance_q) || N(mean_p, variance_p)) in nats, element by element."""
    gap = log_variance_q - log_variance_p
    return 0.5 * (jnp.expm1(gap) - gap + (mean_q - mean_p) ** 2 * jnp.exp(-log_variance_p))


def discretized_gaussian_log_likelihood(
    x0: Float[Array, "*s"], mean: Float[Array, "*s"], log_std: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Log of the mass N(mean, std^2) gives to x0's level (DDPM eq. 13), in nats; the end levels take the tails."""
    inverse_std, infinity = jnp.exp(-log_std), 1e6  # finite, for the gradient's sake
    upper = jnp.where(x0 > 0.999, infinity, (x0 - mean + LEVEL_WIDTH / 2) * inverse_std)
    lower = jnp.where(x0 < -0.999, -infinity, (x0 - mean - LEVEL_WIDTH / 2) * inverse_std)
    # log(cdf(near) - cdf(far)) on the side of the mean where both are small, so that float32 keeps the difference.
    right = x0 > mean
    log_near = jax.scipy.special.log_ndtr(jnp.where(right, -lower, upper))
    log_far = jax.scipy.special.log_ndtr(jnp.where(right, -upper, lower))
    return log_near + jnp.log(jnp.maximum(-jnp.expm1(log_far - log_near), 1e-12))


def bits_per_dim(nats: Float[Array, " b *s"]) -> Float[Array, " b"]:
    """Mean over an image's dimensions, in bits."""
    return nats.mean(tuple(range(1, nats.ndim))) / math.log(2)


# The variational bound, term by term --------------------------------------------------------------------------------


def prior_term(schedule: DiscreteSchedule, x0: Images) -> Float[Array, " b"]:
    """L_T = KL(q(x_T | x0) || N(0, 1)) in bits/dim: what is left of the image at the last noise level."""
    alpha_squared = schedule.alpha(schedule.num_steps) ** 2
    return bits_per_dim(0.5 * (alpha_squared * x0**2 - alpha_squared - jnp.log1p(-alpha_squared)))


def denoising_term(
    denoised: Denoised, schedule: DiscreteSchedule, x0: Images, t: Int[Array, " b"], variance: Variance
) -> Float[Array, " b"]:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) in bits/dim, t = 2..T."""
    x0_weight = expand_like(jnp.asarray(schedule.posterior_x0_table)[t], x0)
    log_variance_q = expand_like(schedule.posterior_log_variance(t), x0)
    log_variance_p = reverse_log_variance(denoised, schedule, t, variance)
    # The two means share their x_t part, which the KL does not see.
    return bits_per_dim(gaussian_kl(x0_weight * x0, log_variance_q, x0_weight * denoised.x0, log_variance_p))


def reconstruction_term(
    denoised: Denoised, schedule: DiscreteSchedule, x0: Images, t: Int[Array, " b"], variance: Variance
) -> Float[Array, " b"]:
    """L_0 = -log p(x0 | x_1) in bits/dim, with the discretised Gaussian (DDPM section 3.3); t = 1."""
    log_std = 0.5 * reverse_log_variance(denoised, schedule, t, variance)
    return bits_per_dim(-discretized_gaussian_log_likelihood(x0, denoised.x0, log_std))


def variational_term(
    denoised: Denoised, schedule: DiscreteSchedule, x0: Images, t: Int[Array, " b"], variance: Variance
) -> Float[Array, " b"]:
    """L_0 where t = 1, L_{t-1} elsewhere, in bits/dim."""
    reconstruction = reconstruction_term(denoised, schedule, x0, t, variance)
    return jnp.where(t == 1, reconstruction, denoising_term(denoised, schedule, x0, t, variance))


def reverse_log_variance(
    denoised: Denoised, schedule: DiscreteSchedule, t: Int[Array, " b"], variance: Variance
) -> Float[Array, " b #h #w #c"]:
    """Log variance of p(x_{t-1} | x_t): beta-tilde ("fixed_small"), beta ("fixed_large") or between ("learned")."""
    small = expand_like(schedule.posterior_log_variance(t), denoised.x0)
    large = jnp.log(expand_like(schedule.beta(t), denoised.x0))
    if variance == "fixed_small":
        return small
    if variance == "fixed_large":
        return large
    if variance != "learned":
        raise ValueError(f"unknown variance {variance!r}: use 'fixed_small', 'fixed_large' or 'learned'")
    if denoised.variance_fraction is None:
        raise ValueError("variance 'learned' needs a denoiser made with learned_variance=True")
    return learned_log_variance(denoised.variance_fraction, large, small)


class VariationalBound(NamedTuple):
    """Terms of the bound in bits/dim; `noise_mse` is the plain loss at every noise level, for comparison."""

    prior: Float[Array, " b"]  # L_T
    terms: Float[Array, " b T"]  # L_0, L_1, .., L_{T-1}: column t - 1 belongs to noise level t
    noise_mse: Float[Array, " b T"]

    @property
    def total(self) -> Float[Array, " b"]:
        """L_T + sum of L_{t-1}, t = 2..T, + L_0: an upper bound of -log2 p(x0) / D."""
        return self.prior + self.terms.sum(1)


def variational_bound(
    denoise: Denoiser,
    schedule: DiscreteSchedule,
    x0: Images,
    key: Key[Array, "*b"],
    variance: Variance = "fixed_small",
) -> VariationalBound:
    """Every term of the bound (DDPM eq. 5), one sample of x_t each: T network calls.

    x0: levels in [-1, 1]. key: one, or one for each image (then an image's terms do not depend on the batch).
    """
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"the variational bound needs a DiscreteSchedule, not {type(schedule).__name__}: use the ODE")

    def term(_: None, t: Int[Array, ""]) -> tuple[None, tuple[Float[Array, " b"], Float[Array, " b"]]]:
        noise = _normal(_fold_in(key, t), x0.shape)
        times = jnp.full(x0.shape[0], t)
        denoised = denoise(q_sample(schedule, x0, times, noise), times)
        mse = ((denoised.noise - noise) ** 2).mean(tuple(range(1, x0.ndim)))
        # As variational_term, but the discretised Gaussian is worked out at t = 1 only.
        bits = jax.lax.cond(
            t == 1,
            lambda: reconstruction_term(denoised, schedule, x0, times, variance),
            lambda: denoising_term(denoised, schedule, x0, times, variance),
        )
        return None, (bits, mse)

    _, (terms, mse) = jax.lax.scan(term, None, jnp.arange(1, schedule.num_steps + 1))
    return VariationalBound(prior_term(schedule, x0), terms.T, mse.T)


# The probability-flow ODE -------------------------------------------------------------------------------------------


class OdeLikelihood(NamedTuple):
    """`log_likelihood` is the log density of x0 in nats; `bits_per_dim` is for dequantised 8-bit images."""

    log_likelihood: Float[Array, " b"]
    bits_per_dim: Float[Array, " b"]
    x_T: Images


def dequantize(x0: Images, key: Key[Array, "*b"]) -> Images:
    """Spread every level uniformly over its width (Theis et al. 2016, https://arxiv.org/abs/1511.01844)."""
    return x0 + LEVEL_WIDTH * (_per_image(jax.random.uniform, key, x0.shape) - 0.5)


def ode_log_likelihood(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Images,
    key: Key[Array, "*b"],
    num_steps: int = 128,
    probe: Probe = "rademacher",
    num_probes: int = 1,
) -> OdeLikelihood:
    """Likelihood of (dequantised) x0 by the probability-flow ODE (Song et al. 2021, eq. 39), 4 num_steps network calls.

    In x^ = x / alpha and s = sigma / alpha every schedule's ODE is dx^ / ds = noise(x^, s); it is solved in log s by
    RK4, from the schedule's first noise level (x0 counts as x^ there) to its last. The trace of the Jacobian is
    estimated with `num_probes` random vectors (Hutchinson), fixed along the path; "exact" takes D products instead.
    """
    dimensions = math.prod(x0.shape[1:])
    probes = _probes(key, x0.shape, probe, num_probes)
    log_first, log_last = _log_ends(schedule)
    step = (log_last - log_first) / num_steps

    def slope(state: State, log_s: Float[Array, ""]) -> State:
        ratio = jnp.exp(log_s)
        t = jnp.full(x0.shape[0], schedule.time_of_sigma(ratio))
        alpha = expand_like(schedule.alpha(t), x0)
        noise, pull_back = jax.vjp(lambda x_hat: denoise(alpha * x_hat, t).noise, state[0])
        products = jax.lax.map(lambda v: (v * pull_back(v)[0]).sum(tuple(range(1, x0.ndim))), probes)
        # Divergence per dimension: the sum over one-hot vectors, or the mean over random ones.
        divergence = (products.sum(0) if probe == "exact" else products.mean(0)) / dimensions
        return ratio * noise, ratio * divergence

    def runge_kutta(state: State, log_s: Float[Array, ""]) -> tuple[State, None]:
        k1 = slope(state, log_s)
        k2 = slope(_move(state, k1, step / 2), log_s + step / 2)
        k3 = slope(_move(state, k2, step / 2), log_s + step / 2)
        k4 = slope(_move(state, k3, step), log_s + step)
        total = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return _move(state, total, step), None

    start = (x0, jnp.zeros(x0.shape[0]))
    (x_hat, log_volume), _ = jax.lax.scan(runge_kutta, start, log_first + step * jnp.arange(num_steps))
    std = jnp.exp(log_last) * schedule.prior_std / schedule.sigma(schedule.t_max)  # of x^ at the end
    log_prior = jax.scipy.stats.norm.logpdf(x_hat / std).mean(tuple(range(1, x0.ndim))) - jnp.log(std)
    per_dimension = log_prior + log_volume
    return OdeLikelihood(
        log_likelihood=dimensions * per_dimension,
        bits_per_dim=-per_dimension / math.log(2) + math.log2(127.5),
        x_T=schedule.prior_std * x_hat / std,
    )


def _move(state: State, slope: State, step: Float[Array, ""]) -> State:
    return state[0] + step * slope[0], state[1] + step * slope[1]


def _log_ends(schedule: Schedule) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Log(sigma / alpha) at the first and the last noise level, between which the ODE is solved."""
    if isinstance(schedule, DiscreteSchedule):
        first = schedule.sigma(1) / schedule.alpha(1)
    else:
        first = jnp.asarray(schedule.sigma_min if isinstance(schedule, EDMSchedule) else 0.002)
    # Where alpha(t_max) = 0 it stops short: data of unit variance are within 2e-5 nats/dim of pure noise there.
    last = 200.0 if schedule.zero_terminal_snr else schedule.sigma(schedule.t_max) / schedule.alpha(schedule.t_max)
    return jnp.log(first), jnp.log(jnp.asarray(last))


PROBES: dict[str, Callable[[Key[Array, ""], tuple[int, ...]], Array]] = {
    "rademacher": lambda key, shape: jax.random.rademacher(key, shape, jnp.float32),
    "gaussian": jax.random.normal,
}


def _probes(key: Key[Array, "*b"], shape: tuple[int, ...], probe: Probe, num_probes: int) -> Float[Array, "n b h w c"]:
    if probe == "exact":
        dimensions = math.prod(shape[1:])
        one_hot = jnp.eye(dimensions).reshape(dimensions, 1, *shape[1:])
        return jnp.broadcast_to(one_hot, (dimensions, *shape))
    if probe not in PROBES:
        raise ValueError(f"unknown probe {probe!r}: use 'rademacher', 'gaussian' or 'exact'")
    return jnp.stack([_per_image(PROBES[probe], _fold_in(key, jnp.asarray(i)), shape) for i in range(num_probes)])


# Randomness: one key for the batch, or one for each image -----------------------------------------------------------


def _fold_in(key: Key[Array, "*b"], data: Int[Array, ""]) -> Key[Array, "*b"]:
    return jax.vmap(jax.random.fold_in, (0, None))(key, data) if key.ndim else jax.random.fold_in(key, data)


def _per_image(
    draw: Callable[[Key[Array, ""], tuple[int, ...]], Array], key: Key[Array, "*b"], shape: tuple[int, ...]
) -> Images:
    return jax.vmap(lambda key: draw(key, shape[1:]))(key) if key.ndim else draw(key, shape)


def _normal(key: Key[Array, "*b"], shape: tuple[int, ...]) -> Images:
    return _per_image(jax.random.normal, key, shape)
