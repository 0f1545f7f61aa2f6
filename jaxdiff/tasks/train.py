"""Starting a run in a workdir, or going on with it."""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.config import Config, ConfigError, check, check_latent_size, flatten, may_change, to_json
from jaxdiff.data.latents import LatentLoader, LatentSource
from jaxdiff.data.loader import Loader, iterate_in_turn
from jaxdiff.data.sources import Source, open_source
from jaxdiff.files import write_text
from jaxdiff.tasks import captions
from jaxdiff.tasks.autoencoder import AutoencoderTask
from jaxdiff.tasks.first_stage import keep_first_stage
from jaxdiff.tasks.fitting import fitting_mesh
from jaxdiff.tasks.latents import check_stage
from jaxdiff.tasks.make import Parts, Task, make_task, plain_update
from jaxdiff.tasks.pretrained import Pretrained, frozen_on_devices, keep_pretrained, open_pretrained, resolved
from jaxdiff.tasks.progressive_gan import ProgressiveGANTask, resolve_length
from jaxdiff.tasks.reconstruct import make_training_reconstruction_scores
from jaxdiff.tasks.run import read_config
from jaxdiff.tasks.score import make_training_scores, training_images
from jaxdiff.tasks.text_model import keep_text_model
from jaxdiff.tasks.vae import PREVIEW
from jaxdiff.training import loop
from jaxdiff.training.lock import holding
from jaxdiff.training.log import read_metrics
from jaxdiff.training.processes import is_first
from jaxdiff.training.sharding import make_mesh, padded_size
from jaxdiff.weights.tokenizer import Tokenizer


def resolve_classes(config: Config, source: Source) -> Config:
    """`model.num_classes = -1` becomes what the data has. Raises ConfigError where model and data disagree."""
    wanted, found = config.model.num_classes, source.num_classes
    if wanted > 0 and wanted < found:
        raise ConfigError(f"config.model.num_classes = {wanted}, but there are {found} classes in {source.describe()}")
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_classes=found if wanted == -1 else wanted)
    )


def check_continuation(config: Config, workdir: pathlib.Path) -> None:
    """Raise ConfigError for a workdir whose run `config` does not continue, or nobody can; tell what a new length changes."""
    read_metrics(workdir / "metrics.jsonl")  # which the loop would find damaged only once it has a state
    if not (workdir / "config.json").is_file():
        return
    old, new = flatten(read_config(workdir)), flatten(config)
    for name, value in new.items():
        if old[name] != value and not may_change(name):
            raise ConfigError(
                f"{workdir} holds a run with config.{name} = {old[name]!r}, now it is {value!r}: "
                "give another --workdir for a new run"
            )
    before, after = old["training.num_steps"], config.training.num_steps
    if before != after and config.optimizer.schedule == "cosine":
        print(
            f"note: the cosine learning rate now ends at step {after:,}, not {before:,}: it differs from here on",
            flush=True,
        )


def _open_data(config: Config) -> Source:
    data = config.data
    try:
        return open_source(
            data.source,
            data.dir or None,
            data.split,
            require_labels=config.model.num_classes != 0,
            require_text=config.text.enabled,
            max_bad_fraction=data.max_bad_fraction,
        )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data: {error}") from error


def _make_loader(config: Config, source: Source, batch_size: int, **options: Any) -> Loader:
    data = config.data
    try:
        make_loader: Any = LatentLoader if isinstance(source, LatentSource) else Loader
        return make_loader(
            source,
            batch_size,
            config.seed,
            image_size=data.image_size,
            channels=data.channels,
            crop=data.crop,
            flip=data.flip,
            num_threads=data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **options,
        )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data: {error}") from error


