"""The autoencoders' losses, against probabilistic PCA (a linear VAE), whose likelihood is known, and closed forms.

x = W z + mu + s e (Tipping & Bishop 1999): log p(x) = log N(x; mu, W W' + s^2 I), and p(z | x) = N(M^-1 W' (x - mu), s^2 M^-1)
with M = W' W + s^2 I. The columns of W are orthogonal here, so that the posterior is a diagonal Gaussian.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxdiff import losses
from jaxdiff.models.gaussian import Gaussian
from tests.models.tiny_networks import jit

RNG = np.random.default_rng(0)
D, LATENTS, B, S = 6, 2, 3, 0.4
W = np.linalg.qr(RNG.standard_normal((D, LATENTS)))[0] * [1.2, 0.5]
MU = 0.3 * RNG.standard_normal(D)
X = MU + RNG.standard_normal((B, LATENTS)) @ W.T + S * RNG.standard_normal((B, D))
LOG_P = stats.multivariate_normal(MU, W @ W.T + S**2 * np.eye(D)).logpdf(X)
PRECISION = np.diag(W.T @ W) / S**2 + 1  # of the posterior
POSTERIOR = (X - MU) @ W / S**2 / PRECISION, np.broadcast_to(-np.log(PRECISION), (B, LATENTS))
WRONG = POSTERIOR[0] + 0.3, POSTERIOR[1] + np.array([0.5, -0.7])


def gaussian(moments):
    return Gaussian(*(jnp.asarray(moment, jnp.float32) for moment in moments))


def reconstruction(z):
    """The decoder's log p(x | z), z [b latents]."""
    mean = jnp.asarray(MU[None], jnp.float32) + jnp.matmul(z, jnp.asarray(W.T, jnp.float32), precision="highest")
    return losses.normal_log_density(jnp.asarray(X, jnp.float32), mean, math.log(S))


def expected_reconstruction(moments):
    """E_q[log p(x | z)] in closed form, float64."""
    mean, log_variance = moments
    at_mean = stats.norm.logpdf(X, MU + mean @ W.T, S).sum(1)
    return at_mean - (np.exp(log_variance) * np.diag(W.T @ W)).sum(1) / (2 * S**2)


def elbo(moments, **options):
    reconstructed = jnp.asarray(expected_reconstruction(moments), jnp.float32)
    return np.asarray(losses.autoencoder_elbo(reconstructed, gaussian(moments), **options))


def log_weights(moments, count):
    q = gaussian(moments)

    def one(key):
        z = q.sample(key)
        return losses.log_importance_weight(reconstruction(z), q, z)

    return jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))


def test_elbo_is_the_likelihood_at_the_optimal_posterior():
    np.testing.assert_allclose(elbo(POSTERIOR), LOG_P, rtol=1e-5, atol=1e-5)


def test_elbo_is_below_by_the_divergence_from_the_posterior():
    """For any other q, log p(x) - ELBO = KL(q(z | x) || p(z | x)) > 0."""
    for scale in (0.1, 0.5, 1.0, 3.0):
        mean, log_variance = (p + scale * (w - p) for p, w in zip(POSTERIOR, WRONG, strict=True))
        ratio = np.exp(log_variance - POSTERIOR[1])
        kl = 0.5 * (ratio - 1 - np.log(ratio) + (mean - POSTERIOR[0]) ** 2 * PRECISION).sum(1)
        assert (kl > 0).all()
        np.testing.assert_allclose(LOG_P - elbo((mean, log_variance)), kl, rtol=1e-4, atol=1e-5)


def test_every_sample_of_the_optimal_posterior_weighs_the_likelihood():
    """Then log p(x, z) - log q(z | x) is log p(x) whatever z; for another q its mean is the ELBO."""
    np.testing.assert_allclose(log_weights(POSTERIOR, 50), np.broadcast_to(LOG_P, (50, B)), rtol=1e-4, atol=1e-4)
    sampled = np.asarray(log_weights(WRONG, 4096), np.float64)
    error = (sampled.mean(0) - elbo(WRONG)) / (sampled.std(0) / 64)
    assert np.abs(error).max() < 4, error


