"""The encoder's Gaussian against closed forms in float64 and against Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxdiff.models.gaussian import Gaussian

RNG = np.random.default_rng(0)
MEAN, LOG_VARIANCE = RNG.standard_normal((3, 2, 2, 4)), RNG.uniform(-4, 1.5, (3, 2, 2, 4))
GAUSSIAN = Gaussian(jnp.asarray(MEAN, jnp.float32), jnp.asarray(LOG_VARIANCE, jnp.float32))


def closed_form_kl(mean, log_variance):
    return 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)


def test_kl_is_its_closed_form():
    np.testing.assert_allclose(GAUSSIAN.kl_to_standard(), closed_form_kl(MEAN, LOG_VARIANCE).sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(Gaussian(jnp.zeros((1, 5)), jnp.zeros((1, 5))).kl_to_standard(), [0.0])


def test_kl_keeps_its_digits_near_zero():
    """exp(v) - 1 - v in float32 would be rounding alone."""
    log_variance = np.full((1, 1), 1e-3)
    kl = Gaussian(jnp.zeros((1, 1)), jnp.asarray(log_variance, jnp.float32)).kl_to_standard()
    np.testing.assert_allclose(kl, closed_form_kl(0.0, log_variance)[0], rtol=2e-3)


def test_kl_is_the_mean_of_the_log_ratio():
    """Monte Carlo in float64: E_q[log q(z) - log p(z)] within four standard errors."""
    z = MEAN[:, None] + np.exp(0.5 * LOG_VARIANCE)[:, None] * RNG.standard_normal((3, 20_000, 2, 2, 4))
    ratio = stats.norm.logpdf(z, MEAN[:, None], np.exp(0.5 * LOG_VARIANCE)[:, None]) - stats.norm.logpdf(z)
    ratio = ratio.sum((2, 3, 4))
    error = (GAUSSIAN.kl_to_standard() - ratio.mean(1)) / (ratio.std(1) / np.sqrt(20_000))
    assert np.abs(error).max() < 4, error


def test_log_prob_is_scipys():
    z = RNG.standard_normal(MEAN.shape)
    expected = stats.norm.logpdf(z, MEAN, np.exp(0.5 * LOG_VARIANCE)).sum((1, 2, 3))
    np.testing.assert_allclose(GAUSSIAN.log_prob(jnp.asarray(z, jnp.float32)), expected, rtol=2e-5)


def test_samples_have_the_mean_the_variance_and_no_correlation():
    keys = jax.random.split(jax.random.key(0), 20_000)
    z = np.asarray(jax.jit(jax.vmap(GAUSSIAN.sample))(keys), np.float64).reshape(20_000, -1)
    std = np.exp(0.5 * LOG_VARIANCE).ravel()
    standardised = (z - MEAN.ravel()) / std
    covariance = standardised.T @ standardised / len(z)
    assert np.abs(standardised.mean(0)).max() < 4.5 / np.sqrt(20_000)
    assert np.abs(covariance - np.eye(48)).max() < 5.5 * np.sqrt(2 / 20_000)


def test_a_key_for_each_example_makes_it_independent_of_the_batch():
    keys = jax.random.split(jax.random.key(0), 3)
    z = GAUSSIAN.sample(keys)
    for i in range(3):
        one = Gaussian(GAUSSIAN.mean[i : i + 1], GAUSSIAN.log_variance[i : i + 1])
        np.testing.assert_array_equal(one.sample(keys[i : i + 1])[0], z[i])
    assert not np.allclose(GAUSSIAN.sample(jax.random.key(0))[0], z[0])


def test_gradient_goes_through_a_sample():
    """Reparameterised: dz/dmean = 1 and dz/dlog_variance = (z - mean) / 2."""
    key = jax.random.key(1)
    gradient = jax.grad(lambda gaussian: gaussian.sample(key).sum())(GAUSSIAN)
    np.testing.assert_array_equal(gradient.mean, 1.0)
    np.testing.assert_allclose(gradient.log_variance, (GAUSSIAN.sample(key) - GAUSSIAN.mean) / 2, rtol=1e-5, atol=1e-6)


def test_moments_are_split_and_clipped():
    moments = jnp.array([[1.0, 2.0, -100.0, 100.0]], jnp.bfloat16)
    gaussian = Gaussian.from_moments(moments)
    np.testing.assert_array_equal(gaussian.mean, [[1.0, 2.0]])
    np.testing.assert_array_equal(gaussian.log_variance, [[-30.0, 20.0]])
    assert gaussian.mean.dtype == gaussian.log_variance.dtype == jnp.float32
    assert np.isfinite(gaussian.kl_to_standard()).all() and np.isfinite(gaussian.std).all()
