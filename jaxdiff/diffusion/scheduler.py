"""Noise schedules and the forward process x_t = alpha(t) x0 + sigma(t) noise.

Three schedules: the discrete one of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), flow matching
(Lipman et al. 2022, https://arxiv.org/abs/2210.02747; Liu et al. 2022, https://arxiv.org/abs/2209.03003) and EDM
(Karras et al. 2022, https://arxiv.org/abs/2206.00364). In all of them t = 0 is clean data; the discrete schedule's
noise levels are the paper's t = 1..T. Tables are computed in NumPy float64 and kept in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key, Shaped

Time = Shaped[Array, "*t"] | float | int
Betas = Float64[np.ndarray, " T"]


class Schedule(Protocol):
    """What samplers, losses and likelihoods ask of a noise schedule; `t` has any shape, results have the same."""

    @property
    def t_min(self) -> float:
        """Where sampling ends: clean data."""

    @property
    def t_max(self) -> float:
        """Where sampling begins."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of x at t_max."""

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether alpha(t_max) = 0, so that x0 cannot be told from a noise prediction there."""

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """Signal scale."""

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """Noise scale."""

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """log(alpha^2 / sigma^2): +inf on clean data, -inf where alpha = 0."""

    def network_time(self, t: Time) -> Float[Array, "*t"]:
        """The number the network is told."""

    def sample_time(self, key: Key[Array, ""]) -> Shaped[Array, ""]:
        """One time from the training distribution."""

    def time_of_sigma(self, ratio: Time) -> Float[Array, "*t"]:
        """Inverse schedule: the t where sigma(t) / alpha(t) = ratio."""


# Betas of the discrete schedule, in float64 -------------------------------------------------------------------------


def linear_betas(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Betas:
    """Betas rising linearly (DDPM, section 4)."""
    return np.linspace(start, end, num_steps, dtype=np.float64)


def scaled_linear_betas(num_steps: int, start: float = 0.00085, end: float = 0.012) -> Betas:
    """Betas whose square root rises linearly (latent diffusion, Rombach et al. 2021)."""
    return np.linspace(math.sqrt(start), math.sqrt(end), num_steps, dtype=np.float64) ** 2


def cosine_betas(num_steps: int, max_beta: float = 0.999, offset: float = 0.008) -> Betas:
    """Betas such that alpha^2 falls as a squared cosine (improved DDPM, Nichol & Dhariwal 2021, eq. 17)."""
    t = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    alpha_squared = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_squared[1:] / alpha_squared[:-1], max_beta)


def rescale_zero_terminal_snr(betas: Betas) -> Betas:
    """Shift and scale alpha so that alpha(T) = 0 and alpha(1) stays (Lin et al. 2023, algorithm 1)."""
    if len(betas) < 2:
        raise ValueError(f"zero terminal SNR needs at least 2 noise levels, got {len(betas)}")
    alpha = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_squared = alpha**2
    return 1 - np.concatenate([alpha_squared[:1], alpha_squared[1:] / alpha_squared[:-1]])


BETAS: dict[str, Callable[..., Betas]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
}

# Schedules ----------------------------------------------------------------------------------------------------------


STATIC = {"static": True}  # dataclass fields that are part of the program, not of its input


def _float(t: Time) -> Float[Array, "*t"]:
    return jnp.asarray(t, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """DDPM's schedule: T noise levels given by betas; make it with `from_betas`. Row 0 of the tables is clean data.

    Integer `t` reads the tables. Fractional `t` interpolates log(sigma / alpha) linearly between noise levels; before
    the first level sigma / alpha itself is linear, and after the last level of finite SNR (with zero terminal SNR)
    alpha / sigma is.
    """

    alpha_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    sigma_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    log_snr_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    beta_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    posterior_x0_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    posterior_x_t_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    posterior_variance_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    posterior_log_variance_table: Float[np.ndarray, " T+1"] = dataclasses.field(repr=False)
    num_steps: int = dataclasses.field(metadata=STATIC)
    zero_terminal_snr: bool = dataclasses.field(default=False, metadata=STATIC)

    @classmethod
    def from_betas(cls, betas: Betas) -> DiscreteSchedule:
        """Tables of alpha, sigma, log SNR and of the posterior q(x_{t-1} | x_t, x0) from betas in (0, 1]."""
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a vector of at least one number, got shape {betas.shape}")
        if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
            raise ValueError("betas must lie in (0, 1); only the last may be 1 (zero terminal SNR)")
        beta = np.concatenate([[0.0], betas])
        with np.errstate(divide="ignore"):
            log_alpha_squared = np.cumsum(np.log1p(-beta))
            alpha_squared = np.exp(log_alpha_squared)
            sigma_squared = -np.expm1(log_alpha_squared)
            log_snr = log_alpha_squared - np.log(sigma_squared)
        # DDPM eq. 7. Row 0 (there is no step into clean data) keeps x0 and has no variance.
        ratio = beta[1:] / sigma_squared[1:]
        x0_weight = np.concatenate([[1.0], np.sqrt(alpha_squared[:-1]) * ratio])
        x_t_weight = np.concatenate([[0.0], np.sqrt(1 - beta[1:]) * sigma_squared[:-1] / sigma_squared[1:]])
        variance = np.concatenate([[0.0], sigma_squared[:-1] * ratio])
        # The variance at t = 1 is 0: its logarithm is clipped to the one at t = 2.
        smallest = variance[2] if len(betas) > 1 else beta[1]
        log_variance = np.log(np.maximum(variance, smallest))
        return cls(
            alpha_table=np.sqrt(alpha_squared).astype(np.float32),
            sigma_table=np.sqrt(sigma_squared).astype(np.float32),
            log_snr_table=log_snr.astype(np.float32),
            beta_table=beta.astype(np.float32),
            posterior_x0_table=x0_weight.astype(np.float32),
            posterior_x_t_table=x_t_weight.astype(np.float32),
            posterior_variance_table=variance.astype(np.float32),
            posterior_log_variance_table=log_variance.astype(np.float32),
            num_steps=len(betas),
            zero_terminal_snr=bool(betas[-1] == 1),
        )

    @property
    def t_min(self) -> float:
        """Clean data."""
        return 0.0

    @property
    def t_max(self) -> float:
        """T."""
        return float(self.num_steps)

    @property
    def prior_std(self) -> float:
        """1: the process preserves unit variance."""
        return 1.0

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """sqrt(prod(1 - beta)), DDPM's sqrt(alpha-bar)."""
        return self._look_up(self.alpha_table, t, lambda log_snr: jnp.sqrt(jax.nn.sigmoid(log_snr)))

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """sqrt(1 - alpha^2)."""
        return self._look_up(self.sigma_table, t, lambda log_snr: jnp.sqrt(jax.nn.sigmoid(-log_snr)))

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """log(alpha^2 / sigma^2)."""
        return self._look_up(self.log_snr_table, t, lambda log_snr: log_snr)

    def beta(self, t: Int[Array, "*t"] | int) -> Float[Array, "*t"]:
        """Variance of the Markov step q(x_t | x_{t-1}), t = 1..T."""
        return jnp.asarray(self.beta_table)[t]

    def posterior_log_variance(self, t: Int[Array, "*t"] | int) -> Float[Array, "*t"]:
        """Logarithm of the posterior variance beta-tilde_t, at t = 1 (where it is 0) clipped to the value at t = 2."""
        return jnp.asarray(self.posterior_log_variance_table)[t]

    def network_time(self, t: Time) -> Float[Array, "*t"]:
        """The number t - 1: the network counts 0..T-1."""
        return jnp.maximum(_float(t) - 1, 0)

    def sample_time(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """Uniform on 1..T."""
        return jax.random.randint(key, (), 1, self.num_steps + 1)

    def time_of_sigma(self, ratio: Time) -> Float[Array, "*t"]:
        """Fractional t where sigma(t) / alpha(t) = ratio, clipped to [0, T]."""
        ratio = _float(ratio)
        last = self.num_steps - self.zero_terminal_snr  # the last level of finite log SNR
        levels = jnp.asarray(self.log_snr_table)[1 : last + 1] / -2
        log_ratio = jnp.log(ratio)
        t = jnp.interp(log_ratio, levels, jnp.arange(1, last + 1, dtype=jnp.float32))
        t = jnp.where(log_ratio < levels[0], jnp.exp(log_ratio - levels[0]), t)
        if self.zero_terminal_snr:
            t = jnp.where(log_ratio > levels[-1], self.num_steps - jnp.exp(levels[-1] - log_ratio), t)
        return t

    def _look_up(self, table: Any, t: Time, of_log_snr: Callable[[Array], Array]) -> Float[Array, "*t"]:
        table, t = jnp.asarray(table), jnp.asarray(t)
        if jnp.issubdtype(t.dtype, jnp.integer):
            return table[t]
        t = jnp.clip(t.astype(jnp.float32), 0, self.num_steps)
        below = jnp.minimum(jnp.floor(t), self.num_steps - 1)
        weight = t - below
        row = below.astype(jnp.int32)
        fraction = jnp.clip(weight, 1e-30, 1 - 2.0**-24)  # strictly inside: no inf * 0 at the rows themselves
        log_snr = jnp.asarray(self.log_snr_table)
        before, after = log_snr[row], log_snr[row + 1]
        inside = (1 - fraction) * before + fraction * after
        inside = jnp.where(row == 0, after - 2 * jnp.log(fraction), inside)
        if self.zero_terminal_snr:
            inside = jnp.where(row == self.num_steps - 1, before + 2 * jnp.log1p(-fraction), inside)
        on_row = jnp.where(weight == 1, table[row + 1], table[row])
        return jnp.where((weight == 0) | (weight == 1), on_row, of_log_snr(inside))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Flow matching: alpha = 1 - t, sigma = t, t in [0, 1].

    `logit_normal`: draw training times from a logit-normal (mean, std) instead of uniformly (SD 3, Esser et al. 2024).
    """

    logit_normal: tuple[float, float] | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def t_min(self) -> float:
        """Clean data."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Pure noise."""
        return 1.0

    @property
    def prior_std(self) -> float:
        """sigma(1) = 1."""
        return 1.0

    @property
    def zero_terminal_snr(self) -> bool:
        """Always: alpha(1) = 0."""
        return True

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """1 - t."""
        return 1 - _float(t)

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """The time itself."""
        return _float(t)

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """2 log((1 - t) / t)."""
        return 2 * (jnp.log1p(-_float(t)) - jnp.log(_float(t)))

    def network_time(self, t: Time) -> Float[Array, "*t"]:
        """1000 t."""
        return 1000 * _float(t)

    def sample_time(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """Uniform or logit-normal on (0, 1), ends excluded."""
        if self.logit_normal is None:
            t = jax.random.uniform(key)
        else:
            mean, std = self.logit_normal
            t = jax.nn.sigmoid(mean + std * jax.random.normal(key))
        return jnp.clip(t, 1e-5, 1 - 1e-5)

    def time_of_sigma(self, ratio: Time) -> Float[Array, "*t"]:
        """Time where t / (1 - t) = ratio."""
        return 1 / (1 + 1 / _float(ratio))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EDMSchedule:
    """EDM: alpha = 1 and t is sigma itself (Karras et al. 2022, table 1, last column)."""

    sigma_min: float = dataclasses.field(default=0.002, metadata=STATIC)
    sigma_max: float = dataclasses.field(default=80.0, metadata=STATIC)
    sigma_data: float = dataclasses.field(default=0.5, metadata=STATIC)
    rho: float = dataclasses.field(default=7.0, metadata=STATIC)
    P_mean: float = dataclasses.field(default=-1.2, metadata=STATIC)
    P_std: float = dataclasses.field(default=1.2, metadata=STATIC)

    @property
    def t_min(self) -> float:
        """Clean data (samplers step from sigma_min to 0)."""
        return 0.0

    @property
    def t_max(self) -> float:
        """sigma_max."""
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        """sigma_max: the data's own variance is neglected beside it."""
        return self.sigma_max

    @property
    def zero_terminal_snr(self) -> bool:
        """Never: alpha = 1 everywhere."""
        return False

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """1."""
        return jnp.ones_like(_float(t))

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """The time itself."""
        return _float(t)

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """-2 log sigma."""
        return -2 * jnp.log(_float(t))

    def network_time(self, t: Time) -> Float[Array, "*t"]:
        """c_noise = log(sigma) / 4."""
        return jnp.log(jnp.maximum(_float(t), 1e-20)) / 4

    def sample_time(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """Log-normal sigma: log sigma ~ N(P_mean, P_std^2)."""
        return jnp.exp(self.P_mean + self.P_std * jax.random.normal(key))

    def time_of_sigma(self, ratio: Time) -> Float[Array, "*t"]:
        """The ratio itself."""
        return _float(ratio)


# Forward process ----------------------------------------------------------------------------------------------------


def expand_like(values: Float[Array, "*b"], x: Float[Array, "b h w c"]) -> Float[Array, "*shape"]:
    """Coefficients per image, [b] -> [b 1 1 1]; a scalar stays one for the whole batch."""
    values = jnp.asarray(values)
    return values if values.ndim == 0 else values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def q_step(
    schedule: DiscreteSchedule, x_prev: Float[Array, "b h w c"], t: Int[Array, "*b"], noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """One Markov step, t = 1..T: x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) (DDPM eq. 2)."""
    beta = expand_like(schedule.beta(t), x_prev)
    return jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(beta) * noise


def q_sample(
    schedule: Schedule, x0: Float[Array, "b h w c"], t: Shaped[Array, "*b"], noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """x_t ~ q(x_t | x0) = N(alpha(t) x0, sigma(t)^2) in one go (DDPM eq. 4)."""
    return expand_like(schedule.alpha(t), x0) * x0 + expand_like(schedule.sigma(t), x0) * noise


def q_posterior(
    schedule: DiscreteSchedule, x0: Float[Array, "b h w c"], x_t: Float[Array, "b h w c"], t: Int[Array, "*b"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "*b"]]:
    """Mean (like x_t) and variance (like t) of q(x_{t-1} | x_t, x0), t = 1..T (DDPM eq. 6 and 7)."""
    x0_weight = expand_like(jnp.asarray(schedule.posterior_x0_table)[t], x_t)
    x_t_weight = expand_like(jnp.asarray(schedule.posterior_x_t_table)[t], x_t)
    return x0_weight * x0 + x_t_weight * x_t, jnp.asarray(schedule.posterior_variance_table)[t]


class Transition(NamedTuple):
    """q(x_t | x_s) = N(alpha x_s, variance)."""

    alpha: Float[Array, "*t"]
    variance: Float[Array, "*t"]


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(x0_weight x0 + x_t_weight x_t, variance)."""

    x0_weight: Float[Array, "*t"]
    x_t_weight: Float[Array, "*t"]
    variance: Float[Array, "*t"]


def transition(schedule: Schedule, s: Time, t: Time) -> Transition:
    """Forward kernel from s to any t > s (VDM, Kingma et al. 2021, appendix A.1)."""
    return Transition(schedule.alpha(t) / schedule.alpha(s), schedule.sigma(t) ** 2 * _noise_gained(schedule, s, t))


def posterior(schedule: Schedule, s: Time, t: Time) -> Posterior:
    """Posterior at s given x0 and x_t, for any s < t, t > 0 (VDM, appendix A.2)."""
    gained = _noise_gained(schedule, s, t)
    sigma_ratio = schedule.sigma(s) / schedule.sigma(t)
    return Posterior(
        x0_weight=schedule.alpha(s) * gained,
        x_t_weight=schedule.alpha(t) / schedule.alpha(s) * sigma_ratio**2,
        variance=schedule.sigma(s) ** 2 * gained,
    )


def _noise_gained(schedule: Schedule, s: Time, t: Time) -> Float[Array, "*t"]:
    """1 - SNR(t) / SNR(s), the share of x_t's noise variance that came after s, without cancellation."""
    log_snr_s, log_snr_t = schedule.log_snr(s), schedule.log_snr(t)
    # Equal ends give 0, also where both are infinite.
    return jnp.where(log_snr_s == log_snr_t, 0.0, -jnp.expm1(log_snr_t - log_snr_s))
