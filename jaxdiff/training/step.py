"""One step of training as a pure function: `update(state, batch, key) -> (state, metrics)`.

The same function serves one device, a mesh (under `jit`, where the batch is global and XLA adds the collectives) and `jax.pmap`
(where the batch is one device's share and the gradient is averaged over `axis_name` here).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxdiff.config import OptimizerConfig
from jaxdiff.training.sharding import whole, whole_tables
from jaxdiff.training.state import Batch, Metrics, Params, TrainState

Loss = Callable[..., tuple[Float[Array, ""], Metrics]]  # of (params, batch, key), then what is frozen, if anything is
Update = Callable[..., tuple[TrainState, Metrics]]  # of (state, batch, key), then what is frozen


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """Decay of the moving average at `step`: with warm-up min(decay, (1 + n) / (10 + n)), so that it forgets the start."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.float32(decay)


def moving_average(average: Params, params: Params, step: Int[Array, ""], config: OptimizerConfig) -> Params:
    """The average after the update from `step` to the next, in its own dtype."""
    decay = ema_decay(step, config.ema_decay, config.ema_warmup)
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(e.dtype) - e), average, params)


def accumulated_gradient(
    loss: Loss, params: Params, batch: Batch, key: Key[Array, ""], steps: int
) -> tuple[Params, Metrics]:
    """Mean gradient and metrics over `steps` micro-batches.

    Micro-batch j holds the examples with position = j modulo `steps`: a batch sharded over devices stays where it is.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if steps == 1:
        (value, metrics), gradient = value_and_grad(params, batch, key)
        return whole_tables(gradient), {"loss": value, **metrics}
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: tuple[Params, Metrics], part: tuple[Batch, Array]) -> tuple[tuple[Params, Metrics], None]:
        micro_batch, j = part
        (value, metrics), gradient = value_and_grad(params, micro_batch, jax.random.fold_in(key, j))
        return jax.tree.map(jnp.add, total, (whole_tables(gradient), {"loss": value, **metrics})), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: accumulated_gradient(loss, params, first, key, 1))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(steps)))
    return jax.tree.map(lambda x: x / steps, total)


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    accumulation_steps: int = 1,
    axis_name: str | None = None,
) -> Update:
    """Build the update of a loss that is a `batch_mean` over examples. `axis_name`: the pmap axis, None under jit.

    The run's key is folded with the step, so that step n draws the same numbers whenever and wherever it is made.
    """

    def update(state: TrainState, batch: Batch, key: Key[Array, ""], *frozen: Any) -> tuple[TrainState, Metrics]:
        def of_trained(params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
            return loss(params, batch, key, *whole(frozen))

        step_key = jax.random.fold_in(key, state.step)
        gradient, metrics = accumulated_gradient(of_trained, whole(state.params), batch, step_key, accumulation_steps)
        if axis_name is not None:
            gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = moving_average(state.ema_params, params, state.step, config)
        grad_norm = optax.tree.norm(gradient)
        metrics |= {"grad_norm": grad_norm, "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32)}
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return update
