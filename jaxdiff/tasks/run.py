"""A run and its workdir: opening one to make images with it."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxdiff.config import Config, ConfigError, SamplingConfig, to_config
from jaxdiff.generation.generate import make_generator
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.sharding import make_mesh


def read_config(workdir: pathlib.Path) -> Config:
    """The config stored in a workdir. Raises ConfigError naming the file where it is missing or damaged."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} not found: {workdir} is not the workdir of a run")
    try:
        return to_config(json.loads(path.read_text()))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run: the task, the moving average of its parameters, the step they are of, and the names of its classes."""

    task: DiffusionTask
    params: Any
    step: int
    class_names: tuple[str, ...]

    def labels(self, names: Sequence[str], count: int) -> np.ndarray | None:
        """`count` labels cycling through `names` (numbers or class names); through all classes where none is named.

        Raises ConfigError for a class that the model does not know.
        """
        classes = self.task.num_classes
        if not classes:
            if names:
                raise ConfigError("this model was trained without labels: leave out --label")
            return None
        known = {name: i for i, name in enumerate(self.class_names)} | {str(i): i for i in range(classes)}
        for name in names:
            if name not in known:
                listed = ", ".join(self.class_names[:20]) or f"0 to {classes - 1}"
                raise ConfigError(f"label {name!r} is not a class of this model, which has {listed}")
        cycle = [known[name] for name in names] or list(range(classes))
        return np.resize(np.array(cycle, np.int32), count)

    def generate(
        self,
        seeds: Sequence[int] | np.ndarray,
        labels: np.ndarray | None = None,
        settings: SamplingConfig | None = None,
        mesh: Mesh | None = None,
    ) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Images for seeds and labels, uint8, some at a time; `settings` default to the run's own."""
        settings = settings or self.task.config.sampling
        guided = bool(self.task.num_classes) and settings.guidance != 1
        mesh = mesh or make_mesh(dataclasses.replace(self.task.config.sharding, mode="jit", fsdp=1))
        generate = make_generator(self.task.make_sample(settings, guided), mesh, settings.batch_per_device)
        return generate(self.params, seeds, labels, self.task.make_knobs(settings))

    def make(
        self,
        seeds: Sequence[int] | np.ndarray,
        labels: np.ndarray | None = None,
        settings: SamplingConfig | None = None,
        mesh: Mesh | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """All images of `generate` as one array, with a progress bar."""
        parts = []
        with progress_bar(0, len(seeds), "sampling", unit="image") as bar:
            for part in self.generate(seeds, labels, settings, mesh):
                parts.append(part)
                bar.update(len(part))
        return np.concatenate(parts)


def load_run(workdir: str | pathlib.Path) -> Run:
    """Open a run to make images with its newest checkpoint. Raises ConfigError or CheckpointError with one clear line."""
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    task = DiffusionTask(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=where), shapes)
    step, items = Checkpoints(workdir / "checkpoints").restore_items(ema_params=target)
    names = workdir / "classes.json"
    class_names = tuple(json.loads(names.read_text())) if names.is_file() else ()
    return Run(task, items["ema_params"], step, class_names)
