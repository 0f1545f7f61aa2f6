"""A model small enough for tests, and batches for it."""

import numpy as np

from jaxdiff.config import Config, default_config, to_config


def tiny_config(**changes: object) -> Config:
    """8x8 grey images, ten classes, a few thousand parameters; changes such as {"training.batch_size": 4}."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "data.source": "digits",
            "data.image_size": 8,
            "data.channels": 1,
            "model.dropout": 0.0,
            "model.num_classes": 10,
            "model.channels": 16,
            "model.channel_multipliers": (1,),
            "model.num_res_blocks": 1,
            "model.attention_resolutions": (),
            "model.patch_size": 2,
            "diffusion.num_timesteps": 100,
            "training.batch_size": 16,
            "training.num_steps": 8,
            "sampling.steps": 4,
            "sampling.num_images": 8,
            "sampling.batch_per_device": 2,
            **changes,
        }
    )
    return to_config(config)


def tiny_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random images with labels, of the config's size."""
    rng = np.random.default_rng(seed)
    size, count = config.data.image_size, config.training.batch_size
    return {
        "image": rng.integers(0, 256, (count, size, size, config.data.channels), dtype=np.uint8),
        "label": rng.integers(0, 10, count, dtype=np.int32),
        "index": np.arange(count, dtype=np.int32),
    }
