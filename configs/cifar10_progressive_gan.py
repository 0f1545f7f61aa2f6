"""The progressive GAN on CIFAR-10, by the recipe of Karras et al. 2018, section 6.4 and appendix B: gamma = 750.

    python train.py --config configs/cifar10_progressive_gan.py --config.data.dir=~/tensorflow_datasets
    python evaluate.py --workdir runs/cifar10_progressive_gan --metrics is,fid --num 50000

20 million images, 1,250,000 steps of 16: for a GPU or TPU. The data must be prepared once (docs/data.md). The paper's inception
score is 8.80 +- 0.05 for the best of ten runs, 8.56 +- 0.06 on average; this file has not been trained to its end here.
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task = "progressive_gan"
    config.data.source = "tfds:cifar10"
    config.data.image_size = 32
    config.progressive_gan.latent_dim = 128
    config.progressive_gan.channel_base = 4096
    config.progressive_gan.channel_max = 128
    config.progressive_gan.stable_kimg = 400.0
    config.progressive_gan.fade_kimg = 400.0
    config.progressive_gan.total_kimg = 20_000.0
    config.progressive_gan.gamma = 750.0
    config.progressive_gan.stddev_group = 0  # the whole batch
    config.progressive_gan.together = True
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta1 = 0.0
    config.optimizer.beta2 = 0.99
    config.optimizer.clip_norm = 0.0
    config.optimizer.ema_decay = 0.999
    config.optimizer.ema_warmup = False
    config.training.batch_size = 16
    config.training.log_every = 500
    config.training.checkpoint_every = 10_000
    config.training.sample_every = 12_500  # 200 thousand images
    config.sampling.num_images = 100
    config.sampling.batch_per_device = 100
    return config
