"""Which attention images are made with: XLA's, or cuDNN's fused kernel where there is one."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxdiff.config import ConfigError
from jaxdiff.models.attention import AttentionImplementation

Attention = Literal["auto", "xla", "cudnn"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
HALVES = ("bfloat16", "float16")


def attention_of(wanted: Attention, dtype: str) -> AttentionImplementation:
    """What the networks are told; "auto" is cuDNN's where it can be. Heads that it cannot take go to XLA all the same.

    Raises ConfigError for cuDNN's where it cannot be.
    """
    if wanted not in ATTENTIONS:
        raise ConfigError(f"attention {wanted!r}: must be one of {', '.join(ATTENTIONS)}")
    if wanted == "xla":
        return "xla"
    device = jax.local_devices()[0]
    if _has_kernel(device) and jnp.dtype(dtype).name in HALVES:
        return "cudnn"
    if wanted == "auto":
        return None
    if not _has_kernel(device):
        raise ConfigError(
            f"attention cudnn: it needs an NVIDIA GPU (Ampere or newer) with cuDNN, not {device.device_kind}: use auto"
        )
    raise ConfigError(
        f"attention cudnn: it needs dtype {' or '.join(HALVES)}, not {dtype}: give one of these, or use auto"
    )


def _has_kernel(device: jax.Device) -> bool:
    """Whether JAX would take the kernel, which depends on the GPU and on the version of cuDNN; it is only asked."""
    if device.platform != "gpu":
        return False
    tokens = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), tokens, tokens, tokens)
    except Exception:  # every kind, for every reason
        return False
    return True
