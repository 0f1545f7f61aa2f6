"""A run and its workdir: starting or continuing one, and opening a finished one to make images."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxdiff.config import CHANGEABLE, Config, ConfigError, SamplingConfig, check, flatten, to_config, to_json
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import Source, open_source
from jaxdiff.files import write_text
from jaxdiff.generation.generate import make_generator
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training import loop
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.log import progress_bar
from jaxdiff.training.sharding import check_batch, make_mesh


def resolve_classes(config: Config, source: Source) -> Config:
    """`model.num_classes = -1` becomes what the data has. Raises ConfigError where model and data disagree."""
    wanted, found = config.model.num_classes, source.num_classes
    if wanted > 0 and wanted < found:
        raise ConfigError(f"config.model.num_classes = {wanted}, but there are {found} classes in {source.describe()}")
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_classes=found if wanted == -1 else wanted)
    )


def read_config(workdir: pathlib.Path) -> Config:
    """The config stored in a workdir. Raises ConfigError naming the file where it is missing or damaged."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} not found: {workdir} is not the workdir of a run")
    try:
        return to_config(json.loads(path.read_text()))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def check_continuation(config: Config, workdir: pathlib.Path) -> None:
    """Raise ConfigError where the workdir holds a run that `config` does not continue."""
    if not (workdir / "config.json").is_file():
        return
    old, new = flatten(read_config(workdir)), flatten(config)
    for name, value in new.items():
        if old[name] != value and not name.startswith(CHANGEABLE):
            raise ConfigError(
                f"{workdir} holds a run with config.{name} = {old[name]!r}, now it is {value!r}: "
                "give another --workdir for a new run"
            )


def _open_data(config: Config) -> tuple[Source, Loader]:
    data = config.data
    try:
        source = open_source(
            data.source,
            data.dir or None,
            data.split,
            require_labels=config.model.num_classes != 0,
            max_bad_fraction=data.max_bad_fraction,
        )
        loader = Loader(
            source,
            config.training.batch_size,
            config.seed,
            image_size=data.image_size,
            channels=data.channels,
            crop=data.crop,
            flip=data.flip,
            num_threads=data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data: {error}") from error
    return source, loader


def describe(task: DiffusionTask, source: Source, mesh: Mesh, workdir: pathlib.Path) -> str:
    """What a run is about to do, in a few lines."""
    config = task.config
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
    classes = f", {task.num_classes} classes" if task.num_classes else ""
    size = "x".join(map(str, task.image_shape))
    diffusion = config.diffusion
    lines = {
        "data": source.describe(),
        "model": f"U-Net, {parameters:,} parameters, {size} images{classes}, computing in {config.model.dtype}",
        "diffusion": f"{diffusion.schedule} schedule, {diffusion.prediction} prediction, {diffusion.loss} loss",
        "training": f"{config.training.num_steps:,} steps of {config.training.batch_size} images, seed {config.seed}",
        "devices": f"{mesh.size} x {kinds} ({config.sharding.mode}, data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']})",
        "workdir": str(workdir),
    }
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def train_run(config: Config, workdir: pathlib.Path) -> loop.Outcome:
    """Train `config` in `workdir`, from the start or from where it stopped. Raises ConfigError before anything compiles."""
    mesh = make_mesh(config.sharding)
    check_batch(config.training.batch_size, config.training.accumulation_steps, mesh)
    platform = mesh.devices.flat[0].platform
    if config.model.attention_implementation == "cudnn" and platform != "gpu":
        raise ConfigError(
            f"config.model.attention_implementation = 'cudnn' needs an NVIDIA GPU, not {platform}: use 'auto'"
        )
    source, loader = _open_data(config)
    config = resolve_classes(config, source)
    check(config)
    check_continuation(config, workdir)
    task = DiffusionTask(config)
    first = jax.process_index() == 0
    if first:
        print(describe(task, source, mesh, workdir), flush=True)
        write_text(workdir / "config.json", to_json(config))
        write_text(workdir / "classes.json", json.dumps(source.class_names) + "\n")

    def batches(start: int) -> Generator[dict[str, np.ndarray], None, None]:
        iterator = loader.iterate(start)
        try:
            for batch in iterator:
                yield {name: batch[name] for name in ("image", "label", "index")}
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
        finally:
            iterator.close()

    outcome = loop.train(
        task.trainable(mesh), batches, config.training, mesh, config.sharding.mode, config.seed, workdir
    )
    bad = getattr(source, "bad", {})
    if bad:
        print(f"{len(bad)} images could not be read and were skipped: {next(iter(bad.values()))} ...", file=sys.stderr)
    return outcome


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
