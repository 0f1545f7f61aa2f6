"""A diffusers scheduler_config.json as our schedule, timesteps and sampler, step for step.

A checkpoint's file says how its network was trained (betas, prediction) and how one sampler visits the levels. Another
sampler may be asked for: it takes the options of the file that it knows, and its own defaults for the others. An option
that would change the images and is not honoured here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxdiff.diffusion.guidance import change_x0
from jaxdiff.diffusion.listed_schedule import ListedSchedule
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.scheduler import (
    Betas,
    DiscreteSchedule,
    Schedule,
    cosine_betas,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
)
from jaxdiff.diffusion.timesteps import karras_sigmas

Times = Float64[np.ndarray, " n"]


class ForeignSampling(NamedTuple):
    """What to sample with: SAMPLERS[sampler](limit(denoise), schedule, x_T, timesteps, key, start=..., **options).

    `denoise` is made with this schedule and prediction, x_T is N(0, schedule.prior_std^2). Image to image that skips k
    steps begins from alpha x0 + sigma noise at time start_times[k].
    """

    schedule: Schedule
    prediction: str
    timesteps: np.ndarray  # [N + 1], or the pairs [N, 2] of steps that do not join
    sampler: str
    options: dict[str, Any]
    start_times: Times  # of k = 0 .. N skipped steps
    limit: Callable[[Denoiser], Denoiser]


CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}

# Each class's options with their defaults.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_LATENT_NOISE = _NOISE | {"beta_start": 0.00085, "beta_end": 0.012}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
_RESCALE = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": _NOISE | _CLIP | _THRESHOLD | _LEADING | _RESCALE | {"set_alpha_to_one": True},
    "ddpm": _NOISE | _CLIP | _THRESHOLD | _LEADING | _RESCALE | {"variance_type": "fixed_small"},
    "pndm": _NOISE | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "euler": _NOISE
    | _LINSPACE
    | _RESCALE
    | _SIGMAS
    | {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None}
    | {"timestep_type": "discrete", "final_sigmas_type": "zero"},
    "euler_ancestral": _NOISE | _LINSPACE | _RESCALE,
    "heun": _LATENT_NOISE | _LINSPACE | _SIGMAS | _CLIP | {"clip_sample": False},
    "dpm++2m": _NOISE
    | _LINSPACE
    | _RESCALE
    | _SIGMAS
    | _THRESHOLD
    | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
    | {"euler_at_final": False, "use_lu_lambdas": False, "use_flow_sigmas": False, "flow_shift": 1.0}
    | {"final_sigmas_type": "zero", "lambda_min_clipped": -np.inf, "variance_type": None}
    | {"use_dynamic_shifting": False, "time_shift_type": "exponential"},
    "lcm": _LATENT_NOISE
    | _CLIP
    | _THRESHOLD
    | _LEADING
    | _RESCALE
    | {"beta_schedule": "scaled_linear", "original_inference_steps": 50, "clip_sample": False}
    | {"set_alpha_to_one": True, "timestep_scaling": 10.0},
}

PREDICTION_TYPES = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
# What an option may be; the other values exist there, but not here.
CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": tuple(PREDICTION_TYPES),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "skip_prk_steps": (True,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "bh1", "bh2", "logrho"),  # all of them the midpoint rule
}
CHOICES_OF_ONE: dict[tuple[str, str], tuple[Any, ...]] = {
    ("pndm", "prediction_type"): ("epsilon", "v_prediction"),
    ("euler_ancestral", "prediction_type"): ("epsilon", "v_prediction"),
    ("ddpm", "variance_type"): ("fixed_small", "fixed_small_log", "fixed_large"),
    ("dpm++2m", "variance_type"): (None,),
}
# Options of still other classes, left in files that were saved again: none of the eight reads them.
WITHOUT_EFFECT = {
    "disable_corrector",
    "predict_x0",
    "solver_p",
    "corrector_order",
    "predictor_order",
    "rho",
    "tau_func",
}


def foreign_sampling(
    config: Mapping[str, Any], num_steps: int, sampler: str | None = None, *, stable_diffusion: bool = False
) -> ForeignSampling:
    """What diffusers would do with this file, `num_steps` and, instead of the file's own, another sampler of ours.

    `stable_diffusion`: as its pipelines do, steps_offset is 1 and clip_sample is off whatever the file says. ValueError
    names the class, option or value that is not honoured.
    """
    name, options = read_options(config, sampler, stable_diffusion)
    levels = options["num_train_timesteps"]
    if not 1 <= num_steps <= levels:
        raise ValueError(f"{num_steps} sampling steps: {CLASSES[name]} takes from 1 to its {levels} training steps")
    kind = "euler" if name == "dpm++2m" and options["solver_order"] == 1 else name
    build = _on_list if name in ("euler", "euler_ancestral", "heun", "dpm++2m") else _on_levels
    schedule, timesteps, start_times, extra = build(name, options, num_steps)
    return ForeignSampling(
        schedule=schedule,
        prediction=PREDICTION_TYPES[options["prediction_type"]],
        timesteps=timesteps,
        sampler=kind,
        options=extra if kind == name else {},
        start_times=start_times,
        limit=_limit(name, options, schedule),
    )


def training_schedule(config: Mapping[str, Any]) -> tuple[DiscreteSchedule, str]:
    """The noise levels and the prediction that the network was trained with."""
    options = read_options(config, None)[1]
    return DiscreteSchedule.from_betas(_betas(options)), PREDICTION_TYPES[options["prediction_type"]]


def read_options(
    config: Mapping[str, Any], sampler: str | None, stable_diffusion: bool = False
) -> tuple[str, dict[str, Any]]:
    """The sampler's name and all its options, checked."""
    name = sampler or _name_of_class(config)
    if name not in CLASSES:
        raise ValueError(f"unknown sampler {name!r}: use one of {', '.join(CLASSES)}")
    known = set().union(*DEFAULTS.values()) | WITHOUT_EFFECT
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(f"the scheduler's file has an option {unknown[0]!r} that no supported scheduler knows")
    options = {key: config.get(key, default) for key, default in DEFAULTS[name].items()}
    if stable_diffusion:
        options |= {key: value for key, value in (("steps_offset", 1), ("clip_sample", False)) if key in options}
    if sampler is not None and "skip_prk_steps" not in config:
        options |= {"skip_prk_steps": True} if name == "pndm" else {}
    if name in ("heun", "dpm++2m"):  # these look for the two in the file, too
        options |= {key: config.get(key) for key in ("sigma_min", "sigma_max")}
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in options:
        raise ValueError(
            f"{CLASSES[name]} has no rescale_betas_zero_snr, which the file asks for: use 'ddim' or 'euler'"
        )
    for key, value in options.items():
        _check_option(name, key, value)
    return name, options


