"""The progressive GAN from 4x4 to 1024x1024 pixels, by the schedule of Karras et al. 2018, appendix A.1.

    python train.py --config configs/celeba_hq_progressive_gan.py --config.data.dir=celeba_hq

The folder holds square images of 1024x1024 (CelebA-HQ has 30,000); of others the middle is cut out and scaled. 19 million images:
for GPUs or TPUs, and weeks of one; it has not been trained here. Batches are the paper's, for one device. Several devices share a
batch, so every number in it must be a multiple of them; groups of the minibatch standard deviation stay on a device where
stddev_parts is one, too; and the authors raise the learning rate. On eight:

    python train.py --config configs/celeba_hq_progressive_gan.py --config.data.dir=celeba_hq \\
        --config.progressive_gan.batch_sizes=32 --config.progressive_gan.stddev_parts=8 \\
        --config.progressive_gan.learning_rates=0.001,0.001,0.001,0.001,0.001,0.0015,0.002,0.003,0.003
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task = "progressive_gan"
    config.data.source = "folder"
    config.data.image_size = 1024
    config.data.flip = True
    config.progressive_gan.stable_kimg = 800.0
    config.progressive_gan.fade_kimg = 800.0
    config.progressive_gan.total_kimg = 19_000.0
    config.progressive_gan.batch_sizes = (16, 16, 16, 16, 16, 16, 14, 6, 3)  # at 4, 8, 16, ... 1024
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta1 = 0.0
    config.optimizer.beta2 = 0.99
    config.optimizer.clip_norm = 0.0
    config.optimizer.ema_decay = 0.999
    config.optimizer.ema_warmup = False
    config.training.batch_size = 16
    config.training.log_every = 500
    config.training.checkpoint_every = 10_000
    config.training.sample_every = 20_000
    config.sampling.num_images = 16
    config.sampling.batch_per_device = 4
    return config
