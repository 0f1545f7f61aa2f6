"""The task that a config names."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxdiff.config import Config
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.first_stage import FirstStage
from jaxdiff.tasks.pretrained import Pretrained
from jaxdiff.tasks.progressive_gan import ProgressiveGANTask
from jaxdiff.tasks.text_model import TextModel
from jaxdiff.tasks.vae import VAETask
from jaxdiff.training.state import Params
from jaxdiff.weights.tokenizer import Tokenizer

Task = DiffusionTask | VAETask | AutoencoderTask | ProgressiveGANTask


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What a diffusion task is made of besides its config; a run keeps all of it in its workdir."""

    tokenizer: Tokenizer | None = None
    first_stage: FirstStage | None = None
    text_model: TextModel | None = None
    pretrained: Pretrained | None = None  # what training begins from
    unet: Params | None = None  # of it, where LoRA leaves it as it is


def make_task(config: Config, parts: Parts | None = None) -> Task:
    """The task of a config."""
    if config.task == "autoencoder":
        return AutoencoderTask(config)
    if config.task == "vae":
        return VAETask(config)
    if config.task == "progressive_gan":
        return ProgressiveGANTask(config)
    parts = parts or Parts()
    return DiffusionTask(config, parts.tokenizer, parts.first_stage, parts.text_model, parts.pretrained, parts.unet)


def plain_update(config: Config, parts: Parts, mesh: Mesh, stage: int) -> Callable[..., Any]:
    """The update of a stage with nothing recomputed, accumulated, fused or folded: one whose operations XLA can count."""
    model = dataclasses.replace(config.model, remat=False, attention_implementation="xla")
    training = dataclasses.replace(config.training, accumulation_steps=1)
    if parts.pretrained is not None:
        parts = dataclasses.replace(parts, pretrained=parts.pretrained.plain)
    gan = dataclasses.replace(config.progressive_gan, folded="never")
    config = dataclasses.replace(config, model=model, training=training, progressive_gan=gan)
    trainable = make_task(config, parts).trainable(mesh)
    return trainable.make_update(None, number=stage) if trainable.stages else trainable.make_update(None)


def at_step(task: Task, step: int) -> Task:
    """The task as it is after `step` steps of training: of what grows, as large as it then is."""
    return dataclasses.replace(task, step=step) if isinstance(task, ProgressiveGANTask) else task
