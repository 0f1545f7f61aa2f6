"""The task that a config names."""

import dataclasses

from jaxdiff.config import Config
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.first_stage import FirstStage
from jaxdiff.tasks.text_model import TextModel
from jaxdiff.tasks.vae import VAETask
from jaxdiff.weights.tokenizer import Tokenizer

Task = DiffusionTask | VAETask | AutoencoderTask


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What a diffusion task is made of besides its config; a run keeps all of it in its workdir."""

    tokenizer: Tokenizer | None = None
    first_stage: FirstStage | None = None
    text_model: TextModel | None = None


def make_task(config: Config, parts: Parts | None = None) -> Task:
    """The task of a config."""
    if config.task == "autoencoder":
        return AutoencoderTask(config)
    if config.task == "vae":
        return VAETask(config)
    parts = parts or Parts()
    return DiffusionTask(config, parts.tokenizer, parts.first_stage, parts.text_model)
