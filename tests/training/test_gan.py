"""The two-player update on players simple enough to know what must come out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.config import OptimizerConfig
from jaxdiff.training import gan
from jaxdiff.training.optimizer import make_optimizer

EMA = OptimizerConfig(ema_decay=0.75, ema_warmup=False)
ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1, beta1=0.5, beta2=0.9, clip_norm=0.0), 1)
SGD = optax.sgd(1.0)
KEY = jax.random.key(0)


def params(seed):
    key = jax.random.key(seed)
    return {"now": {"w": jax.random.normal(key, (3,))}, "later": {"w": jax.random.normal(key, (2,))}}


def product(mine, other, batch, key, alpha):
    """Its gradient is what the other player is: so it tells which of the other's states was seen."""
    return (mine["now"]["w"] * other["now"]["w"]).sum() * batch["scale"].mean(), {}


def game(**changes):
    calm = {"discriminator": product, "generator": product, "active": lambda p: {"now": p["now"]}}
    return gan.Game(**{**calm, "alpha": lambda step: jnp.float32(1), "resets": (0,), **changes})


def batch(scale=1.0):
    return {"scale": jnp.full((4,), scale, jnp.float32)}


def start(optimizer, step=0):
    state = gan.create_gan_state(params(0), params(1), optimizer, optimizer)
    return dataclasses.replace(state, step=jnp.int32(step), ema_params=params(2))


def updated(state, optimizer, **changes):
    return jax.jit(gan.make_gan_update(game(**changes), optimizer, optimizer, EMA))


@pytest.mark.parametrize("together", [False, True])
def test_discriminator_then_average_then_generator(together):
    state = start(SGD)
    new, _ = updated(state, SGD, together=together)(state, batch(), KEY)
    g0, d0, ema0 = (np.asarray(p["now"]["w"]) for p in (state.params, state.discriminator_params, state.ema_params))
    d1 = d0 - g0
    np.testing.assert_allclose(new.discriminator_params["now"]["w"], d1, rtol=1e-6)
    np.testing.assert_allclose(new.ema_params["now"]["w"], 0.75 * ema0 + 0.25 * g0, rtol=1e-6)  # of g0, not of g1
    np.testing.assert_allclose(new.params["now"]["w"], g0 - (d0 if together else d1), rtol=1e-6)
    assert int(new.step) == 1


def test_only_the_active_part_is_touched():
    state = start(ADAM)
    for _ in range(3):
        new, _ = updated(state, ADAM)(state, batch(), KEY)
    for field in ("params", "ema_params", "discriminator_params"):
        before, after = getattr(state, field), getattr(new, field)
        np.testing.assert_array_equal(before["later"]["w"], after["later"]["w"])
        assert (before["now"]["w"] != after["now"]["w"]).all()
    moments = optax.tree.get(new.opt_state, "nu")
    assert not moments["later"]["w"].any() and moments["now"]["w"].all()
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_a_new_state_can_be_donated():
    state = gan.create_gan_state(params(0), params(1), ADAM, ADAM)
    donating = jax.jit(gan.make_gan_update(game(), ADAM, ADAM, EMA), donate_argnums=0)
    new, _ = donating(state, batch(), KEY)  # "Attempt to donate the same buffer twice" where leaves share an array
    assert state.params["now"]["w"].is_deleted() and (int(new.step), int(new.skipped)) == (1, 0)


@pytest.mark.parametrize("field", ["opt_state", "discriminator_opt_state"])
def test_adam_forgets_where_the_game_says_so(field):
    state = start(ADAM)
    update = updated(state, ADAM, resets=(0, 3))
    for step in range(5):
        before, (state, _) = state, update(state, batch(), KEY)
        adam = getattr(state, field)[0]
        gradient = before.params if field == "discriminator_opt_state" else state.discriminator_params
        first = 0.1 * np.asarray(gradient["now"]["w"]) ** 2  # the second moment after a first step
        assert np.allclose(adam.nu["now"]["w"], first, rtol=1e-5) == (step in (0, 3))
        assert int(adam.count) == (step - 3 if step >= 3 else step) + 1


@pytest.mark.parametrize("bad", ["discriminator", "generator"])
def test_an_update_that_is_not_finite_is_left_out_and_counted(bad):
    def may_fail(mine, other, batch, key, alpha):
        loss, metrics = product(mine, other, batch, key, alpha)
        return loss / batch["good"].mean() + loss / batch["good"].mean(), metrics

    state = start(ADAM)
    update = updated(state, ADAM, **{bad: may_fail})
    state, metrics = update(state, batch() | {"good": jnp.ones(4)}, KEY)
    assert float(metrics["skipped"]) == 0
    new, metrics = update(state, batch() | {"good": jnp.zeros(4)}, KEY)
    hit, other = ("discriminator_params", "params") if bad == "discriminator" else ("params", "discriminator_params")
    np.testing.assert_array_equal(getattr(new, hit)["now"]["w"], getattr(state, hit)["now"]["w"])
    assert (getattr(new, other)["now"]["w"] != getattr(state, other)["now"]["w"]).all()
    moments = "opt_state" if bad == "generator" else "discriminator_opt_state"
    for a, b in zip(jax.tree.leaves(getattr(new, moments)), jax.tree.leaves(getattr(state, moments)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (float(metrics["skipped"]), bool(metrics["finite"]), int(new.skipped_in_a_row)) == (1, True, 1)
    new, metrics = update(new, batch() | {"good": jnp.ones(4)}, KEY)
    assert (float(metrics["skipped"]), int(new.skipped_in_a_row)) == (1, 0)
    for _ in range(gan.MOST_SKIPPED):
        new, metrics = update(new, batch() | {"good": jnp.zeros(4)}, KEY)
    assert not metrics["finite"]