def test_iwae_rises_to_the_likelihood():
    """Groups of k samples lie in groups of 4 k, so the mean over groups cannot fall (Jensen); it ends close to log p."""
    weights = log_weights(WRONG, 4096)
    bounds = []
    for k in (1, 4, 16, 64, 256):
        groups = np.asarray(weights).reshape(4096 // k, k, B)
        bounds.append(np.asarray(jit(jax.vmap(losses.iwae_bound))(groups), np.float64).mean(0))
    np.testing.assert_allclose(bounds[0], np.asarray(weights, np.float64).mean(0), rtol=1e-5)
    assert (np.diff(bounds, axis=0) > 0).all()
    gaps = LOG_P - np.array(bounds)
    assert (gaps[-1] < 0.1 * gaps[0]).all() and (gaps[-1] > -0.05).all(), gaps


def test_iwae_is_finite_for_very_unlikely_images():
    bound = losses.iwae_bound(jnp.array([[-5000.0], [-5001.0]]))
    np.testing.assert_allclose(bound, -5000 + np.log((1 + np.exp(-1)) / 2), rtol=1e-6)


def test_beta_weighs_the_divergence():
    kl = np.asarray(gaussian(WRONG).kl_to_standard())
    np.testing.assert_allclose(elbo(WRONG) - elbo(WRONG, beta=3.0), 2 * kl, rtol=1e-4)
    np.testing.assert_allclose(losses.kl_with_free_bits(gaussian(WRONG)), kl, rtol=1e-5)
    assert (elbo(WRONG, beta=2.0) < LOG_P).all()


def test_free_bits_are_floors_of_channels():
    """Below the floor a channel costs the floor and pulls at nothing; above it costs what it costs."""
    mean = jnp.zeros((1, 3, 3, 2)).at[..., 1].set(1.0)
    q = Gaussian(mean, jnp.full_like(mean, -0.1))
    free, costly = 9 * 0.5 * (math.exp(-0.1) - 1 + 0.1), 9 * 0.5 * (1 + math.exp(-0.1) - 1 + 0.1)
    for floor, expected in [(0.0, free + costly), (0.5, 0.5 + costly), (10.0, 20.0)]:
        np.testing.assert_allclose(losses.kl_with_free_bits(q, floor), [expected], rtol=1e-5)
    gradient = jax.grad(lambda q: losses.kl_with_free_bits(q, 0.5).sum())(q)
    np.testing.assert_array_equal(gradient.log_variance[..., 0], 0.0)
    np.testing.assert_array_equal(gradient.mean[..., 1], 1.0)


def test_free_bits_of_an_image_hang_on_that_image_only():
    q = Gaussian(jnp.array([[0.0, 2.0], [3.0, 0.0]]), jnp.zeros((2, 2)))
    np.testing.assert_allclose(losses.kl_with_free_bits(q, 0.25), [2.25, 4.75])


def test_gaussian_decoder_is_scipys_density():
    x, mean = RNG.standard_normal((2, B, 2, 2, 1))
    x32, mean32 = jnp.asarray(x, jnp.float32), jnp.asarray(mean, jnp.float32)
    expected = stats.norm.logpdf(x, mean, np.exp(-0.7)).sum((1, 2, 3))
    np.testing.assert_allclose(losses.normal_log_density(x32, mean32, -0.7), expected, rtol=1e-5)
    for log_std in (jnp.float32(-0.7), jnp.full(x32.shape, -0.7)):
        np.testing.assert_allclose(losses.normal_log_density(x32, mean32, log_std), expected, rtol=1e-5)
    learned = jax.grad(lambda log_std: losses.normal_log_density(x32, mean32, log_std).sum())(jnp.float32(0.0))
    np.testing.assert_allclose(learned, ((x - mean) ** 2 - 1).sum(), rtol=1e-4)


def test_bernoulli_decoder_is_a_distribution():
    """The probabilities of all 2^4 images add up to 1, and one of them is a product of sigmoids."""
    images = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=4))).reshape(16, 2, 2, 1)
    logits = np.array([-3.0, 0.2, 1.0, 40.0])
    log_p = losses.bernoulli_log_likelihood(images, jnp.broadcast_to(logits.reshape(1, 2, 2, 1), (16, 2, 2, 1)))
    np.testing.assert_allclose(special.logsumexp(np.asarray(log_p, np.float64)), 0.0, atol=1e-5)
    signs = np.asarray(images).reshape(16, 4)
    np.testing.assert_allclose(log_p, special.log_expit(signs * logits).sum(1), rtol=1e-5)


def test_bernoulli_of_grey_is_the_cross_entropy():
    log_p = losses.bernoulli_log_likelihood(jnp.array([[0.5]]), jnp.array([[0.3]]))
    np.testing.assert_allclose(log_p[0], 0.75 * special.log_expit(0.3) + 0.25 * special.log_expit(-0.3), rtol=1e-6)


