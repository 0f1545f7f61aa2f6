"""The task that a config names."""

from jaxdiff.config import Config
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.vae import VAETask
from jaxdiff.weights.tokenizer import Tokenizer

Task = DiffusionTask | VAETask


def make_task(config: Config, tokenizer: Tokenizer | None = None) -> Task:
    """The task of a config, whose tokenizer is given where its models read text."""
    return VAETask(config) if config.task == "vae" else DiffusionTask(config, tokenizer)
