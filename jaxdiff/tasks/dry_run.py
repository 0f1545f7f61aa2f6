"""What a Stable Diffusion checkpoint takes before anything of it is read: parameters, memory, operations."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import SamplingConfig
from jaxdiff.generation.sampling import make_recipe
from jaxdiff.tasks.stable_diffusion import StableDiffusion

NAMES = {"unet": "U-Net", "autoencoder": "autoencoder", "text_encoder": "text encoder"}


def dry_run(model: StableDiffusion, settings: SamplingConfig) -> str:
    """A few lines to print: of each network parameters, bytes and operations, then of an image and of the whole.

    Operations are counted in the lowered programs, a multiplication and an addition as two. Parameters are copied to every
    device; what the computation needs besides depends on the device's compiler and is not in these numbers.
    """
    flops, calls = _flops(model, settings), calls_an_image(model, settings)
    lines = []
    for part, name in NAMES.items():
        leaves = jax.tree.leaves(model.params[part])
        count, size = sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        lines.append(
            f"  {name:<13} {count / 1e6:9.1f} million parameters, {size / 2**30:6.2f} GiB, "
            f"{calls[part]:4d} x {flops[part] / 1e9:.1f} GFLOP an image"
        )
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params))
    work = sum(calls[part] * flops[part] for part in NAMES)
    lines.append(f"  parameters on every device: {total / 2**30:.2f} GiB; an image: {work / 1e12:.4g} TFLOP")
    lines.append(f"  one program for {len(jax.devices())} x {settings.batch_per_device} images, {_fits(total)}")
    return "\n".join(lines)


def calls_an_image(model: StableDiffusion, settings: SamplingConfig) -> dict[str, int]:
    """How often each network is evaluated for one image; guidance doubles the U-Net and the text encoder."""
    sampler, steps = make_recipe(model.model, settings).sampler, settings.steps
    evaluations = {"heun": 2 * steps - 1, "pndm": steps + (steps > 1)}.get(sampler, steps)
    twice = 1 + (settings.guidance != 1)
    return {"unet": twice * evaluations, "autoencoder": 1, "text_encoder": twice}


def _flops(model: StableDiffusion, settings: SamplingConfig) -> dict[str, float]:
    """Operations of one evaluation of each network, for one image."""
    networks, image = model.networks, model.model
    height, width, channels = image.latent_shape
    inputs = 2 * channels + 1 if image.mask_channels else channels
    tokens = jnp.zeros((1, model.tokenizer.context_length), jnp.int32)

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    context = struct(1, tokens.shape[1], networks.text_encoder.width)
    return {
        "unet": _count(
            lambda p, x, t, c: networks.unet.apply({"params": p}, x, t, context=c),
            model.params["unet"],
            struct(1, height, width, inputs),
            struct(1),
            context,
        ),
        "autoencoder": _count(
            lambda p, z: networks.first_stage.decode(p, z),
            model.params["autoencoder"],
            struct(1, height, width, channels),
        ),
        "text_encoder": _count(
            lambda p: networks.text_encoder.apply({"params": p}, tokens), model.params["text_encoder"]
        ),
    }


def _count(function: Callable[..., Any], *args: Any) -> float:
    cost: Any = jax.jit(function).lower(*args).cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float((cost or {}).get("flops", math.nan))


def _fits(needed: int) -> str:
    """Whether the parameters go into a device's memory, where the device tells how much it has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit")
    if not room:
        return "whose memory this device does not tell"
    return f"{'within' if needed < room else 'MORE THAN'} the {room / 2**30:.1f} GiB of a device"