def _make_loaders(config: Config, source: Source, mesh: Mesh) -> list[Loader]:
    """A loader for each stage of the run. Raises ConfigError where its batches cannot be shared out evenly."""
    if config.task != "progressive_gan":
        size = padded_size(config.training.batch_size, config.training.accumulation_steps, mesh)
        return [_make_loader(config, source, config.training.batch_size, padded_size=size)]
    task, loaders = ProgressiveGANTask(config), []
    task.separate_devices(mesh)
    parts = config.progressive_gan.stddev_parts
    if parts % mesh.size and is_first():
        print(
            f"note: config.progressive_gan.stddev_parts = {parts} is no multiple of the {mesh.size} devices: each step they send "
            "each other what the minibatch standard deviation looks at",
            file=sys.stderr,
        )
    for stage, options in task.loading():
        if stage.batch_size % mesh.size:
            of_stages = config.progressive_gan.batch_sizes
            name = f"progressive_gan.batch_sizes at {stage.name}" if of_stages else "training.batch_size"
            raise ConfigError(
                f"config.{name} = {stage.batch_size} must be divisible by {mesh.size} devices, for a progressive GAN judges a "
                f"batch's images together and none can fill it up: {padded_size(stage.batch_size, 1, mesh)} would do"
            )
        loaders.append(_make_loader(config, source, stage.batch_size, **options))
    return loaders


def _pretrained_parts(
    config: Config, pretrained: Pretrained, source: Source, workdir: pathlib.Path, write: bool, mesh: Mesh
) -> tuple[Parts, list[str]]:
    """What a run takes from a Stable Diffusion checkpoint, frozen parts on the devices, and captions. Raises ConfigError."""
    stage = pretrained.first_stage()
    check_stage(stage, config)
    check_latents(config, source, stage.sha256, f"config.model.pretrained = {config.model.pretrained!r}")
    sha256 = keep_pretrained(pretrained, config, workdir, write)
    tokenizer, kept = captions.prepare(config, source, workdir, write, pretrained.model.tokenizer)
    stage, text_model, unet = frozen_on_devices(pretrained, config, sha256, stage, mesh)
    return Parts(tokenizer, stage, text_model, pretrained, unet), kept


def check_latents(config: Config, source: Source, sha256: str, stage: str) -> None:
    """Raise ConfigError where the data are latents of another autoencoder than the one called `stage`."""
    if isinstance(source, LatentSource) and source.info.sha256 != sha256:
        raise ConfigError(
            f"config.data.dir = {config.data.dir!r} holds latents of another autoencoder ({source.info.sha256[:12]}...) "
            f"than {stage} (SHA-256 {sha256[:12]}...): encode the data anew"
        )


