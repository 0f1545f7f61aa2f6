"""The losses of generative adversarial networks: linear critics in closed form, finite differences in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxdiff import losses
from jaxdiff.config import ShardingConfig
from jaxdiff.models.progressive_gan import Discriminator
from jaxdiff.training.sharding import batch_sharding, make_mesh
from tests.models.tiny_networks import jit, random_parameters

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
W = jax.random.normal(jax.random.key(1), (4, 4, 2))


def linear(scale=1.0):
    return lambda x: scale * (x * W[None]).sum((1, 2, 3)) + 5


@pytest.mark.parametrize("gamma", [1.0, 750.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_penalty_of_a_linear_critic(gamma, scale):
    """Its gradient is w everywhere: the penalty is (|w| - gamma)^2 / gamma^2, and R1 |w|^2 / 2."""
    length = scale * math.sqrt((np.asarray(W, np.float64) ** 2).sum())
    penalty = losses.gradient_penalty(linear(scale), X, gamma)
    np.testing.assert_allclose(penalty, [(length - gamma) ** 2 / gamma**2] * 3, rtol=1e-4)
    np.testing.assert_allclose(losses.r1_penalty(linear(scale), X), [length**2 / 2] * 3, rtol=1e-5)


def test_a_critic_as_steep_as_gamma_pays_nothing_and_a_flat_one_learns():
    length = jnp.sqrt((W**2).sum())
    np.testing.assert_allclose(losses.gradient_penalty(linear(750 / length), X, 750.0), 0.0, atol=1e-10)
    np.testing.assert_array_equal(losses.gradient_penalty(lambda x: 0 * x.sum((1, 2, 3)), X), 1.0)
    slope = jax.grad(lambda scale: losses.gradient_penalty(linear(scale), X).sum())
    assert slope(0.0) == 0 and slope(0.1) < 0 < slope(10.0)  # finite at 0, and towards a slope of 1 elsewhere


def discriminator(group_size):
    network = Discriminator(
        resolution=8, channel_base=16, channel_max=6, group_size=group_size, dtype="float64", param_dtype="float64"
    )
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1))
    return network, jnp.asarray(x), random_parameters(network, x, scale=1.0)


def penalty_by_differences(critic, x, gamma, step=1e-6):
    """With |grad| from the difference of sum(D) when one pixel changes, for each pixel."""
    total = jit(jax.vmap(lambda x: critic(x).sum()))
    moves = step * np.eye(x.size).reshape(x.size, *x.shape)
    gradient = np.asarray(total(x[None] + moves) - total(x[None] - moves)).reshape(len(x), -1) / (2 * step)
    return (np.sqrt((gradient**2).sum(1)) - gamma) ** 2 / gamma**2


@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_penalty_of_a_discriminator_by_finite_differences(gamma):
    """It sees the minibatch's standard deviation: the gradient is that of the sum of all scores."""
    with jax.enable_x64(True):
        network, x, params = discriminator(4)

        def critic(x, params=params):
            return network.apply(params, x, stage=1, alpha=0.4)[0]

        penalty = jit(lambda x: losses.gradient_penalty(critic, x, gamma))(x)
        assert penalty.dtype == np.float64
        np.testing.assert_allclose(penalty, penalty_by_differences(critic, x, gamma), rtol=1e-6)
        # Each score's own gradient would miss what an image does to the others' scores.
        own = jit(jax.vmap(lambda i: jax.grad(lambda x: critic(x)[i])(x)[i]))(jnp.arange(4))
        alone = (jnp.sqrt((own**2).sum((1, 2, 3))) - gamma) ** 2 / gamma**2
        assert np.abs(alone / penalty - 1).max() > 1e-3