def own_sampler(config: Mapping[str, Any]) -> str | None:
    """Our name of the file's class; None where it is not among ours."""
    return next((name for name, theirs in CLASSES.items() if theirs == config.get("_class_name")), None)


def _name_of_class(config: Mapping[str, Any]) -> str:
    wanted = config.get("_class_name")
    if name := own_sampler(config):
        return name
    raise ValueError(f"unknown scheduler class {wanted!r}: give a sampler, or use one of {', '.join(CLASSES.values())}")


def _check_option(name: str, key: str, value: Any) -> None:
    default = DEFAULTS[name].get(key)
    where = f"{CLASSES[name]}'s {key} = {value!r}"
    choices = CHOICES_OF_ONE.get((name, key), CHOICES.get(key))
    if isinstance(default, bool) and value is None:
        value = False
    if choices is not None:
        if not any(value == choice and isinstance(value, type(choice)) for choice in choices):
            raise ValueError(f"{where} is not supported: it must be {' or '.join(map(repr, choices))}")
    elif key in ("trained_betas", "sigma_min", "sigma_max"):
        if value is not None and not isinstance(value, list | tuple if key == "trained_betas" else int | float):
            raise ValueError(f"{where} must be {'a list of numbers' if key == 'trained_betas' else 'a number'} or null")
    elif isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            raise ValueError(f"{where} must be a {type(default).__name__}")
    elif isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else int | float):
        raise ValueError(f"{where} must be {'an integer' if isinstance(default, int) else 'a number'}")
    if isinstance(value, int | float) and not abs(value) <= 1e9 and value != default:
        raise ValueError(f"{where} must be finite, and no larger than a billion")
    if key in ("num_train_timesteps", "original_inference_steps") and not 1 <= value <= 1_000_000:
        raise ValueError(f"{where} must lie in 1..1000000")