@pytest.mark.parametrize("log_std", [-3.0, 0.0])
def test_discretised_decoder_is_a_distribution_over_levels(log_std):
    levels = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32).reshape(256, 1, 1, 1)
    log_likelihood = jit(losses.discretized_normal_log_likelihood)
    log_p = log_likelihood(levels, jnp.full_like(levels, 0.2), log_std)
    np.testing.assert_allclose(special.logsumexp(np.asarray(log_p, np.float64)), 0.0, atol=1e-4)
    pair = jnp.concatenate([levels[:3], levels[100:103]], axis=1)
    both = log_likelihood(pair, jnp.full_like(pair, 0.2), log_std)
    np.testing.assert_allclose(both, log_p[:3] + log_p[100:103], rtol=1e-6)


def test_bits_per_dimension():
    """A model that knows nothing gives each of 256 levels the same mass: 8 bits."""
    np.testing.assert_allclose(losses.nats_to_bits_per_dim(jnp.array([-784 * math.log(256)]), 784), [8.0], rtol=1e-6)


def test_absolute_and_squared_error():
    x, y = jnp.array([[[1.0, -2.0]], [[0.0, 0.0]]]), jnp.array([[[0.0, 1.0]], [[0.5, 0.5]]])
    np.testing.assert_allclose(losses.absolute_error(x, y), [2.0, 0.5])
    np.testing.assert_allclose(losses.squared_error(x, y), [5.0, 0.25])


REAL, FAKE = jnp.array([[0.5, 1.5, -2.0, 3.0]]), jnp.array([[-0.5, -1.5, 2.0, -3.0]])


def gradient(loss, *logits):
    return jit(jax.grad(lambda *logits: loss(*logits).sum(), argnums=tuple(range(len(logits)))))(*logits)


def test_hinge_loss_and_its_gradient_stop_at_the_margin():
    np.testing.assert_allclose(losses.hinge_discriminator_loss(REAL, FAKE), [0.5 * (3.5 + 3.5) / 4])
    real, fake = gradient(losses.hinge_discriminator_loss, REAL, FAKE)
    np.testing.assert_allclose(real, [[-0.125, 0, -0.125, 0]])
    np.testing.assert_allclose(fake, [[0.125, 0, 0.125, 0]])
    np.testing.assert_allclose(gradient(losses.hinge_generator_loss, FAKE)[0], jnp.full((1, 4), -0.25))


def test_non_saturating_loss_and_its_gradient():
    """At the optimal discriminator, logit = log(p_data / p_model), the expected gradient is zero."""
    expected = -0.5 * (special.log_expit(np.asarray(REAL)) + special.log_expit(-np.asarray(FAKE))).mean(1)
    np.testing.assert_allclose(losses.non_saturating_discriminator_loss(REAL, FAKE), expected, rtol=1e-6)
    p_data, p_model = 0.7, 0.2
    logit = jnp.log(jnp.full((1, 1), p_data / p_model))
    real, fake = gradient(losses.non_saturating_discriminator_loss, logit, logit)
    np.testing.assert_allclose(p_data * real + p_model * fake, 0.0, atol=1e-7)
    generator = gradient(losses.non_saturating_generator_loss, FAKE)[0]
    np.testing.assert_allclose(generator, -special.expit(-np.asarray(FAKE)) / 4, rtol=1e-6)


def test_adversarial_losses_are_one_number_an_image():
    real, fake = jax.random.normal(jax.random.key(0), (2, 3, 5, 5, 1))
    for loss in (losses.hinge_discriminator_loss, losses.non_saturating_discriminator_loss):
        together = loss(real, fake)
        assert together.shape == (3,)
        np.testing.assert_allclose(loss(real[1:2], fake[1:2]), together[1:2], rtol=1e-6)
    assert float(losses.hinge_discriminator_loss(real + 9, fake - 9).max()) == 0.0  # told apart: nothing to learn


def test_adaptive_weight_makes_both_gradients_as_long():
    reconstruction_gradient = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([12.0])}  # of length 13
    adversarial = jax.tree.map(lambda g: 0.1 * g[::-1], reconstruction_gradient)
    weight = losses.adaptive_weight(reconstruction_gradient, adversarial)
    np.testing.assert_allclose(weight, 13 / (1.3 + 1e-4), rtol=1e-6)
    assert losses.adaptive_weight(reconstruction_gradient, jnp.zeros(2)) == 1e4  # no gradient yet
    assert losses.adaptive_weight(jnp.zeros(2), adversarial) == 0
    slope = jax.grad(lambda g: losses.adaptive_weight(g, adversarial))(reconstruction_gradient)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope))  # a constant, as far as training goes
