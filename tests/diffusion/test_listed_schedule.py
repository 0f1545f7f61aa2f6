"""The schedule that is a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.listed_schedule import ListedSchedule

RATIOS, TOLD = np.array([80.0, 7.5, 0.3, 0.0]), np.array([999.0, 500.25, 3.0])


@pytest.fixture
def schedule():
    return ListedSchedule.from_ratios(RATIOS, TOLD)


def test_rows_are_the_list_counted_from_the_end(schedule):
    t = np.array([3.0, 2, 1, 0])
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    np.testing.assert_allclose(sigma / alpha, RATIOS, rtol=1e-6)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(schedule.log_snr(t), [*(-2 * np.log(RATIOS[:3])), np.inf], rtol=1e-6)
    np.testing.assert_array_equal(schedule.network_time(t)[:3], TOLD)
    assert (schedule.t_min, schedule.t_max, schedule.zero_terminal_snr) == (0, 3, False)
    np.testing.assert_array_equal(schedule.time_of_sigma(RATIOS), t)
    assert schedule.time_of_sigma(1e9) == 3
    draws = jax.vmap(schedule.sample_time)(jax.random.split(jax.random.key(0), 64))
    assert set(np.asarray(draws)) == {1, 2, 3}


def test_is_a_pytree_that_compiles_once(schedule):
    other = ListedSchedule.from_ratios(RATIOS * 2, TOLD)
    traces = []

    @jax.jit
    def alpha(schedule, t):
        traces.append(1)
        return schedule.alpha(t)

    assert alpha(schedule, jnp.array(2)) != alpha(other, jnp.array(2)) and len(traces) == 1


def test_prior(schedule):
    assert schedule.prior_std == 1
    noise_alone = ListedSchedule.from_ratios(RATIOS, TOLD, unit_variance=False)
    assert noise_alone.prior_std == pytest.approx(float(schedule.sigma(3)), rel=1e-6)


@pytest.mark.parametrize(
    ("ratios", "told", "message"),
    [
        ([1.0, 2.0, 0.0], [1.0, 2.0], "must be finite, fall"),
        ([np.inf, 1.0, 0.0], [1.0, 2.0], "must be finite, fall"),
        ([1.0, 0.0, 0.0], [1.0, 2.0], "only the last may be 0"),
        ([1.0, 0.0], [1.0, 2.0], "N network times"),
        ([1.0], [], "N network times"),
    ],
)
def test_mistakes_are_named(ratios, told, message):
    with pytest.raises(ValueError, match=message):
        ListedSchedule.from_ratios(np.array(ratios), np.array(told))
