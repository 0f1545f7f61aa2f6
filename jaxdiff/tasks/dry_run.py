"""What a Stable Diffusion checkpoint takes before anything of it is read: parameters, memory, operations, what compiles."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.config import SamplingConfig
from jaxdiff.generation.sampling import first_step, make_recipe
from jaxdiff.tasks.memory import bytes_of, device_memory
from jaxdiff.tasks.stable_diffusion import Networks, StableDiffusion
from jaxdiff.training.watching import flops_of

NAMES = {"unet": "U-Net", "encoder": "encoder", "decoder": "decoder", "text_encoder": "text encoder"}
# What of the autoencoder's parameters is whose.
HALVES = {"encoder": ("encoder", "moments_projection"), "decoder": ("decoder", "latents_projection")}
PLAIN = "xla"  # attention as two products of matrices, whose operations can be counted


class Cost(NamedTuple):
    """Of one evaluation of a network, on as many images as a device makes at a time."""

    flops: float  # for one image
    operations: int  # in the program
    activations: int  # bytes, by the compiler's own plan; besides parameters and results


def dry_run(model: StableDiffusion, settings: SamplingConfig, strength: float | None = None) -> str:
    """A few lines to print: parameters, operations and memory of each network, the program, and whether it fits.

    The networks that are called are compiled one by one, each in the size in which the program runs it; no tensor is read.
    Operations are counted before compilation, a multiplication and an addition as two. What a device needs is estimated as all
    parameters and the largest of the networks' activations: the program runs one after the other. `strength`: of image to
    image and inpainting; None for text to image.
    """
    calls, costs = calls_an_image(model, settings, strength), _costs(model, settings, strength)
    lines = []
    for part, name in NAMES.items():
        shapes = _params(model, part)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        line = f"  {name:<13} {count / 1e6:9.1f} million parameters, {bytes_of(shapes) / 2**30:6.2f} GiB; "
        if part in costs:
            line += f"{calls[part]:4d} x {costs[part].flops / 1e9:.1f} GFLOP an image; "
            line += f"activations {costs[part].activations / 2**30:.2f} GiB"
        lines.append(line if part in costs else line + "not called")
    total, largest = bytes_of(model.params), max(cost.activations for cost in costs.values())
    lines.append(f"  an image: {sum(calls[part] * cost.flops for part, cost in costs.items()) / 1e12:.4g} TFLOP")
    lines.append(f"  compiles one program for {_program(calls, costs, settings.batch_per_device)}")
    lines.append(
        f"  a device needs about {(total + largest) / 2**30:.2f} GiB: {total / 2**30:.2f} of parameters and "
        f"{largest / 2**30:.2f} of activations, {_fits(total + largest)}"
    )
    return "\n".join(lines)


def calls_an_image(model: StableDiffusion, settings: SamplingConfig, strength: float | None = None) -> dict[str, int]:
    """How often each network is evaluated for one image; guidance doubles the U-Net and the text encoder.

    The encoder reads the image to begin from, and what mask channels show of an image: also where there is none.
    """
    sampler, steps = make_recipe(model.model, settings).sampler, settings.steps
    left = steps if strength is None else steps - int(first_step(steps, strength))
    evaluations = {"heun": 2 * left - 1, "pndm": left + (steps > 1)}.get(sampler, left) if left else 0
    twice = 1 + (settings.guidance != 1)
    encoded = (strength is not None) + model.networks.mask_channels
    return {"unet": twice * evaluations, "encoder": encoded, "decoder": 1, "text_encoder": twice}


def _program(calls: dict[str, int], costs: dict[str, Cost], batch: int) -> str:
    """What runs in which order, and how large the program is."""
    guided = "guided, so twice as many prompts and latents" if calls["text_encoder"] == 2 else "not guided"
    encoder = ["", "encoder, ", "encoder twice, "][calls["encoder"]]
    evaluations = calls["unet"] // calls["text_encoder"]
    operations = ", ".join(f"{NAMES[part]} {cost.operations:,}" for part, cost in costs.items())
    return (
        f"{len(jax.devices())} x {batch} images ({guided}): text encoder, {encoder}{evaluations} times the U-Net in a loop, "
        f"decoder; operations: {operations}"
    )


def _costs(model: StableDiffusion, settings: SamplingConfig, strength: float | None) -> dict[str, Cost]:
    """Of the networks that are in the program, as NAMES calls them."""
    batch, twice = settings.batch_per_device, 1 + (settings.guidance != 1)
    sizes = {"unet": twice * batch, "encoder": batch, "decoder": batch, "text_encoder": batch}
    if strength is None and not model.networks.mask_channels:
        del sizes["encoder"]
    return {part: _cost(model, part, size) for part, size in sizes.items()}


def _params(model: StableDiffusion, part: str) -> Any:
    """The shapes of a part's own parameters."""
    if part not in HALVES:
        return model.params[part]
    return {name: shapes for name, shapes in model.params["autoencoder"].items() if name in HALVES[part]}


def _cost(model: StableDiffusion, part: str, batch: int) -> Cost:
    run, inputs = _evaluation(model, model.networks, part, batch)
    lowered = jax.jit(run).lower(_params(model, part), *inputs)
    # Code of a CPU that is not run need not be good; the plan of its memory is the same.
    quick: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    memory: Any = lowered.compile(quick).memory_analysis()
    plain = _plain(model.networks)
    run, inputs = _evaluation(model, plain, part, 1)
    return Cost(
        flops=flops_of(run, _params(model, part), *inputs) or math.nan,
        operations=lowered.as_text().count(" = "),
        activations=memory.temp_size_in_bytes if memory else 0,
    )


def _plain(networks: Networks) -> Networks:
    """The same with an attention that hides no loop from the count."""
    return dataclasses.replace(
        networks,
        unet=networks.unet.clone(attention_implementation=PLAIN),
        autoencoder=networks.autoencoder.clone(attention_implementation=PLAIN),
        text_encoder=networks.text_encoder.clone(attention_implementation=PLAIN),
    )


def _evaluation(
    model: StableDiffusion, networks: Networks, part: str, batch: int
) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """One evaluation as a function of parameters and inputs, and the inputs' shapes."""
    height, width, channels = model.model.latent_shape
    seen = 2 * channels + 1 if networks.mask_channels else channels
    tokens, text = model.tokenizer.context_length, networks.text_encoder.width

    def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if part == "unet":
        inputs = struct(batch, height, width, seen), struct(batch), struct(batch, tokens, text)
        return lambda p, x, t, c: networks.unet.apply({"params": p}, x, t, context=c), inputs
    if part == "decoder":
        return networks.first_stage.decode, (struct(batch, height, width, channels),)
    if part == "encoder":
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        return networks.first_stage.encode, (struct(batch, *model.model.image_shape), keys)
    run = networks.text_encoder.apply
    return lambda p, ids: run({"params": p}, ids), (struct(batch, tokens, dtype=jnp.int32),)


def _fits(needed: int) -> str:
    """Whether a device has so much memory, where it tells how much it has."""
    room = device_memory(jax.local_devices()[0], jax.local_device_count())
    if not room:
        return "whose memory this device does not tell"
    return f"{'within' if needed < room else 'MORE THAN'} the {room / 2**30:.1f} GiB that it has"
