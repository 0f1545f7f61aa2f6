"""One step of a generator and a discriminator as a pure function with two optimisers, for networks that grow.

The discriminator moves first, then the generator against what the discriminator has become (or both at once). Only the part of
the parameters that is active is differentiated and touched by the optimisers; the state has the shapes of the whole network all
along, so a checkpoint of any time restores alike. Like `training/step.py` it serves jit on a mesh and pmap.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdiff.config import OptimizerConfig
from jaxdiff.training.sharding import whole
from jaxdiff.training.state import Batch, Metrics, Params
from jaxdiff.training.step import moving_average

Scalar = Float[Array, ""]
MOST_SKIPPED = 100  # steps in a row without a finite update, after which there is no hope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GANState:
    """Both networks after `step` updates; `params` and their moving average are the generator's."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    discriminator_params: Params
    discriminator_opt_state: optax.OptState
    skipped: Int[Array, ""]  # updates that were not finite and were left out
    skipped_in_a_row: Int[Array, ""]  # steps


class Game(NamedTuple):
    """What the two minimise while a stage lasts; every loss is a mean over the examples of a batch."""

    discriminator: Callable[[Params, Params, Batch, Key[Array, ""], Scalar], tuple[Scalar, Metrics]]
    """(its params, the generator's params, batch, key, alpha) -> loss, metrics"""
    generator: Callable[[Params, Params, Batch, Key[Array, ""], Scalar], tuple[Scalar, Metrics]]
    """(its params, the discriminator's params, batch, key, alpha) -> loss, metrics"""
    active: Callable[[Params], Params]
    """The part of either network's parameters that the stage uses: some items of a dictionary"""
    alpha: Callable[[Int[Array, ""]], Scalar]
    """How far the stage has faded in at a step"""
    resets: tuple[int, ...]
    """Steps before which both optimisers forget what they have seen"""
    together: bool = False
    """Both take their gradients before either moves, of the same generated images"""


def create_gan_state(
    params: Params,
    discriminator_params: Params,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
) -> GANState:
    """The state before the first update; the moving average begins as the generator itself."""
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))  # an array each: what two leaves share could not be donated
    average = jax.tree.map(lambda p: jnp.array(p, dtype=jnp.float32), params)
    moments = optimizer.init(params), discriminator_optimizer.init(discriminator_params)
    return GANState(next(zeros), params, average, moments[0], discriminator_params, moments[1], *zeros)


def make_gan_update(
    game: Game,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    axis_name: str | None = None,
) -> Callable[[GANState, Batch, Key[Array, ""]], tuple[GANState, Metrics]]:
    """Build update(state, batch, key) -> (state, metrics). `axis_name`: the pmap axis, None under jit.

    The order is Karras et al. 2018's: discriminator, moving average of the generator as it was, generator. An update whose
    gradient is not finite is left out and counted, of each network by itself.
    """

    def average(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def update(state: GANState, batch: Batch, key: Key[Array, ""]) -> tuple[GANState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        d_key, g_key = (step_key, step_key) if game.together else jax.random.split(step_key)
        alpha = game.alpha(state.step)
        fresh = jnp.any(state.step == jnp.array(game.resets))
        g, d = game.active(state.params), game.active(state.discriminator_params)

        def move(
            loss: Any, optimizer: optax.GradientTransformation, params: Params, other: Params, opt_state: Any, key: Any
        ) -> tuple[Params, Any, Scalar, Scalar, Metrics]:
            (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
                whole(params), whole(other), batch, key, alpha
            )
            # A gradient wanted in parts only would be worked out from parts of the activations' channels, sent around for it.
            value, metrics, gradient = average((value, metrics, whole(gradient)))
            norm = optax.tree.norm(gradient)
            moments = _select(fresh, optimizer.init(params), map_params(game.active, opt_state))
            updates, new_moments = optimizer.update(gradient, moments, params)
            good = jnp.isfinite(norm) & jnp.isfinite(value)
            new_params = optax.apply_updates(params, updates)
            params, moments = _select(good, (new_params, new_moments), (params, moments))
            return params, merge_moments(opt_state, moments), value, norm, metrics

        new_d, d_opt_state, d_loss, d_norm, d_metrics = move(
            game.discriminator, discriminator_optimizer, d, g, state.discriminator_opt_state, d_key
        )
        ema_params = moving_average(game.active(state.ema_params), g, state.step, config)
        new_g, opt_state, g_loss, g_norm, g_metrics = move(
            game.generator, optimizer, g, d if game.together else new_d, state.opt_state, g_key
        )
        left_out = [~(jnp.isfinite(norm) & jnp.isfinite(loss)) for norm, loss in ((d_norm, d_loss), (g_norm, g_loss))]
        skipped = state.skipped + sum(one.astype(jnp.int32) for one in left_out)
        in_a_row = jnp.where(left_out[0] | left_out[1], state.skipped_in_a_row + 1, 0)
        metrics = {
            **{"loss": d_loss, "discriminator_loss": d_loss, "generator_loss": g_loss, **d_metrics, **g_metrics},
            **{"grad_norm": d_norm, "generator_grad_norm": g_norm, "alpha": alpha},
            **{"skipped": skipped.astype(jnp.float32), "finite": in_a_row < MOST_SKIPPED},
        }
        new_state = GANState(
            state.step + 1,
            {**state.params, **new_g},
            {**state.ema_params, **ema_params},
            opt_state,
            {**state.discriminator_params, **new_d},
            d_opt_state,
            skipped,
            in_a_row,
        )
        return new_state, metrics

    return update


def _select(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _is_params(node: Any) -> bool:
    return isinstance(node, dict)


def map_params(function: Callable[[Params], Params], opt_state: optax.OptState) -> optax.OptState:
    """An optimiser's state with `function` applied to every dictionary of moments in it."""
    return jax.tree.map(lambda node: function(node) if _is_params(node) else node, opt_state, is_leaf=_is_params)


def merge_moments(opt_state: optax.OptState, part: optax.OptState) -> optax.OptState:
    """The whole network's moments with those of a part in place of what they were; counts are the part's."""
    whole_leaves, tree = jax.tree.flatten(opt_state, is_leaf=_is_params)
    part_leaves = jax.tree.leaves(part, is_leaf=_is_params)
    merged = [
        {**whole, **new} if _is_params(whole) else new for whole, new in zip(whole_leaves, part_leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, merged)
