"""Timestep spacings against diffusers' numbers and the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.scheduler import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    linear_betas,
    rescale_zero_terminal_snr,
)
from jaxdiff.diffusion.timesteps import SPACINGS, karras_sigmas, make_timesteps

DISCRETE = DiscreteSchedule.from_betas(linear_betas(1000))


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "schedules.npz")


@pytest.mark.parametrize("num", [7, 10, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_discrete_times_are_diffusers_plus_one(golden, spacing, num):
    times = make_timesteps(DISCRETE, num, spacing)
    np.testing.assert_array_equal(times[:-1], golden[f"timesteps_{spacing}_{num}"] + 1)
    assert times[-1] == 0


@pytest.mark.parametrize("num", [7, 10, 50])
def test_karras_sigmas_and_times_are_diffusers(golden, num):
    """At our times sigma / alpha are diffusers' sigmas, and the fractional times are its times plus one."""
    times = make_timesteps(DISCRETE, num, "karras")
    np.testing.assert_allclose(times[:-1], golden[f"karras_timesteps_{num}"] + 1, atol=2e-2)
    ratio = jax.jit(lambda t: DISCRETE.sigma(t) / DISCRETE.alpha(t))(times)
    np.testing.assert_allclose(ratio, golden[f"karras_sigmas_{num}"], rtol=1e-4, atol=1e-6)


def test_ends_of_the_discrete_spacings():
    """Only "leading" leaves out T, only "trailing" leaves out 1; an offset moves "leading" by one."""
    ends = {spacing: tuple(make_timesteps(DISCRETE, 10, spacing)[[0, -2]]) for spacing in SPACINGS}
    assert ends == {"linspace": (1000, 1), "leading": (901, 1), "trailing": (1000, 100), "karras": (1000, 1)}
    assert tuple(make_timesteps(DISCRETE, 10, "leading", offset=1)[[0, -2, -1]]) == (902, 2, 0)


@pytest.mark.parametrize("num", [1, 2, 3, 333, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_discrete_times_descend(spacing, num):
    times = make_timesteps(DISCRETE, num, spacing)
    assert times.shape == (num + 1,) and times.dtype == np.float64
    assert np.all(np.diff(times) < 0) and times[-1] == 0 and times[-2] >= 1 and times[0] <= 1000
    assert times[0] == 1000 or spacing == "leading"  # pure noise is where sampling begins, also with one step
    if spacing != "karras":
        np.testing.assert_array_equal(times, np.round(times))


def test_edm_karras_times_are_equation_5():
    times = make_timesteps(EDMSchedule(), 18, "karras")
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(times, np.append(expected, 0), rtol=1e-12)
    narrow = make_timesteps(EDMSchedule(sigma_min=0.01, sigma_max=10.0, rho=3.0), 5, "karras")
    np.testing.assert_allclose(narrow[:-1], karras_sigmas(0.01, 10.0, 5, rho=3.0))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_continuous_times_are_uniform(spacing):
    np.testing.assert_allclose(make_timesteps(FlowSchedule(), 4, spacing), [1, 0.75, 0.5, 0.25, 0], atol=1e-15)
    np.testing.assert_allclose(make_timesteps(EDMSchedule(), 4, spacing), [80, 60, 40, 20, 0], atol=1e-12)


def test_works_while_tracing():
    """Inside a jitted function the times are still host numbers."""

    @jax.jit
    def first(x):
        return x + sum(float(make_timesteps(DISCRETE, 5, spacing)[0]) for spacing in SPACINGS)

    assert first(jnp.float32(0)) == 1000 + 801 + 1000 + 1000


@pytest.mark.parametrize(
    ("schedule", "num", "spacing", "offset", "message"),
    [
        (DISCRETE, 10, "uniform", 0, "unknown timestep spacing 'uniform'"),
        (DISCRETE, 0, "linspace", 0, "at least 1"),
        (DISCRETE, 1001, "trailing", 0, "more than the schedule's 1000"),
        (DISCRETE, 1000, "leading", 1, "offset 1 and 1000 steps"),
        (FlowSchedule(), 10, "leading", 0, "needs a DiscreteSchedule, not FlowSchedule"),
        (FlowSchedule(), 10, "karras", 0, "finite largest sigma"),
        (
            DiscreteSchedule.from_betas(rescale_zero_terminal_snr(linear_betas(100))),
            10,
            "karras",
            0,
            "finite largest sigma",
        ),
    ],
)
def test_mistakes_are_named(schedule, num, spacing, offset, message):
    with pytest.raises(ValueError, match=message):
        make_timesteps(schedule, num, spacing, offset=offset)
