"""Make schedules.npz, the tables of diffusers' schedulers (pip install diffusers torch).

Keys (diffusers counts 0..T-1, where jaxdiff counts 1..T; T = 1000):
  betas_NAME, alphas_cumprod_NAME             NAME in linear, scaled_linear, cosine, and linear_zero_snr, ...: [1000]
  posterior_variance_KIND_NAME                KIND in fixed_small, fixed_large: DDPMScheduler's variances [1000]
  (rescaled betas and the variances come from diffusers' code run in float64: in float32 it is off by up to 7e-6)
  timesteps_SPACING_NUM                       DDIMScheduler, linear betas: int64 [NUM]
  sigmas_SPACING_NUM                          EulerDiscreteScheduler, linear betas: float32 [NUM + 1], the last 0
  karras_sigmas_NUM, karras_timesteps_NUM     the same with Karras' spacing; timesteps are fractional
"""

import pathlib

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

STEPS = 1000
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
NUMS = (7, 10, 50)


def make() -> dict[str, np.ndarray]:
    """The tables by key."""
    golden = {}
    for name, settings in SCHEDULES.items():
        for suffix, rescale in (("", False), ("_zero_snr", True)):
            plain = DDPMScheduler(STEPS, **settings).betas
            betas = rescale_zero_terminal_snr(plain.double()) if rescale else plain.double()
            golden[f"betas_{name}{suffix}"] = betas.numpy()
            for kind in ("fixed_small", "fixed_large"):
                scheduler = DDPMScheduler(STEPS, **settings, rescale_betas_zero_snr=rescale, variance_type=kind)
                golden[f"alphas_cumprod_{name}{suffix}"] = scheduler.alphas_cumprod.numpy()
                scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
                golden[f"posterior_variance_{kind}_{name}{suffix}"] = np.array(
                    [float(scheduler._get_variance(t)) for t in range(STEPS)]
                )
    for num in NUMS:
        for spacing in ("linspace", "leading", "trailing"):
            scheduler = DDIMScheduler(STEPS, **SCHEDULES["linear"], timestep_spacing=spacing)
            scheduler.set_timesteps(num)
            golden[f"timesteps_{spacing}_{num}"] = scheduler.timesteps.numpy()
            euler = EulerDiscreteScheduler(STEPS, **SCHEDULES["linear"], timestep_spacing=spacing)
            euler.set_timesteps(num)
            golden[f"sigmas_{spacing}_{num}"] = euler.sigmas.numpy()
        karras = EulerDiscreteScheduler(STEPS, **SCHEDULES["linear"], use_karras_sigmas=True)
        karras.set_timesteps(num)
        golden[f"karras_sigmas_{num}"] = karras.sigmas.numpy()
        golden[f"karras_timesteps_{num}"] = karras.timesteps.numpy()
    return {key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in golden.items()}


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("schedules.npz"), **make())
