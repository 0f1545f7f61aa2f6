"""DDPM on CIFAR-10 as published (Ho et al. 2020): 35,746,307 parameters, unconditional, 32x32.

    python -m jaxdiff.data.cifar10 --dir ~/tensorflow_datasets     # once: 170 MB to download
    python train.py --config configs/cifar10.py --config.data.dir=~/tensorflow_datasets

For accelerators: one GPU with bfloat16 (--config.model.dtype=bfloat16) or a TPU slice. The paper trained 800,000 steps and
reports FID 3.17 and inception score 9.46; this repository has not repeated that run.
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()  # the defaults are this model's
    config.data.source = "tfds:cifar10"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.flip = True
    config.model.dropout = 0.1
    config.optimizer.warmup_steps = 5000
    config.training.batch_size = 128
    config.training.num_steps = 800_000
    config.training.checkpoint_every = 5000
    config.training.sample_every = 10_000
    return config
