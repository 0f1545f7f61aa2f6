"""Make samplers.npz, what diffusers' schedulers do in 20 steps (pip install diffusers torch jax).

A key for each case in KEPT: the last x [2 8 8 4] float32, in the scheduler's own scale, from the noise that jaxdiff would
draw for KEY and with `network`, the same formula in both libraries.
"""

import pathlib

import numpy as np

SHAPE, NUM, KEY = (2, 8, 8, 4), 20, 7
SD1 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SD1 |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
V = SD1 | {"prediction_type": "v_prediction"}
ZERO = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "skip_prk_steps": True, "clip_sample": False}

DDIM, DDPM, PNDM, LCM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, DPM = "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"
ALL = (DDIM, DDPM, PNDM, LCM, EULER, ANCESTRAL, HEUN, DPM)
SHORT = {c: c.removesuffix("Scheduler").removesuffix("Multistep").removesuffix("Discrete").lower() for c in ALL}
SPACINGS = ("leading", "linspace", "trailing")


# The cases in the file: one compilation each in the default tests. The peer test compares all.
KEPT = [
    "ddim_sd1", "ddim_eta_v_linspace", "ddim_zero_snr", "ddim_clipped", "ddpm_large", "pndm_sd1", "pndm_linspace",
    "pndm_v", "pndm_start_7", "lcm_four", "euler_linspace", "euler_start_7", "euler_zero_snr_noise",
    "eulerancestral_sd1", "heun_karras_7", "heun_start_7", "dpmsolver_karras", "dpmsolver_sigma_min_7",
    "dpmsolver_karras_cosine", "dpmsolver_lambda_min",
]  # fmt: skip


def cases() -> dict[str, dict]:
    """Name -> {"config": with its _class_name, "num", "start", "eta"}."""
    found = {}

    def add(name, class_name, config, num=NUM, start=0, eta=0.0):
        config = config | {"_class_name": class_name}
        found[f"{SHORT[class_name]}_{name}"] = {"config": config, "num": num, "start": start, "eta": eta}

    for c in ALL:
        add("sd1", c, SD1)
        add("v", c, V)
        add("cosine", c, COSINE)
        for start in (1, 2, 7, 19):
            add(f"start_{start}", c, SD1, start=start)
        for spacing in SPACINGS:
            add(spacing, c, V | {"timestep_spacing": spacing})
            add(f"{spacing}_7", c, SD1 | {"timestep_spacing": spacing}, num=7, start=3)
        if c not in (PNDM, HEUN):
            add("zero_snr", c, ZERO)
        if c not in (PNDM, ANCESTRAL):
            add("x0", c, SD1 | {"prediction_type": "sample"})
        add("one_step", c, SD1, num=1)
        add("trained_betas", c, SD1 | {"trained_betas": np.linspace(1e-3, 0.015, 1000).tolist()})
    for c in (DDIM, DDPM, LCM, HEUN):
        add("clipped", c, SD1 | {"clip_sample": True, "clip_sample_range": 0.7})
    for c in (DDIM, DDPM, LCM, DPM):
        add("thresholded", c, SD1 | {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8})
    for c in (EULER, HEUN, DPM):
        add("karras", c, SD1 | {"use_karras_sigmas": True})
        add("karras_7", c, V | {"use_karras_sigmas": True, "timestep_spacing": "leading"}, num=7)
        add("karras_cosine", c, COSINE | {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0})
    for c in (EULER, DPM):
        add("sigma_min", c, SD1 | {"final_sigmas_type": "sigma_min"})
    for c in (EULER, ANCESTRAL, DPM):
        add("zero_snr_noise", c, ZERO | {"prediction_type": "epsilon"})
    add("sigma_min_7", DPM, SD1 | {"final_sigmas_type": "sigma_min"}, num=7)
    add("high_order_end", DPM, SD1 | {"final_sigmas_type": "sigma_min", "lower_order_final": False}, num=7)
    add("euler_at_final", DPM, SD1 | {"final_sigmas_type": "sigma_min", "euler_at_final": True})
    add("first_order", DPM, SD1 | {"solver_order": 1})
    add("bh2", DPM, SD1 | {"solver_type": "bh2"})
    add("lambda_min", DPM, COSINE | {"lambda_min_clipped": -5.1})
    add("eta", DDIM, SD1, eta=0.6)
    add("eta_v_linspace", DDIM, V | {"timestep_spacing": "linspace"}, eta=1.0)
    add("to_one", DDIM, SD1 | {"set_alpha_to_one": True})
    add("to_one", PNDM, SD1 | {"set_alpha_to_one": True})
    add("no_offset", DDIM, SD1 | {"steps_offset": 0})
    add("large", DDPM, SD1 | {"variance_type": "fixed_large"})
    add("large_log_free", DDPM, SD1 | {"variance_type": "fixed_large", "steps_offset": 0})
    add("small_log", DDPM, SD1 | {"variance_type": "fixed_small_log"})
    add("four", LCM, SD1 | {"original_inference_steps": 40, "timestep_scaling": 0.01}, num=4)
    return found


def network(x, t, np):
    """A cheap network, the same in both libraries; half a time step matters."""
    tau = t / 1000
    return 0.9 * np.tanh(x * (0.5 + tau) + 0.3 * np.sin(50 * tau)) + 0.2 * tau * x


def noises(num: int) -> np.ndarray:
    """Standard normal, as jaxdiff draws it: of steps 0 .. num - 1, and after them that of x_T."""
    import jax

    from jaxdiff.diffusion.samplers import INITIAL_NOISE

    key = jax.random.key(KEY)
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in (*range(num), INITIAL_NOISE)])


def image() -> np.ndarray:
    """What image to image begins from."""
    return np.cos(np.arange(np.prod(SHAPE)) * 0.7).reshape(SHAPE).astype(np.float32)


def theirs(case: dict, noise: np.ndarray) -> np.ndarray:
    """The last x of diffusers; `noise` as from `noises`."""
    import diffusers
    import torch

    class_name, start = case["config"]["_class_name"], case["start"]
    scheduler = getattr(diffusers, class_name).from_config(case["config"])
    scheduler.set_timesteps(case["num"])
    order = scheduler.order
    timesteps = scheduler.timesteps[start * order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * order)
    x_T = torch.from_numpy(noise[-1].copy())
    x = x_T * scheduler.init_noise_sigma
    if start:
        x = scheduler.add_noise(torch.from_numpy(image()), x_T, timesteps[:1])
    module, index = __import__(scheduler.__module__, fromlist=["x"]), start
    drawn = getattr(module, "randn_tensor", None)
    options = {"eta": case["eta"]} if class_name == DDIM else {}
    try:
        for t in timesteps:
            module.randn_tensor = lambda *a, index=index, **k: torch.from_numpy(noise[index].copy())
            output = network(scheduler.scale_model_input(x, t), t.to(torch.float32), torch)
            x = scheduler.step(output, t, x, **options).prev_sample
            index += 1
    finally:
        if drawn is not None:
            module.randn_tensor = drawn
    return x.numpy()


def make() -> dict[str, np.ndarray]:
    """The last x of the cases in KEPT."""
    noise = noises(NUM)
    return {name: theirs(cases()[name], noise) for name in KEPT}


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("samplers.npz"), **make())
