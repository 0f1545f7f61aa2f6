"""Handwritten digits, 8x8, class-conditional: the quickest real run.

python train.py --config configs/digits.py
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.model.num_classes = -1
    config.model.channels = 64
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.model.patch_size = 2
    config.model.dropout = 0.0
    config.training.batch_size = 64
    config.training.num_steps = 200
    config.training.checkpoint_every = 100
    config.training.sample_every = 100
    config.training.log_every = 20
    config.sampling.guidance = 2.0
    return config
