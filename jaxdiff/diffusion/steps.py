"""What all samplers share: the scan over steps, the times of each step, and noise from the right key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

Images = Float[Array, "b h w c"]
Keys = Key[Array, ""] | Key[Array, " b"] | None
Timesteps = Shaped[Array, " n+1"] | Shaped[np.ndarray, " n+1"] | Shaped[Array, "n 2"] | Shaped[np.ndarray, "n 2"]
Carry = TypeVar("Carry")
# constrain(x, s) -> x, applied to the state after every step, s being the time that the step went to (inpainting).
Constrain = Callable[[Images, Shaped[Array, ""]], Images]

INITIAL_NOISE = 2**31 - 1  # folded into the key for x_T: no step has this number


def scan_steps(
    step: Callable[[Carry, Array, tuple[Array, ...]], Carry],
    carry: Carry,
    coefficients: tuple[Array, ...],
    arrivals: Shaped[Array, " n"],
    active: Bool[Array, " n"],
    constrain: Constrain | None,
) -> Carry:
    """Fold step(carry, index, coefficients at index) over the active indices; `cond` makes the others free.

    The carry is x, or a tuple that begins with it; x is constrained after each step, whose time is then `arrivals`.
    """

    def constrained(carry: Carry, s: Array) -> Carry:
        if constrain is None:
            return carry
        if isinstance(carry, tuple):
            return (constrain(carry[0], s), *carry[1:])  # type: ignore[return-value]
        return constrain(carry, s)  # type: ignore[arg-type, return-value]

    def body(carry: Carry, now: tuple[Array, Array, tuple[Array, ...], Any]) -> tuple[Carry, None]:
        index, active, at_index, s = now

        def run(carry: Carry) -> Carry:
            new = constrained(step(carry, index, at_index), s)
            # A denoiser may answer in another precision; the state keeps its own.
            return jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry)

        return lax.cond(active, run, lambda carry: carry, carry), None

    times = None if constrain is None else arrivals
    return lax.scan(body, carry, (jnp.arange(len(active)), active, coefficients, times))[0]


def from_step(start: Int[Array, ""] | int, num: int) -> Bool[Array, " n"]:
    """Steps `start` .. num - 1 are active."""
    return jnp.arange(num) >= start


def step_pairs(timesteps: Timesteps) -> tuple[Array, Array]:
    """(t, s) of each step, from N + 1 times, or from N pairs where a step need not begin at the time the last went to."""
    timesteps = jnp.asarray(timesteps)
    if timesteps.ndim == 2 and timesteps.shape[1] == 2 and len(timesteps) > 0:
        return timesteps[:, 0], timesteps[:, 1]
    if timesteps.ndim != 1 or len(timesteps) < 2:
        raise ValueError(f"timesteps must be a vector of at least 2 times or pairs [n 2], got shape {timesteps.shape}")
    return timesteps[:-1], timesteps[1:]


def arrival_times(t: Shaped[Array, " n"], s: Shaped[Array, " n"]) -> Shaped[Array, " n"]:
    """The time that x has after each step: the t of the next, at the end the last s."""
    return jnp.concatenate([t[1:], s[-1:]])


def per_image(t: Array, x: Images) -> Shaped[Array, " b"]:
    """One time for each image."""
    return jnp.full(x.shape[:1], t)


def at_least_float32(x: Images) -> Images:
    """At least float32: half precision is the network's affair, the sum over steps is not."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def step_noise(key: Keys, index: Array | int, shape: tuple[int, ...], dtype: Any) -> Images:
    """Standard normal noise of one step; with a batch of keys each image's comes from its own key."""
    if key is None:
        raise ValueError("this sampler draws noise: give it a key, or one key per image")
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), shape, dtype)
    if key.shape != shape[:1]:
        raise ValueError(f"{shape[0]} images need one key or {shape[0]} keys, got keys of shape {key.shape}")
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), shape[1:], dtype))(key)
