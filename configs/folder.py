"""Your own images: any folder of PNG, JPEG, WebP or BMP files; subfolders, if there are some, are classes.

    python train.py --config configs/folder.py --config.data.dir=my_photos
    python train.py --config configs/folder.py --config.data.dir=my_photos --config.model.num_classes=-1    # by class

64x64, 15 million parameters: for a GPU or TPU. On a laptop try --config.data.image_size=32 --config.model.channels=32.
A few thousand images and 100,000 steps are a sensible beginning.
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "folder"
    config.data.dir = "my_photos"
    config.data.image_size = 64
    config.data.crop = "random"
    config.data.flip = True
    config.model.patch_size = 2
    config.model.channels = 96
    config.model.channel_multipliers = (1, 2, 2)
    config.model.attention_resolutions = (16, 8)
    config.model.num_heads = 4
    config.diffusion.schedule = "cosine"
    config.diffusion.prediction = "v"
    config.optimizer.warmup_steps = 1000
    config.training.batch_size = 64
    config.training.num_steps = 100_000
    config.training.sample_every = 2500
    config.sampling.sampler = "dpm++2m"
    config.sampling.steps = 30
    return config