def test_gradient_of_the_penalty_in_the_parameters_by_finite_differences():
    with jax.enable_x64(True):
        network, x, params = discriminator(4)
        direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)

        def along(step):
            moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
            return losses.gradient_penalty(lambda x: network.apply(moved, x, stage=1, alpha=0.4)[0], x).mean()

        value = jit(along)
        by_differences = (value(1e-6) - value(-1e-6)) / 2e-6
        np.testing.assert_allclose(jit(jax.grad(along))(0.0), by_differences, rtol=1e-5)
        assert abs(by_differences) > 1e-2


def test_mixed_images_lie_on_the_line_each_by_its_own_key():
    keys = jax.random.split(jax.random.key(2), 3)
    mixed = losses.mix_images(X, X + W[None], keys)
    weights = (mixed - X) / W[None]
    assert ((weights > 0) & (weights < 1)).all() and len(np.unique(np.round(weights[:, 0, 0, 0], 4))) == 3
    np.testing.assert_allclose(weights, jnp.broadcast_to(weights[:, :1, :1, :1], weights.shape), atol=1e-4)
    np.testing.assert_array_equal(losses.mix_images(X[1:2], X[1:2] + W[None], keys[1:2]), mixed[1:2])
    weights = losses.mix_images(jnp.zeros((2000, 1, 1, 1)), jnp.ones((2000, 1, 1, 1)), jax.random.split(keys[0], 2000))
    np.testing.assert_allclose([weights.mean(), weights.var()], [1 / 2, 1 / 12], rtol=0.05)


def test_wgan_gp_is_its_formula():
    real, fake, penalty = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5]), jnp.array([0.25, 4.0])
    np.testing.assert_allclose(
        losses.wgan_gp_discriminator_loss(real, fake, penalty), [2 + 2.5 + 0.001, 2.5 + 40 + 0.004], rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.wgan_gp_discriminator_loss(real, fake, penalty, 3.0, 0.0), [2.75, 14.5], rtol=1e-6
    )


def test_drift_keeps_the_scores_near_zero():
    """Adding a constant to all scores changes the loss by drift only: the best constant makes real scores 0 on average."""
    real, fake, penalty = jnp.array([700.0, 900.0]), jnp.array([-3.0, 2.0]), jnp.zeros(2)
    shifted = jax.grad(lambda c: losses.wgan_gp_discriminator_loss(real + c, fake + c, penalty).mean())
    np.testing.assert_allclose(shifted(-800.0), 0.0, atol=1e-6)
    np.testing.assert_allclose(shifted(0.0), 2e-3 * 800, rtol=1e-5)


def test_r1_is_its_formula():
    real, fake, penalty = (np.array(values) for values in ([1.0, -2.0], [3.0, 0.5], [0.25, 4.0]))
    expected = -special.log_expit(real) - special.log_expit(-fake) + 10 * penalty
    np.testing.assert_allclose(losses.r1_discriminator_loss(real, fake, penalty), expected, rtol=1e-6)
    unweighted = losses.r1_discriminator_loss(real, fake, penalty, 0.0)
    np.testing.assert_allclose(unweighted, 2 * losses.non_saturating_discriminator_loss(real, fake), rtol=1e-6)


def test_class_loss_of_known_probabilities():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    value = losses.class_loss(jnp.log(probabilities) + 3, jnp.array([0, 1]))
    np.testing.assert_allclose(value, -np.log([0.5, 0.2]), rtol=1e-5)


def test_the_penalty_on_four_devices_is_that_of_one():
    """Minibatch statistics within each device's share: loss and gradient are the same wherever the parts are."""
    network = Discriminator(resolution=8, channel_base=16, channel_max=6, shards=4)
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    params = random_parameters(network, x, scale=1.0)

    def penalty(params, x):
        return losses.gradient_penalty(lambda x: network.apply(params, x, stage=1, alpha=0.4)[0], x).mean()

    mesh = make_mesh(ShardingConfig(), jax.devices()[:4])
    program = jit(jax.value_and_grad(penalty))
    alone, together = program(params, x), program(params, jax.device_put(x, batch_sharding(mesh)))
    assert len(together[0].sharding.device_set) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), alone, together)
