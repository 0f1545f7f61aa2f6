"""A mesh on which training fits, where the config leaves it open how far parameters are split (`sharding.fsdp = 0`)."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdiff.config import Config
from jaxdiff.tasks.make import Task
from jaxdiff.tasks.memory import device_memory
from jaxdiff.tasks.pretrained import Pretrained, frozen_parts
from jaxdiff.training.processes import agreed
from jaxdiff.training.sharding import fewest_that_fit, make_mesh

MEBIBYTE = 2**20
COPIES = 4  # of what is trained: parameters, their moving average, Adam's two moments


def fitting_mesh(config: Config, mesh: Mesh, trained: Task | Pretrained, room: int | None = None) -> Mesh:
    """The same devices, with as little of FSDP as a training run fits in; `mesh` itself where the config says how much.

    `room`: bytes of a device's memory, where that is not what the device says. Raises ConfigError where nothing fits.
    """
    if config.sharding.fsdp or config.sharding.mode == "pmap":
        return mesh
    devices = list(mesh.devices.flat)
    if room is None:
        local = [device for device in devices if device.process_index == jax.process_index()]
        room = device_memory(local[0], len(local))
        room = agreed((room or 0) // MEBIBYTE) * MEBIBYTE or None  # all processes must come to the same mesh
    kept, used = _of_checkpoint(config, trained) if isinstance(trained, Pretrained) else _of_task(trained, mesh)
    fsdp = fewest_that_fit(kept, used, len(devices), room)
    return make_mesh(dataclasses.replace(config.sharding, fsdp=fsdp), devices)


def _of_task(task: Task, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of what lasts from step to step, and of what of it a step needs whole."""
    trainable = task.trainable(mesh)
    state = jax.eval_shape(trainable.init, jax.random.key(0))
    names = ("params", "discriminator_params")
    return (state, trainable.frozen), ([getattr(state, name, {}) for name in names], trainable.frozen)


def _of_checkpoint(config: Config, pretrained: Pretrained) -> tuple[Any, Any]:
    """The same before any of it is read; LoRA's factors are too small to count."""
    frozen = frozen_parts(config)
    trained = {part: shapes for part, shapes in pretrained.model.params.items() if part not in frozen}
    return (pretrained.model.params, [trained] * (COPIES - 1)), pretrained.model.params
