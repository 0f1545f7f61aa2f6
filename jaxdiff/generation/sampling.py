"""From keys and a request to images in one program: encoder, sampler and decoder, for any `ImageModel`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxdiff.config import SamplingConfig
from jaxdiff.diffusion.guidance import bind_condition, classifier_free_guidance, clip_x0, dynamic_threshold
from jaxdiff.diffusion.listed_schedule import ListedSchedule
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.samplers import INITIAL_NOISE, SAMPLERS, Constrain, Images, initial_noise
from jaxdiff.diffusion.scheduler import Schedule
from jaxdiff.diffusion.timesteps import make_timesteps
from jaxdiff.generation.foreign_schedule import ForeignSampling, foreign_sampling, own_sampler
from jaxdiff.generation.generate import Sample, from_uint8, keys_of
from jaxdiff.generation.image_model import Blend, ImageModel, Known, Request
from jaxdiff.generation.interpolation import lerp, slerp
from jaxdiff.generation.masks import to_latents

# Folded into an image's key, as INITIAL_NOISE is: no sampler's step has these numbers.
IMAGE_LATENTS, KNOWN_LATENTS = INITIAL_NOISE - 1, INITIAL_NOISE - 2

Recipe = ForeignSampling  # of a model of our own too: schedule, times, sampler and options
AS_FILED: Any = "file"  # sampler and spacing of a model with a scheduler's file: what that file says
OTHER_SAMPLER = "dpm++2m"  # where the file's own is not among ours


def make_sample(model: ImageModel, settings: SamplingConfig, guided: bool, paste: bool = True) -> Sample:
    """A function sample(params, keys [b], request, knobs) -> images; the request is a `Request` or a condition alone.

    A condition alone is text to image. With an image, it is noised to the time of step `knobs["start"]` and sampled from
    there (SDEdit, Meng et al. 2022, https://arxiv.org/abs/2108.01073). With a mask, too, the rest of the image is kept: seen
    by a network with mask channels, else put back after every step with the noise of that step's time (RePaint, Lugmayr et al.
    2022, https://arxiv.org/abs/2201.09865, eq. 8, without its resampling). With a blend, x_T and the text's context are
    between those of two requests.

    What is a word or a count in `settings` is compiled in, the `knobs` (see `make_knobs`) are traced. `guided`: with
    classifier-free guidance, at twice the cost. `paste`: kept pixels are those of the image given, bit by bit, not what the
    first stage makes of their latents. The same arguments give the same function, so that it compiles once.
    """
    return _make_sample(model, _compiled_in(settings), guided, paste)


def make_knobs(schedule: Schedule, settings: SamplingConfig, strength: float = 1.0) -> dict[str, Any]:
    """The numbers of `settings` that may change without a recompilation, and where image to image begins."""
    return _knobs(make_timesteps(schedule, settings.steps, settings.spacing), settings, strength)


def knobs_of(model: ImageModel, settings: SamplingConfig, strength: float = 1.0) -> dict[str, Any]:
    """As `make_knobs`, for any model: also for one that came with a scheduler's file."""
    if model.scheduler is None:
        return make_knobs(model.schedule, settings, strength)
    return _knobs(make_recipe(model, settings).start_times, settings, strength)


def _knobs(times: Float[np.ndarray, " n+1"], settings: SamplingConfig, strength: float) -> dict[str, Any]:
    last = len(times) - 1
    end = min(int(np.ceil(settings.guidance_end * last)), last)
    low = times[end] if end < last else -1.0  # a file's last step may end where it begins
    high = times[int(settings.guidance_start * last)]
    return {
        "guidance": np.float32(settings.guidance),
        "rescale": np.float32(settings.guidance_rescale),
        "interval": (np.float32(low), np.float32(high)),
        "eta": np.float32(settings.eta),
        "start": first_step(settings.steps, strength),
    }


def make_recipe(model: ImageModel, settings: SamplingConfig) -> Recipe:
    """How the model's levels are visited. Raises ValueError for what it cannot do."""
    if model.scheduler is not None:
        return _filed_recipe(model.scheduler, settings)
    if settings.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {settings.sampler!r}: use one of {', '.join(SAMPLERS)}")
    times = make_timesteps(model.schedule, settings.steps, settings.spacing)
    options = {"variance": settings.variance} if settings.sampler == "ddpm" else {}

    def limit(denoise: Denoiser) -> Denoiser:
        if settings.clip == "clip":
            return clip_x0(denoise, model.schedule)
        return dynamic_threshold(denoise, model.schedule) if settings.clip == "dynamic" else denoise

    return Recipe(model.schedule, model.prediction, times, settings.sampler, options, times, limit)


def sampler_of(scheduler: Mapping[str, Any] | None, settings: SamplingConfig) -> str:
    """The sampler's name, also where the settings leave it to the scheduler's file."""
    return settings.sampler if scheduler is None or settings.sampler != AS_FILED else filed_sampler(scheduler)


def filed_sampler(scheduler: Mapping[str, Any]) -> str:
    """Our name of the scheduler that the file names, or that of what takes its place."""
    return own_sampler(scheduler) or OTHER_SAMPLER


def _filed_recipe(config: Mapping[str, Any], settings: SamplingConfig) -> Recipe:
    """What diffusers' pipelines would do with the scheduler's file, or with another sampler of the same levels."""
    sampler = sampler_of(config, settings)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    if settings.clip != "none":
        raise ValueError(
            f"clip = {settings.clip!r} is for pixels in [-1, 1], and this model works on latents: use 'none'"
        )
    if settings.spacing == "karras":
        config = {**config, "use_karras_sigmas": True}
        if sampler not in ("euler", "heun", "dpm++2m"):
            raise ValueError(f"sampler {sampler!r} has no spacing 'karras': euler, heun and dpm++2m have it")
    elif settings.spacing != AS_FILED:
        config = {**config, "timestep_spacing": settings.spacing, "use_karras_sigmas": False}
    own = sampler == own_sampler(config)
    return foreign_sampling(config, settings.steps, None if own else sampler, stable_diffusion=True)


def first_step(steps: int, strength: float) -> np.int32:
    """The number of steps that image to image skips; strength 1 begins (nearly) from noise, 0 leaves the image alone."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength:g} must lie from 0 (the image as it is) to 1 (made anew)")
    return np.int32(steps - min(int(steps * strength), steps))


def _compiled_in(settings: SamplingConfig) -> SamplingConfig:
    """The settings with every number at a fixed value that does not end up in the program."""
    everywhere = (settings.guidance_start, settings.guidance_end) == (0, 1)
    return dataclasses.replace(
        settings,
        guidance=1.0,
        guidance_start=0.0,
        guidance_end=1.0 if everywhere else 0.5,  # an interval compiles the network twice
        guidance_rescale=float(settings.guidance_rescale != 0),
        eta=0.0,
        num_images=1,
        batch_per_device=1,
    )


@functools.lru_cache(maxsize=16)
def _make_sample(model: ImageModel, settings: SamplingConfig, guided: bool, paste: bool) -> Sample:
    recipe = make_recipe(model, settings)
    schedule, sampler = recipe.schedule, SAMPLERS[recipe.sampler]

    def sample(params: Any, keys: Key[Array, " b"], request: Any, knobs: dict[str, Any]) -> Float[Array, "b h w c"]:
        request = request if isinstance(request, Request) else Request(request)
        start_times = jnp.asarray(recipe.start_times)
        x0 = None if request.image is None else from_uint8(request.image)
        mask = None if request.mask is None else (request.mask >= 128).astype(jnp.float32)
        noise = initial_noise(schedule, keys, (keys.shape[0], *model.latent_shape))
        condition, null = model.conditions(params, request.condition, guided)
        if request.blend is not None:
            noise, condition = _blended(model, schedule, params, request.blend, noise, condition)
        if model.mask_channels:
            channels = _known_channels(model, params, x0, mask, keys)
            condition, null = Known(condition, channels), Known(null, channels)
        options: dict[str, Any] = dict(recipe.options)
        if recipe.sampler == "ddim":
            options["eta"] = knobs["eta"]
        x = noise
        if x0 is not None:
            latents, unit = model.encode(params, x0, _fold(keys, IMAGE_LATENTS)), noise / schedule.prior_std
            options["start"] = start = knobs["start"]
            t = start_times[start]
            x = schedule.alpha(t) * latents + schedule.sigma(t) * unit
            x = jnp.where(start == len(start_times) - 1, latents, x)  # a file's last time need not be clean
            if mask is not None:  # all made anew: then nothing of what the mask covers shines through
                x = jnp.where(start == 0, noise, x)
                if not model.mask_channels:
                    small = to_latents(mask, model.latent_shape)
                    options["constrain"] = _keep_known(schedule, latents, unit, small, start_times[-1])
        denoise = _denoiser(model, recipe, settings, params, condition, null if guided else None, knobs)
        x = sampler(denoise, schedule, x, jnp.asarray(recipe.timesteps), keys, **options)
        if isinstance(schedule, ListedSchedule) and recipe.sampler != "dpm++2m":
            x = x / schedule.alpha(start_times[-1])  # the state of diffusers' Euler and Heun, wherever it ends
        x = model.decode(params, x)
        return x if mask is None or x0 is None or not paste else jnp.where(mask > 0, x, x0)

    return sample


def _denoiser(
    model: ImageModel,
    recipe: Recipe,
    settings: SamplingConfig,
    params: Any,
    condition: Any,
    null: Any,
    knobs: dict[str, Any],
) -> Denoiser:
    """The model's denoiser with condition, guidance and thresholding as recipe and settings say."""
    denoise = model.denoiser(params, recipe.schedule, recipe.prediction)
    if null is None:
        return recipe.limit(bind_condition(denoise, condition))
    guided = classifier_free_guidance(
        denoise,
        condition,
        null,
        knobs["guidance"],
        interval=None if settings.guidance_end == 1 else knobs["interval"],
        rescale=knobs["rescale"] if settings.guidance_rescale else 0.0,
        schedule=recipe.schedule,
        prediction=recipe.prediction,
    )
    return recipe.limit(guided)


def _blended(
    model: ImageModel, schedule: Schedule, params: Any, blend: Blend, noise: Images, condition: Any
) -> tuple[Images, Any]:
    """x_T and condition on the way to the blend's end. All later noise is still drawn from the first key."""
    weight = jnp.asarray(blend.weight)
    far = initial_noise(schedule, keys_of(jnp.asarray(blend.seed)), noise.shape)
    if blend.condition is not None:
        condition = lerp(condition, model.conditions(params, blend.condition, False)[0], weight)
    return slerp(noise, far, weight), condition


def _known_channels(
    model: ImageModel, params: Any, x0: Array | None, mask: Array | None, keys: Key[Array, " b"]
) -> Float[Array, "b l k d+1"]:
    keys = _fold(keys, KNOWN_LATENTS)
    if x0 is None or mask is None:
        return model.nothing_known(params, keys)
    return model.mask_and_known(params, x0, mask, keys)


def _keep_known(schedule: Schedule, latents: Images, noise: Images, mask: Images, end: Array) -> Constrain:
    """Put back what is known, noised to the time just reached by the image's initial noise; clean at the end."""

    def constrain(x: Images, s: Array) -> Images:
        known = jnp.where(s == end, latents, schedule.alpha(s) * latents + schedule.sigma(s) * noise)
        return jnp.where(mask > 0, x, known)

    return constrain


def _fold(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
