"""The first stage of latent diffusion on captioned emoji, 64x64 to latents of 16x16x4 (f = 4).

    python -m jaxdiff.data.emoji --out data/emoji
    python train.py --config configs/emoji_vae.py --config.data.dir=data/emoji --workdir runs/emoji_vae
    python evaluate.py --workdir runs/emoji_vae --metrics psnr,ssim,rfid

Needs pip install 'jaxdiff[emoji,offline]'; any other folder of images will do. 682,000 parameters. On 2 CPU cores that did
other things too: 15 min 21 s; of 500 images PSNR 25.6 dB, SSIM 0.862. For a GPU, untried:
--config.autoencoder_kl.channels=64 --config.autoencoder_kl.num_res_blocks=2
--config.autoencoder_kl.discriminator_channels=64 --config.training.batch_size=64 --config.training.num_steps=30000
--config.autoencoder_kl.discriminator_start=10000

Pictures in the workdir: reconstructions/ (a row of originals above a row of what is made of them). At the end the autoencoder is
written to autoencoder/ in the layout of diffusers, with its latents' measured mean, deviation and scaling factor.
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task = "autoencoder"
    config.data.source = "folder"
    config.data.dir = "data/emoji"
    config.data.image_size = 64
    config.autoencoder_kl.channels = 16
    config.autoencoder_kl.channel_multipliers = (1, 2, 4)
    config.autoencoder_kl.num_res_blocks = 1
    config.autoencoder_kl.perceptual = "efficientnet-lite0"
    config.autoencoder_kl.perceptual_weight = 0.1
    config.autoencoder_kl.discriminator_start = 700
    config.autoencoder_kl.discriminator_channels = 32
    config.autoencoder_kl.discriminator_layers = 2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.995
    config.training.batch_size = 16
    config.training.num_steps = 1000
    config.training.log_every = 50
    config.training.checkpoint_every = 500
    config.training.sample_every = 500
    config.evaluation.extractor = "efficientnet-lite0"
    return config
