"""One small run of each family of models, with all the files that it takes."""

import jax
import jax.numpy as jnp

from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.tasks.first_stage import save_first_stage
from tests.tasks import test_autoencoder, test_finetune, test_progressive_gan, test_text
from tests.tasks import tiny_checkpoint as tiny
from tests.tiny import tiny_config

FAMILIES = ("pixels", "latent text", "fine-tuning", "autoencoder", "vae", "progressive GAN")


def family(name, folder, **changes):
    """The config of a run; what it reads is written into `folder`."""
    if name == "latent text":
        changes = {**test_text.TEXT, "model.patch_size": 1, "sampling.clip": "none", **changes}
        return tiny_config(**{**changes, "autoencoder": str(_autoencoder(folder / "autoencoder"))})
    if name == "fine-tuning":
        sd, photos = tiny.write(folder / "sd"), tiny.write_photos(folder / "photos")
        return test_finetune.config_of(sd, photos, **{**test_finetune.LORA, **changes})
    if name == "autoencoder":
        return test_autoencoder.config_of(**changes)
    if name == "vae":
        small = {"vae.channels": (8,), "vae.hidden": 16, "vae.latent_dim": 2}
        return tiny_config(**{"task": "vae", "model.num_classes": 0, **small, **changes})
    if name == "progressive GAN":
        return test_progressive_gan.gan_config(**changes)
    return tiny_config(**changes)


def _autoencoder(path):
    model = AutoencoderKL(3, 2, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    save_first_stage(path, model, params, (0.0, 0.0), (1.0, 1.0), 8)
    return path
