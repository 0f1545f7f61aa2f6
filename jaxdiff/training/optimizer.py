"""Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019) and Muon (Jordan et al. 2024) with warm-up, by optax."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxdiff.config import OptimizerConfig

MUON_MOMENTUM = 0.95  # of https://kellerjordan.github.io/posts/muon
MUON_RMS = 0.2  # of an update, as Adam's is about: its learning rates serve (Liu et al. 2025, arXiv:2502.16982)


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then constant or a half cosine that reaches 0 at `num_steps`."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        after: optax.Schedule = optax.cosine_decay_schedule(rate, max(num_steps - config.warmup_steps, 1))
    else:
        after = optax.constant_schedule(rate)
    if not config.warmup_steps:
        return after
    # Step n (from 0) uses (n + 1) / warmup_steps of the rate: the first step already moves.
    warmup = optax.linear_schedule(rate / config.warmup_steps, rate, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The whole gradient transformation: clipping by global norm, moments, decay, learning rate.

    "muon" makes the momentum of every kernel, a matrix from all that comes in to what goes out, orthogonal; what is no
    kernel (biases, norms, embeddings) is left to Adam with Nesterov's momentum (Dozat 2016).
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    rate = learning_rate_schedule(config, num_steps)
    if config.name == "muon":
        orthogonal = muon(
            rate,
            beta=MUON_MOMENTUM,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_kernels,
        )
        return optax.chain(*clip, orthogonal)
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.name == "adamw" else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        *decay,
        optax.scale_by_learning_rate(rate),
    )


def _kernels(params: Any) -> Any:
    """How each kernel is a matrix (its last axis is what goes out), None for every other parameter."""

    def matrix(path: jax.tree_util.KeyPath, parameter: jax.Array) -> MuonDimensionNumbers | None:
        if getattr(path[-1], "key", None) != "kernel" or parameter.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(parameter.ndim - 1)), parameter.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)
