"""jaxdiff: image generators in JAX, from the first DDPM to Stable Diffusion.

The names that a notebook needs, by the order of the story:

data         open_source, Loader
noising      linear_betas, scaled_linear_betas, cosine_betas, rescale_zero_terminal_snr, DiscreteSchedule, FlowSchedule,
             EDMSchedule, q_step, q_sample, q_posterior
network      UNet
loss         noise_mse, diffusion_loss
denoising    make_denoiser, classifier_free_guidance, clip_x0, dynamic_threshold
sampling     SAMPLERS, make_timesteps, initial_noise, to_uint8, from_uint8, image_grid
images       text_to_image, image_to_image, inpaint, interpolate (of a run or any other pipeline), ImageModel
likelihood   variational_bound, ode_log_likelihood, gaussian_kl
autoencoders ConvVAE, Gaussian, normal_log_density, discretized_normal_log_likelihood, autoencoder_elbo,
             log_importance_weight, iwae_bound, nats_to_bits_per_dim
scores       load_extractor, Moments, frechet_distance, frechet_infinite, kernel_distance, inception_score, precision_recall
checkpoints  load_stable_diffusion, StableDiffusion
serving      export_sampler
whole runs   default_config, to_config, DiffusionTask, train_run, load_run
"""

from jaxdiff.config import default_config, to_config
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import open_source
from jaxdiff.diffusion.guidance import classifier_free_guidance, clip_x0, dynamic_threshold
from jaxdiff.diffusion.likelihood import gaussian_kl, ode_log_likelihood, variational_bound
from jaxdiff.diffusion.predictions import make_denoiser
from jaxdiff.diffusion.samplers import SAMPLERS, initial_noise
from jaxdiff.diffusion.scheduler import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    cosine_betas,
    linear_betas,
    q_posterior,
    q_sample,
    q_step,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
)
from jaxdiff.diffusion.timesteps import make_timesteps
from jaxdiff.evaluation.extractors import load_extractor
from jaxdiff.evaluation.frechet import frechet_distance, frechet_infinite
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kernel import kernel_distance
from jaxdiff.evaluation.moments import Moments
from jaxdiff.evaluation.neighbours import precision_recall
from jaxdiff.generation.export import export_sampler
from jaxdiff.generation.generate import from_uint8, to_uint8
from jaxdiff.generation.image_model import ImageModel
from jaxdiff.generation.pictures import image_grid
from jaxdiff.generation.pipelines import image_to_image, inpaint, interpolate, text_to_image
from jaxdiff.losses import (
    autoencoder_elbo,
    diffusion_loss,
    discretized_normal_log_likelihood,
    iwae_bound,
    log_importance_weight,
    nats_to_bits_per_dim,
    noise_mse,
    normal_log_density,
)
from jaxdiff.models.gaussian import Gaussian
from jaxdiff.models.unet import UNet
from jaxdiff.models.vae import ConvVAE
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.run import load_run
from jaxdiff.tasks.stable_diffusion import StableDiffusion, load_stable_diffusion
from jaxdiff.tasks.train import train_run

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "ConvVAE",
    "DiffusionTask",
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "Gaussian",
    "ImageModel",
    "Loader",
    "Moments",
    "StableDiffusion",
    "UNet",
    "autoencoder_elbo",
    "classifier_free_guidance",
    "clip_x0",
    "cosine_betas",
    "default_config",
    "diffusion_loss",
    "discretized_normal_log_likelihood",
    "dynamic_threshold",
    "export_sampler",
    "frechet_distance",
    "frechet_infinite",
    "from_uint8",
    "gaussian_kl",
    "image_grid",
    "image_to_image",
    "inception_score",
    "initial_noise",
    "inpaint",
    "interpolate",
    "iwae_bound",
    "kernel_distance",
    "linear_betas",
    "load_extractor",
    "load_run",
    "load_stable_diffusion",
    "log_importance_weight",
    "make_denoiser",
    "make_timesteps",
    "nats_to_bits_per_dim",
    "noise_mse",
    "normal_log_density",
    "ode_log_likelihood",
    "open_source",
    "precision_recall",
    "q_posterior",
    "q_sample",
    "q_step",
    "rescale_zero_terminal_snr",
    "scaled_linear_betas",
    "text_to_image",
    "to_config",
    "to_uint8",
    "train_run",
    "variational_bound",
]