def prepare_parts(config: Config, source: Source, workdir: pathlib.Path, write: bool) -> tuple[Parts, list[str]]:
    """Tokenizer, autoencoder and text encoder of a run, kept in its workdir from now on, and captions. Raises ConfigError."""
    if config.task != "diffusion":
        return Parts(), []
    stage = text_model = tokenizer = None
    kept: list[str] = []
    if config.autoencoder:
        stage = keep_first_stage(config.autoencoder, workdir, write=False)
        check_stage(stage, config)
        check_latent_size(config, config.data.image_size // stage.model.downsampling)
        check_latents(config, source, stage.sha256, f"config.autoencoder = {config.autoencoder!r}")
    if config.text.pretrained:
        text_model = keep_text_model(config.text.pretrained, workdir, write=False)
    if write:  # only now that nothing is wrong with either
        if stage is not None:
            keep_first_stage(config.autoencoder, workdir)
        if text_model is not None:
            keep_text_model(config.text.pretrained, workdir)
    if config.text.enabled:
        tokenizer, kept = captions.prepare(
            config, source, workdir, write, None if text_model is None else text_model.tokenizer
        )
    return Parts(tokenizer, stage, text_model), kept


def describe(task: Task, source: Source, mesh: Mesh, workdir: pathlib.Path) -> str:
    """What a run is about to do, in a few lines."""
    config = task.config
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    size, padded = config.training.batch_size, ""
    repeated = padded_size(size, config.training.accumulation_steps, mesh) - size
    if repeated and config.task != "progressive_gan":
        padded = f" (and {repeated} repeated with weight 0, for all devices to have as many)"
    kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
    lines = {
        "data": source.describe(),
        **task.describe(),
        "parameters": f"{parameters:,}",
        "training": f"{config.training.num_steps:,} steps of {size} images{padded}, seed {config.seed}",
        "devices": f"{mesh.size} x {kinds} ({config.sharding.mode}, data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']})"
        + f", {jax.process_count()} processes" * (jax.process_count() > 1),
        "workdir": str(workdir),
    }
    return "\n".join(f"{name:11}{text}" for name, text in lines.items())


def train_run(config: Config, workdir: pathlib.Path, profile: bool = False) -> loop.Outcome:
    """Train `config` in `workdir`, from the start or from where it stopped. Raises ConfigError before anything compiles.

    `profile`: write a trace of a few steps.
    """
    mesh = make_mesh(config.sharding)
    config, source, loaders, pretrained = open_run(config, workdir, mesh)
    check_first_batch(loaders[0])
    with holding(workdir):
        check_continuation(config, workdir)
        return _train_in(workdir, config, source, loaders, pretrained, mesh, profile)


def open_run(
    config: Config, workdir: pathlib.Path, mesh: Mesh
) -> tuple[Config, Source, list[Loader], Pretrained | None]:
    """What data and checkpoint say of a run: its config, resolved; source, loaders and checkpoint. Raises ConfigError."""
    platform = mesh.devices.flat[0].platform
    if config.model.attention_implementation == "cudnn" and platform != "gpu":
        raise ConfigError(
            f"config.model.attention_implementation = 'cudnn' needs an NVIDIA GPU, not {platform}: use 'auto'"
        )
    pretrained = None
    if config.model.pretrained:
        pretrained = open_pretrained(config, workdir)
        config = resolved(config, pretrained)
        check(config)
    source = _open_data(config)
    config = resolve_length(resolve_classes(config, source))
    check(config)
    return config, source, _make_loaders(config, source, mesh), pretrained


def check_first_batch(loader: Loader) -> None:
    """Raise ConfigError for data that cannot be read, before anything is written or compiled."""
    try:
        loader[loader.begin[0]]
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def make_batches(
    loaders: list[Loader], tokenizer: Tokenizer | None, start: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches start, start + 1, ... as an update wants them, of which each process gets its share. Raises ConfigError."""
    iterator = iterate_in_turn(loaders, start)
    try:
        for batch in iterator:
            told = {"label": batch["label"]}
            if tokenizer is not None:
                told = {"tokens": captions.tokens_of(tokenizer, batch["text"])[0]}
            names = ("image", "moments", "weight")
            shown: dict[str, np.ndarray] = {name: batch[name] for name in names if name in batch}
            yield {**shown, "index": batch["index"], **told}
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error
    finally:
        iterator.close()


def _train_in(
    workdir: pathlib.Path,
    config: Config,
    source: Source,
    loaders: list[Loader],
    pretrained: Pretrained | None,
    mesh: Mesh,
    profile: bool,
) -> loop.Outcome:
    """Train in a workdir that is this run's alone."""
    first = jax.process_index() == 0
    if pretrained is not None:
        mesh = fitting_mesh(config, mesh, pretrained)
        parts, kept = _pretrained_parts(config, pretrained, source, workdir, first, mesh)
    else:
        parts, kept = prepare_parts(config, source, workdir, first)
    tokenizer, task = parts.tokenizer, make_task(config, parts)
    if pretrained is None:
        mesh = fitting_mesh(config, mesh, task)
    if first:
        print(describe(task, source, mesh, workdir), flush=True)
        write_text(workdir / "config.json", to_json(config))
        write_text(workdir / "classes.json", json.dumps(source.class_names) + "\n")

    preview: Any = None
    if isinstance(task, AutoencoderTask):
        preview = training_images(config, source)
    elif config.task == "vae":
        real = training_images(config, source)
        preview = np.stack([real.image(i) for i in range(min(PREVIEW, len(real)))])
    elif tokenizer is not None:
        count = config.sampling.num_images
        preview = captions.request(tokenizer, [kept[i % len(kept)] for i in range(count)])
    plain = functools.partial(plain_update, config, parts, mesh)
    trainable = dataclasses.replace(task.trainable(mesh, preview), plain=plain)
    if config.evaluation.every:
        if isinstance(task, AutoencoderTask):
            scores = make_training_reconstruction_scores(task, source, config.evaluation, mesh)
        else:
            scores = make_training_scores(task, source, kept, config.evaluation, mesh, workdir)
        trainable = dataclasses.replace(trainable, scores=scores, score_every=config.evaluation.every)
    batches = functools.partial(make_batches, loaders, tokenizer)
    outcome = loop.train(trainable, batches, config.training, mesh, config.sharding.mode, config.seed, workdir, profile)
    bad = getattr(source, "bad", {})
    if bad:
        print(f"{len(bad)} images could not be read and were skipped: {next(iter(bad.values()))} ...", file=sys.stderr)
    return outcome
