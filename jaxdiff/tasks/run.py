"""A run and its workdir: opening one to make images with it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxdiff.config import Config, ConfigError, SamplingConfig, to_config
from jaxdiff.files import read_json
from jaxdiff.generation.generate import make_generator
from jaxdiff.generation.image_model import ImageModel, Request
from jaxdiff.generation.pipelines import IMAGE_STRENGTH, Prompts, blend_request, condition_of, edit_request, gathered
from jaxdiff.generation.sampling import knobs_of
from jaxdiff.tasks import captions
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.tasks.first_stage import FOLDER as AUTOENCODER
from jaxdiff.tasks.first_stage import load_first_stage
from jaxdiff.tasks.make import Parts, Task, at_step, make_task
from jaxdiff.tasks.pretrained import frozen_on_devices, keep_pretrained, open_pretrained
from jaxdiff.tasks.progressive_gan import ProgressiveGANTask
from jaxdiff.tasks.stable_diffusion import SizeError
from jaxdiff.tasks.text_model import load_text_model
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.sharding import make_mesh
from jaxdiff.weights.tokenizer import Tokenizer

Size = tuple[int | None, int | None]  # height and width of images; None: as trained
AS_TRAINED: Size = (None, None)


def read_config(workdir: pathlib.Path) -> Config:
    """The config stored in a workdir. Raises ConfigError naming the file where it is missing or damaged."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} not found: {workdir} is not the workdir of a run")
    try:
        return to_config(read_json(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run: the task, the moving average of its parameters, the step they are of, and the names of its classes.

    Of a diffusion model it is a `jaxdiff.generation.pipelines.Pipeline`.
    """

    task: Task
    params: Any
    step: int
    class_names: tuple[str, ...]
    captions: tuple[str, ...] = ()  # some of the training data's, where the model reads text

    @property
    def model(self) -> ImageModel:
        """What it takes to make images. Raises ConfigError where the run is not a diffusion model."""
        if not isinstance(self.task, DiffusionTask):
            raise ConfigError(f"only a diffusion model can do that, and this run is of task {self.task.config.task!r}")
        return self.task.image_model

    def with_size(self, height: int | None = None, width: int | None = None) -> "Run":
        """The same run for images of another size. Raises SizeError where it can make none: only Stable Diffusion can."""
        if not isinstance(self.task, DiffusionTask) or self.task.pretrained is None:
            raise _one_size((height, width))
        return dataclasses.replace(self, task=self.task.with_size(height, width))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What reads the prompts; None where the model is not asked by text."""
        return self.task.tokenizer

    @property
    def settings(self) -> SamplingConfig:
        """How the run makes images unless something else is asked for."""
        return self.task.config.sampling

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

    def image_to_image(
        self,
        images: Any,
        seeds: Sequence[int] | np.ndarray,
        prompts: Prompts = None,
        negative: str = "",
        strength: float = IMAGE_STRENGTH,
        settings: SamplingConfig | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """An image for each seed (and prompt or label), beginning from those given (one, or one each; uint8)."""
        request = edit_request(self, condition_of(self, prompts, negative), images, None, seeds)
        return self.make(seeds, request, settings, strength=strength)

    def inpaint(
        self,
        images: Any,
        masks: Any,
        seeds: Sequence[int] | np.ndarray,
        prompts: Prompts = None,
        negative: str = "",
        strength: float = 1.0,
        settings: SamplingConfig | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """An image for each seed (and prompt or label): where its mask is white made anew, where it is black that given."""
        request = edit_request(self, condition_of(self, prompts, negative), images, masks, seeds)
        return self.make(seeds, request, settings, strength=strength)

    def interpolate(
        self,
        num: int,
        seeds: Sequence[int] | np.ndarray,
        prompts: Prompts = None,
        negative: str = "",
        settings: SamplingConfig | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """`num` images from the first of two seeds to the second, or of two prompts; ends included."""
        seeds_of_ends = np.asarray(seeds, np.uint32)
        request, places = blend_request(condition_of(self, prompts, negative), seeds_of_ends, num)
        return self.make(places, request, settings)

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
        strength: float = 1.0,
    ) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Images for seeds and a request, uint8, some at a time; `settings` default to the run's own.

        The request: labels, `text(...)`, None, or a `Request` with more than that. `strength`: of a request with an image.
        """
        settings = settings or self.task.config.sampling
        mesh = mesh or sampling_mesh(self.task.config)
        asked = request.condition if isinstance(request, Request) else request
        sample = self.task.make_sample(settings, asked is not None and self.task.is_guided(settings))
        generate = make_generator(sample, mesh, settings.batch_per_device)
        knobs = self.task.make_knobs(settings)
        if isinstance(request, Request) and not isinstance(self.task, ProgressiveGANTask):
            knobs = knobs_of(self.model, settings, strength)
        return generate(self.params, seeds, request, knobs)

    def make(
        self,
        seeds: Sequence[int] | np.ndarray,
        request: Any = None,
        settings: SamplingConfig | None = None,
        mesh: Mesh | None = None,
        strength: float = 1.0,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """All images of `generate` as one array, with a progress bar."""
        return gathered(self.generate(seeds, request, settings, mesh, strength), len(seeds))


def load_run(workdir: str | pathlib.Path, height: int | None = None, width: int | None = None) -> Run:
    """Open a run to make images with its newest checkpoint. Raises ConfigError or CheckpointError with one clear line.

    height, width: of images, in the place of what it was trained for, where training began from Stable Diffusion.
    """
    workdir = pathlib.Path(workdir)
    class_names = read_class_names(workdir)
    task, step, params, kept = restore_run(workdir, (height, width))
    return Run(at_step(task, step), whole(task, params), step, class_names, tuple(kept))


def read_class_names(workdir: pathlib.Path) -> tuple[str, ...]:
    """The names of a run's classes, as its data had them. Raises ConfigError naming the file where it is damaged."""
    path = workdir / "classes.json"
    try:
        names = read_json(path) if path.is_file() else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it must hold a list of names")
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return tuple(names)


def restore_run(workdir: pathlib.Path, size: Size = AS_TRAINED) -> tuple[Task, int, Any, list[str]]:
    """Task, step, moving average of the trained parameters, and captions of the newest checkpoint. Raises as `load_run` does."""
    config = read_config(workdir)
    parts, kept = read_parts(config, workdir, size)
    task = make_task(config, parts)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=where), shapes)
    step, items = Checkpoints(workdir / "checkpoints").restore_items(ema_params=target)
    return task, step, items["ema_params"], kept


def read_parts(config: Config, workdir: pathlib.Path, size: Size = AS_TRAINED) -> tuple[Parts, list[str]]:
    """What a run keeps in its workdir besides config and checkpoints, and its captions. Raises ConfigError."""
    if size != AS_TRAINED and not config.model.pretrained:
        raise _one_size(size)
    if config.task != "diffusion":
        return Parts(), []
    tokenizer, kept = captions.read(workdir) if config.text.enabled else (None, [])
    if config.model.pretrained:
        pretrained = open_pretrained(config, workdir)
        if size != AS_TRAINED:  # before a tensor is read
            pretrained = pretrained.with_size(*size)
            pretrained.model.check_room(sampling_mesh(config))
        sha256 = keep_pretrained(pretrained, config, workdir, write=False)
        stage, text_model, unet = frozen_on_devices(pretrained, config, sha256, pretrained.first_stage(), mesh=None)
        return Parts(text_model.tokenizer, stage, text_model, pretrained, unet), kept
    own = load_first_stage(workdir / AUTOENCODER) if config.autoencoder else None
    own_text = load_text_model(workdir) if config.text.pretrained else None
    return Parts(tokenizer if own_text is None else own_text.tokenizer, own, own_text), kept


def _one_size(size: Size) -> SizeError:
    name = "height" if size[0] is not None else "width"
    return SizeError(f"{name} goes with --model, and with runs that began from one: this run has its own")


def sampling_mesh(config: Config) -> Mesh:
    """The devices that make a run's images, each with all parameters."""
    return make_mesh(dataclasses.replace(config.sharding, mode="jit", fsdp=1))


def whole(task: Task, params: Any) -> Any:
    """Trained parameters with those that the task keeps as they are."""
    return task.whole(params) if isinstance(task, DiffusionTask) else params
