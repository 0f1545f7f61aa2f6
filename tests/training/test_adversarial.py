"""The step of an autoencoder and its discriminator, on players of one number each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.config import OptimizerConfig
from jaxdiff.training.adversarial import AdversarialState, Objective, make_adversarial_update

SGD = optax.sgd(0.1)
X = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)


def objective(discriminator, start=0):
    """Reconstructions are w x; `discriminator`: the second player's loss as a function of its number d."""

    def reconstruct(params, batch, key):
        return (params["w"] * batch["image"], jnp.zeros(())), (batch["image"], {})

    return Objective(
        reconstruct,
        reconstruction=lambda frozen, x, x_hat, weight: (((x - x_hat) ** 2).mean(), {}),
        last_kernel=lambda params: params["w"],
        generator=lambda d, x_hat, weight: (d["d"] * x_hat).mean(),
        discriminator=lambda d, x, x_hat, weight: (discriminator(d["d"]), {}),
        start=start,
    )


def one_step(discriminator, start=0):
    params, d = {"w": jnp.float32(0.5)}, {"d": jnp.float32(2)}
    state = AdversarialState(jnp.int32(0), params, params, SGD.init(params), d, SGD.init(d))
    update = make_adversarial_update(objective(discriminator, start), SGD, SGD, OptimizerConfig(), lambda step: 0.1)
    return jax.jit(update)(state, {"image": X}, jax.random.key(0), {})


@pytest.mark.parametrize(
    ("discriminator", "named"),
    [
        (lambda d: d * jnp.inf, "discriminator_loss"),
        (lambda d: jnp.sqrt(d - 2), "discriminator_grad_norm"),  # 0, with a slope that is infinite
    ],
)
def test_a_discriminator_that_is_not_finite_is_no_good_step(discriminator, named):
    """It reaches the autoencoder's loss a step later only: until then a checkpoint would have held it."""
    _, metrics = one_step(discriminator)
    assert not metrics["finite"] and not np.isfinite(metrics[named])
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert one_step(discriminator, start=1)[1]["finite"], "before it begins it is not asked"


def test_the_discriminator_takes_the_step_whose_norm_is_told():
    state, metrics = one_step(lambda d: 3 * d)
    assert metrics["finite"] and metrics["discriminator_loss"] == 6 and metrics["discriminator_grad_norm"] == 3
    np.testing.assert_allclose(state.discriminator_params["d"], 2 - 0.1 * 3, rtol=1e-6)
