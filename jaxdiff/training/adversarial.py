"""One step of an autoencoder and its discriminator, as a pure function with two optimisers (Esser et al. 2021, section 3.1).

Both see the same reconstruction: the autoencoder moves to please the discriminator that there was, and the discriminator learns
to tell the very images that were just made. Like `training/step.py` it serves jit on a mesh and pmap alike.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxdiff.config import OptimizerConfig
from jaxdiff.losses import adaptive_weight
from jaxdiff.training.sharding import whole
from jaxdiff.training.state import Batch, Metrics, Params
from jaxdiff.training.step import moving_average

Images = Float[Array, "b h w c"]
Scalar = Float[Array, ""]
Weight = Float[Array, " b"] | None  # of each example, as in `batch_mean`
WATCHED = ("discriminator_loss", "discriminator_grad_norm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdversarialState:
    """A TrainState and the discriminator's parameters and moments, which are empty where there is no discriminator."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    discriminator_params: Params
    discriminator_opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the two players minimise; every scalar is a `batch_mean` over the examples of a batch."""

    reconstruct: Callable[[Params, Batch, Key[Array, ""]], tuple[tuple[Images, Scalar], tuple[Images, Metrics]]]
    """(params, batch, key) -> (reconstructions, KL term), (images, metrics)"""
    reconstruction: Callable[[Any, Images, Images, Weight], tuple[Scalar, Metrics]]
    """(frozen, images, reconstructions, weight) -> how much they differ"""
    last_kernel: Callable[[Params], Array]
    """The decoder's last kernel, of parameters or of their gradient"""
    generator: Callable[[Params, Images, Weight], Scalar] | None = None
    """(discriminator's params, reconstructions, weight) -> small where they pass for real; None: there is no discriminator"""
    discriminator: Callable[[Params, Images, Images, Weight], tuple[Scalar, Metrics]] | None = None
    """(its params, images, reconstructions, weight) -> small where it tells them apart"""
    weight: float = 0.5  # times the adaptive weight
    start: int = 0  # step at which the discriminator begins, and the autoencoder begins to care


def make_adversarial_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    axis_name: str | None = None,
) -> Callable[[AdversarialState, Batch, Key[Array, ""], Any], tuple[AdversarialState, Metrics]]:
    """Build update(state, batch, key, frozen) -> (state, metrics). `axis_name`: the pmap axis, None under jit.

    The autoencoder is differentiated once: the gradients of the reconstructions are mixed first, and then go through it.
    """

    def average(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def update(
        state: AdversarialState, batch: Batch, key: Key[Array, ""], frozen: Any
    ) -> tuple[AdversarialState, Metrics]:
        step_key, example_weight = jax.random.fold_in(key, state.step), batch.get("weight")
        (x_hat, regulariser), pull_back, (x, metrics) = jax.vjp(
            lambda params: objective.reconstruct(params, batch, step_key), whole(state.params), has_aux=True
        )
        difference = jax.value_and_grad(objective.reconstruction, argnums=2, has_aux=True)
        (loss, more), towards_original = difference(whole(frozen), x, x_hat, example_weight)
        metrics |= more
        direction, loss = towards_original, loss + regulariser
        players = (state.discriminator_params, state.discriminator_opt_state)
        if objective.generator is not None:
            begun = state.step >= objective.start
            adversarial, towards_real = _judged(objective.generator, whole(players[0]), x_hat, example_weight, begun)

            def at_last_kernel(direction: Images) -> Array:
                gradient = pull_back((direction, jnp.zeros_like(regulariser)))[0]  # all but one leaf is never computed
                return average(objective.last_kernel(gradient))

            weight = adaptive_weight(at_last_kernel(towards_original), at_last_kernel(towards_real))
            weight = jnp.where(begun, objective.weight * weight, 0.0)
            direction, loss = direction + weight * towards_real, loss + weight * adversarial
            images = (x, x_hat, example_weight)
            players, theirs = _improve(
                objective.discriminator, discriminator_optimizer, players, images, begun, average
            )
            metrics |= {"adversarial": adversarial, "adversarial_weight": weight, **theirs}
        gradient = average(pull_back((direction, jnp.ones_like(regulariser)))[0])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = moving_average(state.ema_params, params, state.step, config)
        metrics = average({"loss": loss, **metrics})
        metrics["grad_norm"] = optax.tree.norm(gradient)
        metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        watched = ("loss", "grad_norm") if objective.generator is None else ("loss", "grad_norm", *WATCHED)
        metrics["finite"] = jnp.isfinite(jnp.stack([metrics[name] for name in watched])).all()
        return AdversarialState(state.step + 1, params, ema_params, opt_state, *players), metrics

    return update


def _judged(
    generator: Callable[[Params, Images, Weight], Scalar], params: Params, x_hat: Images, weight: Weight, begun: Array
) -> tuple[Scalar, Images]:
    """The generator's loss and its gradient in the reconstructions; zeros before the discriminator begins."""
    zeros = (jnp.zeros(()), jnp.zeros_like(x_hat))
    return _once(begun, lambda: jax.value_and_grad(generator, argnums=1)(params, x_hat, weight), zeros)


def _improve(
    loss: Any, optimizer: optax.GradientTransformation, players: Any, images: Any, begun: Array, average: Any
) -> tuple[Any, Metrics]:
    """The discriminator after its step, and its metrics; untouched before it begins."""
    images = jax.lax.stop_gradient(images)  # reconstructions among them

    def step() -> tuple[Any, Metrics]:
        params, opt_state = players
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(whole(params), *images)
        gradient = average(gradient)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        told = dict(zip(WATCHED, (value, optax.tree.norm(gradient)), strict=True))
        return (optax.apply_updates(params, updates), opt_state), {**told, **metrics}

    shapes = jax.eval_shape(lambda: loss(players[0], *images))[1]
    nothing = {name: jnp.zeros(()) for name in (*WATCHED, *shapes)}
    return _once(begun, step, (players, nothing))


def _once(begun: Array, act: Callable[[], Any], otherwise: Any) -> Any:
    """What `act` gives, at the cost of nothing before it has `begun`.

    But for the CPU, where XLA computes convolutions many times slower inside a conditional: there it always acts.
    """

    def choose() -> Any:
        return jax.tree.map(lambda new, old: jnp.where(begun, new, old), act(), otherwise)

    return jax.lax.platform_dependent(cpu=choose, default=lambda: jax.lax.cond(begun, act, lambda: otherwise))
