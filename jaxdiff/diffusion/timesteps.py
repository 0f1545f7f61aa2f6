"""Which noise levels a sampler visits: num + 1 times, descending from (near) t_max to t_min.

On a discrete schedule "linspace", "leading" and "trailing" are the rules of Lin et al. 2024, table 2
(https://arxiv.org/abs/2305.08891), with integer times 1..T. On a continuous one "linspace" and "trailing" are the same
uniform grid, and "leading", which would leave out t_max, means nothing. "karras" spaces sigma / alpha as Karras et al.
2022, eq. 5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxdiff.diffusion.scheduler import DiscreteSchedule, EDMSchedule, Schedule

SPACINGS = ("linspace", "leading", "trailing", "karras")

Times = Float64[np.ndarray, " num+1"]


def make_timesteps(schedule: Schedule, num: int, spacing: str, *, offset: int = 0) -> Times:
    """`num` steps of the given spacing: num + 1 times, the last t_min (clean data).

    `offset` (0 or 1) is added to the discrete "leading" times; Stable Diffusion's samplers use 1.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown timestep spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    if num < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, got {num}")
    if spacing == "karras":
        times = karras_times(schedule, num)
    elif isinstance(schedule, DiscreteSchedule):
        times = discrete_times(schedule.num_steps, num, spacing, offset)
    elif spacing == "leading":
        raise ValueError(f"spacing 'leading' needs a DiscreteSchedule, not {type(schedule).__name__}: use 'trailing'")
    else:
        times = np.linspace(schedule.t_max, schedule.t_min, num + 1)[:-1]
    return np.append(times, schedule.t_min)


def discrete_times(num_levels: int, num: int, spacing: str, offset: int = 0) -> Float64[np.ndarray, " num"]:
    """Integer times in 1..T, descending, as float64: "linspace" has both 1 and T, "leading" 1, "trailing" T."""
    if num > num_levels:
        raise ValueError(f"{num} sampling steps are more than the schedule's {num_levels} noise levels")
    if spacing == "linspace":
        # Rounded from 0, as the field counts, so that halves fall the same way.
        return np.linspace(num_levels - 1, 0, num).round() + 1
    if spacing == "leading":
        stride = num_levels // num
        if (num - 1) * stride + 1 + offset > num_levels or offset < 0:
            raise ValueError(f"'leading' with offset {offset} and {num} steps leaves 1..{num_levels}: use offset 0")
        return np.arange(num, dtype=np.float64)[::-1] * stride + 1 + offset
    return np.round(num_levels - np.arange(num) * (num_levels / num))


def karras_sigmas(sigma_min: float, sigma_max: float, num: int, rho: float = 7.0) -> Float64[np.ndarray, " num"]:
    """Noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1 / rho) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, num)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def karras_times(schedule: Schedule, num: int) -> Float64[np.ndarray, " num"]:
    """Times where sigma / alpha are Karras's levels; on a discrete schedule fractional, from T to 1."""
    if isinstance(schedule, EDMSchedule):
        return karras_sigmas(schedule.sigma_min, schedule.sigma_max, num, schedule.rho)
    if schedule.zero_terminal_snr or not isinstance(schedule, DiscreteSchedule):
        raise ValueError("spacing 'karras' needs a finite largest sigma / alpha, but alpha(t_max) = 0: use 'trailing'")
    with jax.ensure_compile_time_eval():  # host numbers even while something is being traced
        sigma_min, sigma_max = np.exp(-np.asarray(schedule.log_snr(jnp.array([1, schedule.num_steps])), np.float64) / 2)
        sigmas = jnp.asarray(karras_sigmas(sigma_min, sigma_max, num))
        times = np.array(schedule.time_of_sigma(sigmas), np.float64)
    times[0] = schedule.num_steps
    if num > 1:
        times[-1] = 1
    return times