def _betas(options: Mapping[str, Any]) -> Betas:
    num, start, end = (options[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if options["trained_betas"] is not None:
        try:
            betas = np.asarray(options["trained_betas"], np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError("trained_betas must be a list of numbers") from error
        if betas.shape != (num,):
            raise ValueError(f"trained_betas must be {num} numbers (num_train_timesteps), got shape {betas.shape}")
    elif options["beta_schedule"] == "squaredcos_cap_v2":
        betas = cosine_betas(num)
    else:
        betas = (linear_betas if options["beta_schedule"] == "linear" else scaled_linear_betas)(num, start, end)
    return rescale_zero_terminal_snr(betas) if options.get("rescale_betas_zero_snr") else betas


def _spaced(options: Mapping[str, Any], num: int, *, whole: bool) -> Times:
    """Times counted 0 .. T - 1 as diffusers does, descending; "linspace" is rounded where `whole`."""
    levels = options["num_train_timesteps"]
    if options["timestep_spacing"] == "linspace":
        times = np.linspace(0, levels - 1, num, dtype=np.float64 if whole else np.float32)[::-1].astype(np.float64)
        return times.round() if whole else times
    if options["timestep_spacing"] == "leading":
        return _within(np.arange(num)[::-1] * (levels // num) + options["steps_offset"], options)
    return np.arange(levels, 0, -levels / num).round() - 1


def _within(times: np.ndarray, options: Mapping[str, Any]) -> Times:
    last = options["num_train_timesteps"] - 1
    if times[0] > last or times[-1] < 0:
        raise ValueError(f"'leading' with steps_offset {options['steps_offset']} leaves 0..{last}: use fewer steps")
    return times.astype(np.float64)


# Samplers whose times are noise levels ------------------------------------------------------------------------------


def _on_levels(
    name: str, options: Mapping[str, Any], num: int
) -> tuple[DiscreteSchedule, np.ndarray, Times, dict[str, Any]]:
    """Schedule, timesteps, start times and options of DDIM, PNDM, DDPM and LCM. Our times are theirs + 1."""
    schedule = DiscreteSchedule.from_betas(_betas(options))
    if name == "lcm":
        t = _distilled(options, num) + 1
        times = np.append(t, 0.0)
        return schedule, times, times, {"timestep_scaling": options["timestep_scaling"]}
    t = _spaced(options, num, whole=True) + 1
    if name == "ddpm":
        times = np.append(t, 0.0)
        kind = options["variance_type"].removesuffix("_log")
        return schedule, times, times, {"variance": kind, "noise_at_end": kind == "fixed_large"}
    # DDIM and PNDM go down by one stride from wherever they are, and to the end from where that leads below it.
    end = 0.0 if options["set_alpha_to_one"] else 1.0
    s = t - options["num_train_timesteps"] // num
    s = np.where(s >= 1, s, end)
    joined = np.array_equal(s[:-1], t[1:])
    timesteps = np.append(t, s[-1]) if joined else np.stack([t, s], axis=1)
    if name == "ddim":
        return schedule, timesteps, np.append(t, s[-1]), {}
    calls = np.concatenate([t[:2], t[1:]])[:num]  # the second time is looked at twice
    average = "v" if options["prediction_type"] == "v_prediction" else "noise"
    return schedule, timesteps, np.append(calls, s[-1]), {"average": average, "fixed_repeat": True}


def _distilled(options: Mapping[str, Any], num: int) -> Times:
    """LCM's times: an even choice of those that the network was distilled at."""
    original, levels = options["original_inference_steps"], options["num_train_timesteps"]
    if original > levels or num > original:
        raise ValueError(f"LCM takes from 1 to original_inference_steps = {original} steps (of {levels}), got {num}")
    times = np.arange(original, 0, -1) * (levels // original) - 1.0
    return times[np.floor(np.linspace(0, original, num, endpoint=False)).astype(int)]


# Samplers whose times are ratios sigma / alpha ----------------------------------------------------------------------


def _on_list(
    name: str, options: Mapping[str, Any], num: int
) -> tuple[ListedSchedule, np.ndarray, Times, dict[str, Any]]:
    """Schedule, timesteps, start times and options of Euler, Euler ancestral, Heun and DPM-Solver++.

    Their ratios are linear between noise levels, and their state is x / alpha (x for DPM-Solver++).
    """
    alpha_squared = np.cumprod(1 - _betas(options))
    if options.get("rescale_betas_zero_snr"):
        alpha_squared[-1] = 2.0**-24  # instead of 0, so that the largest ratio is finite
    levels = np.sqrt((1 - alpha_squared) / alpha_squared)
    solver = name == "dpm++2m"
    times = _solver_times(options, num, levels) if solver else _spaced(options, num, whole=False)
    ratios = np.interp(times, np.arange(len(levels)), levels)
    if options.get("use_karras_sigmas"):
        highest, lowest = (levels[-1], levels[0]) if solver else (ratios[0], ratios[-1])
        highest = highest if options["sigma_max"] is None else options["sigma_max"]
        lowest = lowest if options["sigma_min"] is None else options["sigma_min"]
        ratios = karras_sigmas(lowest, highest, len(times))
        times = np.interp(np.log(ratios), np.log(levels), np.arange(len(levels)))
        if solver:
            times = np.trunc(times if options["beta_schedule"] == "squaredcos_cap_v2" else times.round())
    end = levels[0] if options.get("final_sigmas_type") == "sigma_min" else 0.0
    unit = solver or options["timestep_spacing"] == "leading"
    schedule = ListedSchedule.from_ratios(np.append(ratios, end), times, unit_variance=unit)
    steps_left = np.arange(len(times), -1.0, -1.0)
    final = solver and (options["euler_at_final"] or (options["lower_order_final"] and len(times) < 15))
    return schedule, steps_left, steps_left, {"lower_order_final": True} if final else {}


def _solver_times(options: Mapping[str, Any], num: int, levels: np.ndarray) -> Times:
    """DPM-Solver's times: "linspace" and "leading" are spaced for one step more, and all end above `lambda_min_clipped`."""
    top = len(levels) - int(np.searchsorted(-np.log(levels)[::-1], options["lambda_min_clipped"]))
    if options["timestep_spacing"] == "linspace":
        return np.linspace(0, top - 1, num + 1).round()[:0:-1]
    if options["timestep_spacing"] == "leading":
        return _within(np.arange(num, 0, -1) * (top // (num + 1)) + options["steps_offset"], options)
    return np.arange(top, 0, -len(levels) / num).round() - 1


# Limits of x0 -------------------------------------------------------------------------------------------------------


def _limit(name: str, options: Mapping[str, Any], schedule: Schedule) -> Callable[[Denoiser], Denoiser]:
    """What the file asks to be done to x0; DDIM goes on with the noise that was predicted."""
    largest, quantile = options.get("sample_max_value", 1.0), options.get("dynamic_thresholding_ratio", 1.0)
    bound = options.get("clip_sample_range", 1.0)

    def threshold(x0: Any) -> Any:
        s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), quantile, axis=1)
        s = jnp.minimum(jnp.maximum(s, 1.0), largest).reshape(-1, 1, 1, 1)
        return jnp.clip(x0, -s, s) / s

    def clip(x0: Any) -> Any:
        return jnp.clip(x0, -bound, bound)

    if not (options.get("thresholding") or options.get("clip_sample")):
        return lambda denoise: denoise
    change = threshold if options.get("thresholding") else clip
    return lambda denoise: change_x0(denoise, schedule, change, keep_noise=name == "ddim")
