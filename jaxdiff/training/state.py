"""The state of a training run: all that a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

Params = Any  # a pytree of arrays
# image uint8 [b h w c], label int32 [b], index int32 [b]: the place in the global batch; weight float32 [b] where some examples
# are there only for all devices to have as many
Batch = dict[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, their moving average and the optimiser's moments after `step` updates."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the moving average is kept in float32 whatever the parameters' dtype."""
    ema_params = jax.tree.map(lambda p: jnp.array(p, dtype=jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))
