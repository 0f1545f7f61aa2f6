"""What the tests of networks share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

# A test's program runs once or twice: compiling it is all the time it takes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_parameters(network, *inputs, scale: float = 0.3, seed: int = 0) -> PyTree:
    """Normal numbers in every parameter: initial scales of 1 and weights or biases of 0 hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
