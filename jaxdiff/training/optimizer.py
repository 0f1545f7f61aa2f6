"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019) with warm-up, by optax."""

import optax

from jaxdiff.config import OptimizerConfig


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
    """The whole gradient transformation: clipping by global norm, moments, decay, learning rate."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.name == "adamw" else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        *decay,
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )
