"""Text-to-image on captioned shapes, 16x16, drawn on the fly: "a small red star at the top left".

    python train.py --config configs/shapes_text.py
    python sample.py --workdir runs/shapes_text --prompt "a large green star to the left of a small blue circle" --num 4

Not tuned yet: no run of these settings has been judged, and it is not known to follow its text. The judge:

    python -m benchmarks.text_followed --workdir runs/shapes_text --num 200

Some combinations of colour and shape are held out of training; python -m benchmarks.text_followed --workdir
runs/shapes_text --split held_out asks for those.
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "shapes"
    config.data.image_size = 16
    config.text.enabled = True
    config.text.context_length = 24
    config.text.vocabulary_size = 1000
    config.text.pooled = True
    config.model.patch_size = 2  # feature maps of 8x8 and 4x4: what a CPU does well
    config.model.position_embedding = True
    config.model.channels = 64
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()  # the middle, at 4x4, reads the words
    config.model.num_heads = 4
    config.model.dropout = 0.0
    config.diffusion.schedule = "linear"  # nearly half of its levels show so little that the words must say it
    config.diffusion.prediction = "x0"  # what is clean is simple here, and noise is not
    config.diffusion.loss = "min_snr"
    config.diffusion.min_snr_floor = 1.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.beta2 = 0.99
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.998
    config.training.batch_size = 32
    config.training.num_steps = 7500
    config.training.log_every = 50
    config.training.checkpoint_every = 1000
    config.training.sample_every = 1500
    config.sampling.guidance = 3.0
    config.sampling.num_images = 64
    config.sampling.batch_per_device = 64
    return config
