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
from jaxdiff.tasks import captions
from jaxdiff.tasks.make import Task, make_task
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

    task: Task
    params: Any
    step: int
    class_names: tuple[str, ...]
    captions: tuple[str, ...] = ()  # some of the training data's, where the model reads text

    def requests(self, num: int, start: int = 0) -> Any:
        """Requests number start .. start + num - 1 of an endless list: all classes, or the captions kept, in turn."""
        places = np.arange(start, start + num)
        if self.task.tokenizer is not None:
            return captions.request(self.task.tokenizer, [self.captions[i % len(self.captions)] for i in places])
        classes = self.task.num_classes
        return (places % classes).astype(np.int32) if classes else None

    def text(self, prompts: Sequence[str], negative: str = "") -> dict[str, np.ndarray]:
        """The request for prompts. Raises ConfigError where the model does not read text, or there is no prompt."""
        if self.task.tokenizer is None:
            raise ConfigError("this model was trained without captions: leave out --prompt")
        if not prompts:
            raise ConfigError("no prompt was given")
        return captions.request(self.task.tokenizer, prompts, negative)

    def text_to_image(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | np.ndarray,
        negative: str = "",
        settings: SamplingConfig | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """An image for each prompt, with its seed."""
        return self.make(seeds, self.text(prompts, negative), settings)

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
        request: Any = None,
        settings: SamplingConfig | None = None,
        mesh: Mesh | None = None,
    ) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Images for seeds and a request (labels, or `text(...)`), uint8, some at a time; `settings` default to the run's own."""
        settings = settings or self.task.config.sampling
        mesh = mesh or make_mesh(dataclasses.replace(self.task.config.sharding, mode="jit", fsdp=1))
        sample = self.task.make_sample(settings, self.task.is_guided(settings))
        generate = make_generator(sample, mesh, settings.batch_per_device)
        return generate(self.params, seeds, request, self.task.make_knobs(settings))

    def make(
        self,
        seeds: Sequence[int] | np.ndarray,
        request: Any = None,
        settings: SamplingConfig | None = None,
        mesh: Mesh | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """All images of `generate` as one array, with a progress bar."""
        parts = []
        with progress_bar(0, len(seeds), "sampling", unit="image") as bar:
            for part in self.generate(seeds, request, settings, mesh):
                parts.append(part)
                bar.update(len(part))
        return np.concatenate(parts)


def load_run(workdir: str | pathlib.Path) -> Run:
    """Open a run to make images with its newest checkpoint. Raises ConfigError or CheckpointError with one clear line."""
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    tokenizer, kept = captions.read(workdir) if config.text.enabled else (None, [])
    task = make_task(config, tokenizer)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=where), shapes)
    step, items = Checkpoints(workdir / "checkpoints").restore_items(ema_params=target)
    names = workdir / "classes.json"
    class_names = tuple(json.loads(names.read_text())) if names.is_file() else ()
    return Run(task, items["ema_params"], step, class_names, tuple(kept))
