"""A schedule that is a list: the noise levels that a sampler visits and what the network is told at each.

Other libraries' samplers round, interpolate and cut off levels and times each in its own way, so that no function of
time gives both. The list does; its time is the number of steps left, so `timesteps` count down N, N - 1, ..., 0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion.scheduler import STATIC, Time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ListedSchedule:
    """N + 1 levels with alpha^2 + sigma^2 = 1, row i with i steps left; make it with `from_ratios`."""

    alpha_table: Float[np.ndarray, " N+1"] = dataclasses.field(repr=False)
    sigma_table: Float[np.ndarray, " N+1"] = dataclasses.field(repr=False)
    log_snr_table: Float[np.ndarray, " N+1"] = dataclasses.field(repr=False)
    network_time_table: Float[np.ndarray, " N+1"] = dataclasses.field(repr=False)
    num_steps: int = dataclasses.field(metadata=STATIC)
    prior_std: float = dataclasses.field(default=1.0, metadata=STATIC)

    @classmethod
    def from_ratios(
        cls, ratios: np.ndarray, network_times: np.ndarray, *, unit_variance: bool = True
    ) -> ListedSchedule:
        """From sigma / alpha at the N + 1 levels, falling (the last may be 0), and what the network is told at the first N.

        `unit_variance`: x_T has variance 1; otherwise it is sigma^2 of the first level, noise without an image.
        """
        ratios, network_times = np.asarray(ratios, np.float64)[::-1], np.asarray(network_times, np.float64)[::-1]
        if ratios.ndim != 1 or len(ratios) < 2 or network_times.shape != (len(ratios) - 1,):
            raise ValueError(f"N + 1 ratios and N network times are needed, got {ratios.shape}, {network_times.shape}")
        if not (np.isfinite(ratios).all() and ratios[0] >= 0 and (np.diff(ratios) >= 0).all() and ratios[1] > 0):
            raise ValueError("the ratios sigma / alpha must be finite, fall, and be above 0 (only the last may be 0)")
        alpha = 1 / np.sqrt(1 + ratios**2)
        with np.errstate(divide="ignore"):
            log_snr = -2 * np.log(ratios)
        return cls(
            alpha_table=alpha.astype(np.float32),
            sigma_table=(ratios * alpha).astype(np.float32),
            log_snr_table=log_snr.astype(np.float32),
            network_time_table=np.append(0.0, network_times).astype(np.float32),
            num_steps=len(network_times),
            prior_std=1.0 if unit_variance else float(ratios[-1] * alpha[-1]),
        )

    @property
    def t_min(self) -> float:
        """No step left."""
        return 0.0

    @property
    def t_max(self) -> float:
        """N steps left."""
        return float(self.num_steps)

    @property
    def zero_terminal_snr(self) -> bool:
        """Never: ratios are finite."""
        return False

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """Signal scale with t steps left."""
        return self._row(self.alpha_table, t)

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """Noise scale with t steps left."""
        return self._row(self.sigma_table, t)

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """log(alpha^2 / sigma^2)."""
        return self._row(self.log_snr_table, t)

    def network_time(self, t: Time) -> Float[Array, "*t"]:
        """What the network is told with t steps left."""
        return self._row(self.network_time_table, t)

    def sample_time(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """Uniform over the list, 1..N."""
        return jax.random.randint(key, (), 1, self.num_steps + 1)

    def time_of_sigma(self, ratio: Time) -> Int[Array, "*t"]:
        """The first row from the clean end with sigma / alpha at least `ratio`, or the last."""
        ratios = jnp.asarray(self.sigma_table) / jnp.asarray(self.alpha_table)
        return jnp.minimum(jnp.searchsorted(ratios, jnp.asarray(ratio, jnp.float32)), self.num_steps)

    def _row(self, table: np.ndarray, t: Time) -> Float[Array, "*t"]:
        return jnp.asarray(table)[jnp.round(jnp.asarray(t)).astype(jnp.int32)]
