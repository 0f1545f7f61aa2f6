"""What a run would take, before it begins: its data, operations, memory and traffic, from the step compiled for its devices.

The devices are those there are, or a TPU slice that one does not have (`jaxdiff.tasks.targets`). No parameter is made and no
weight of a checkpoint is read. Where the step does not fit into a device's memory, other settings are compiled until one does.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxdiff.config import Config, ConfigError
from jaxdiff.data.latents import LatentSource
from jaxdiff.data.sources import Source
from jaxdiff.files import save_png
from jaxdiff.generation.pictures import image_grid
from jaxdiff.tasks import captions
from jaxdiff.tasks.fitting import fitting_mesh
from jaxdiff.tasks.latents import check_stage
from jaxdiff.tasks.make import Parts, Task, make_task, plain_update
from jaxdiff.tasks.memory import device_memory
from jaxdiff.tasks.pretrained import Pretrained
from jaxdiff.tasks.targets import Slice, memory_wanting, open_target
from jaxdiff.tasks.text_model import TextModel
from jaxdiff.tasks.train import check_continuation, check_latents, describe, make_batches, open_run, prepare_parts
from jaxdiff.training.chips import Chip
from jaxdiff.training.collectives import collectives, sent
from jaxdiff.training.loop import Trainable
from jaxdiff.training.sharding import fsdp_shardings, is_table, make_mesh, make_runner, state_shardings
from jaxdiff.training.stages import Stage
from jaxdiff.training.watching import flops_of

PICTURE = "first_batch.png"  # in the workdir: the only thing that is written
MARGIN = 0.95  # of the memory there is: what a guess at a smaller batch aims at
GIB = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run as it would begin; of one with stages the last, whose images are the largest."""

    config: Config
    task: Task
    source: Source
    mesh: Mesh
    parts: Parts
    trainable: Trainable
    batch: dict[str, np.ndarray]
    room: int | None  # bytes of memory of a device

    @property
    def stage(self) -> Stage:
        """The one that is looked at."""
        return (self.trainable.stages or (Stage("", 0, self.config.training.batch_size),))[-1]

    @property
    def examples(self) -> dict[str, np.ndarray]:
        """The first batch without what fills it up."""
        return {name: value[: self.stage.batch_size] for name, value in self.batch.items()}

    @functools.cached_property
    def state(self) -> Any:
        """Shapes of the training state."""
        return jax.eval_shape(self.trainable.init, jax.random.key(0))

    @property
    def frozen(self) -> tuple[Any, ...]:
        """Shapes of what no step changes, as arguments of an update."""
        return () if self.trainable.frozen is None else (_shapes(self.trainable.frozen),)

    @property
    def kept(self) -> int:
        """Bytes of state and frozen arrays on a device."""
        tree = (self.state, self.frozen)
        where = state_shardings(tree, self.mesh, self.config.sharding.mode)
        shares = jax.tree.map(lambda a, w: math.prod(w.shard_shape(a.shape)) * a.dtype.itemsize, tree, where)
        return sum(jax.tree.leaves(shares))


class Step(NamedTuple):
    """A compiled step, of which all numbers are of one device. `needed`: bytes of memory."""

    needed: int
    compiled: Any  # None where the compiler gave up for want of memory
    seconds: float  # that it took to compile


def preflight(config: Config, workdir: pathlib.Path, target: str | None = None) -> None:
    """Print what a run would take on the devices there are, or on a slice called `target`. Raises ConfigError.

    Nothing is written but a picture of the first batch.
    """
    if jax.process_count() > 1:
        raise ConfigError("--dry_run is for one process; many chips are looked at by --target, from one machine")
    slice_ = open_target(target) if target else None
    run = _open(config, workdir, slice_)
    print(describe(run.task, run.source, run.mesh, workdir), flush=True)
    save_png(workdir / PICTURE, picture(run.examples))
    _say("first batch", f"in {workdir / PICTURE}")
    if run.stage.name:
        _say("stage", f"of what follows, {run.stage.name}: the last and largest, in batches of {run.stage.batch_size}")
    flops = _operations(run)
    images = run.stage.batch_size
    counted = "not known" if flops is None else f"{flops / 1e9:,.4g} GFLOP a step, {flops / images / 1e9:,.4g} an image"
    _say("operations", f"{counted} (the model's own: nothing recomputed)")
    _say("expected", _traffic(expected_traffic(run), run.mesh.size))
    step = _compile(run)
    _report(run, step, flops, slice_)
    if run.room is not None and step.needed > run.room:
        _make_fit(run, step, workdir, slice_)


def _open(config: Config, workdir: pathlib.Path, slice_: Slice | None) -> Run:
    """A run as it would begin, without its weights. Raises ConfigError."""
    mesh = make_mesh(config.sharding, None if slice_ is None else slice_.devices)
    config, source, loaders, pretrained = open_run(config, workdir, mesh)
    check_continuation(config, workdir)
    parts = prepare_parts(config, source, workdir, write=False)[0]
    if pretrained is not None:
        parts = _pretrained_parts(config, pretrained, source, workdir)
    task = make_task(config, parts)
    room = device_memory(mesh.devices.flat[0], mesh.size) if slice_ is None else slice_.room
    mesh = fitting_mesh(config, mesh, pretrained or task, room)
    trainable = task.trainable(mesh)
    first = trainable.stages[-1].first_step if trainable.stages else 0
    with contextlib.closing(make_batches(loaders, parts.tokenizer, first)) as batches:
        return Run(config, task, source, mesh, parts, trainable, next(batches), room)


def _pretrained_parts(config: Config, pretrained: Pretrained, source: Source, workdir: pathlib.Path) -> Parts:
    """As a run has them, but with shapes for parameters; only an autoencoder that latents have to be of is read."""
    networks, shapes = pretrained.model.networks, pretrained.model.params
    if isinstance(source, LatentSource):
        stage = pretrained.first_stage()
        check_latents(config, source, stage.sha256, f"config.model.pretrained = {config.model.pretrained!r}")
    stage = dataclasses.replace(networks.first_stage, params=shapes["autoencoder"])
    check_stage(stage, config)
    tokenizer = captions.prepare(config, source, workdir, False, pretrained.model.tokenizer)[0]
    encoder = {} if config.text.trained else shapes["text_encoder"]
    text_model = TextModel(networks.text_encoder, encoder, tokenizer, sha256="")
    return Parts(tokenizer, stage, text_model, pretrained, shapes["unet"] if config.lora.rank else None)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def picture(batch: dict[str, np.ndarray]) -> UInt8[np.ndarray, "height width c"]:
    """The first images of a batch; of latents, which are no images, the mean's first channels as colours."""
    shown = batch.get("image")
    if shown is None:
        mean = np.split(batch["moments"].astype(np.float32), 2, axis=-1)[0]
        mean = mean[..., :3] if mean.shape[-1] >= 3 else mean[..., :1]
        shown = (127.5 + 127.5 * np.clip(mean / (3 * mean.std() + 1e-6), -1, 1)).astype(np.uint8)
    return image_grid(shown[: 64 if shown.shape[1] <= 128 else 16])


# What it takes ------------------------------------------------------------------------------------------------------------


def _operations(run: Run) -> float | None:
    """Of one step over all devices, forwards and backwards."""
    update = plain_update(run.config, run.parts, run.mesh, max(0, len(run.trainable.stages) - 1))
    return flops_of(update, run.state, _shapes(run.examples), jax.eval_shape(jax.random.key, 0), *run.frozen)


def expected_traffic(run: Run) -> dict[str, int]:
    """Bytes that each device must send in a step, by kind of collective, if all are rings and nothing travels twice.

    Of an array of size B over n devices: its gradient's all-reduce 2 (n - 1) / n B; if it is split over f of them, all-gather and
    reduce-scatter (f - 1) / f B each, and an all-reduce of its part over the others. A table that is split is gathered, and its
    gradient averaged whole (`whole_tables`). What is frozen is gathered only.
    """
    n, f = run.mesh.size, run.mesh.shape["fsdp"]
    others, found = n // f, {"all-reduce": 0.0, "all-gather": 0.0, "reduce-scatter": 0.0}

    def arrays(tree: Any) -> list[tuple[int, bool, bool]]:
        """Bytes of each, whether it is split, and whether it is a table."""
        leaves, where = jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(fsdp_shardings(tree, run.mesh))
        return [
            (math.prod(leaf.shape) * leaf.dtype.itemsize, any(w.spec), is_table(path))
            for (path, leaf), w in zip(leaves, where, strict=True)
        ]

    state = run.state
    for size, split, table in arrays([getattr(state, name, {}) for name in ("params", "discriminator_params")]):
        found["all-gather"] += (f - 1) / f * size * split
        if split and not table:
            found["reduce-scatter"] += (f - 1) / f * size
            found["all-reduce"] += 2 * (others - 1) / others * size / f
        else:
            found["all-reduce"] += 2 * (n - 1) / n * size
    for size, split, _ in arrays(run.frozen):
        found["all-gather"] += (f - 1) / f * size * split
    return {kind: round(size) for kind, size in found.items() if size}


def _compile(run: Run) -> Step:
    """The step, for the run's devices."""
    runner = make_runner(
        lambda axis_name: _update(run, axis_name), run.state, run.mesh, run.config.sharding.mode, *run.frozen
    )
    state = jax.tree.map(
        lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), run.state, runner.state_shardings
    )
    batch = _shapes(run.batch)
    if run.config.sharding.mode == "pmap":
        n = run.mesh.size
        batch = {k: jax.ShapeDtypeStruct((n, v.shape[0] // n, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    device = run.mesh.devices.flat[0]
    print(f"compiling for {run.mesh.size} x {device.device_kind} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    lowered = runner.step.lower(state, batch, jax.eval_shape(jax.random.key, 0), *runner.frozen)  # type: ignore[attr-defined]
    # Code of a CPU that is not run need not be good; the plan of its memory is the same.
    quick: Any = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else {}
    try:
        compiled = lowered.compile(quick)
    except jax.errors.JaxRuntimeError as error:
        if wanting := memory_wanting(error):
            return Step(wanting[0], None, time.perf_counter() - began)
        raise
    plan = compiled.memory_analysis()
    needed = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Step(needed + plan.temp_size_in_bytes, compiled, time.perf_counter() - began)


def _update(run: Run, axis_name: str | None) -> Any:
    make, stages = run.trainable.make_update, run.trainable.stages
    return make(axis_name, number=len(stages) - 1) if stages else make(axis_name)


# What is said of it -------------------------------------------------------------------------------------------------------


def _say(name: str, text: str) -> None:
    print(f"{name:11}{text}" if len(name) < 11 else f"{name} {text}", flush=True)


def _report(run: Run, step: Step, flops: float | None, slice_: Slice | None) -> None:
    _say("memory", _memory(run, step))
    if step.compiled is None:
        return
    traffic = collectives(step.compiled.as_text())
    bytes_sent = sent(step.compiled.as_text(), run.mesh.size)
    if run.mesh.size > 1:
        kinds = ", ".join(f"{one.count} {kind} of {one.bytes / 1e6:,.4g} MB in all" for kind, one in traffic.items())
        _say("compiled", f"{kinds or 'no collective'}: each device sends {bytes_sent / 1e6:,.4g} MB a step")
    if slice_ is not None:
        _predict(run, step, flops, bytes_sent, slice_.chip)


def _memory(run: Run, step: Step) -> str:
    room = "whose memory this device does not tell"
    if run.room is not None:
        left = run.room - step.needed
        verdict = f"fits, {_gib(left)} GiB to spare" if left >= 0 else f"DOES NOT FIT, by {_gib(-left)} GiB"
        room = f"of the {_gib(run.room)} that it has: {verdict}"
    if step.compiled is None:
        detail = f"state and frozen parameters {_gib(run.kept)}; the compiler gave up"
    else:
        plan = step.compiled.memory_analysis()
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        detail = (
            f"arguments {_gib(plan.argument_size_in_bytes)}, of which {_gib(plan.alias_size_in_bytes)} are replaced in "
            f"place; temporaries {_gib(plan.temp_size_in_bytes)}; other results {_gib(results)}"
        )
    return f"a device needs {_gib(step.needed)} GiB {room} ({detail}; compiled in {step.seconds:.0f} s)"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if abs(size) >= GIB else f"{size / GIB:.3g}"


def _traffic(expected: dict[str, int], devices: int) -> str:
    if not expected:
        return f"no traffic between devices ({devices} of them)" if devices > 1 else "no traffic: one device"
    kinds = " + ".join(f"{kind} {size / 1e6:,.4g}" for kind, size in expected.items())
    return f"each of {devices} devices sends {sum(expected.values()) / 1e6:,.4g} MB a step: {kinds}"


def _predict(run: Run, step: Step, flops: float | None, bytes_sent: int, chip: Chip) -> None:
    """A roofline, and called one."""
    cost = step.compiled.cost_analysis()
    # XLA counts the body of a loop once; then both counts are scaled up to the operations of the model.
    times = max(1.0, (flops or 0) / run.mesh.size / cost["flops"])
    work, moved = cost["flops"] * times, cost["bytes accessed"] * times
    _say(
        "program", f"{work / 1e9:,.4g} GFLOP and {moved / 1e9:,.4g} GB of memory read or written a step, of each device"
    )
    seconds = roofline(work, moved, bytes_sent, chip)
    parts = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in seconds.items())
    best, worst, images = max(seconds.values()), sum(seconds.values()), run.stage.batch_size
    _say(
        "predicted",
        f"{1e3 * best:.3g} ms a step if all overlaps, {1e3 * worst:.3g} if nothing does ({parts} ms): {images / worst:,.0f} to "
        f"{images / best:,.0f} images/s. A roofline of what {chip.name} can do at best, NOT a measurement",
    )


def roofline(flops: float, moved: float, bytes_sent: float, chip: Chip) -> dict[str, float]:
    """Seconds that a chip takes at its best for operations, bytes of memory and bytes sent."""
    return {
        "computing": flops / chip.flops,
        "memory": moved / chip.memory_bandwidth,
        "traffic": bytes_sent / chip.link,
    }


# Until it fits ------------------------------------------------------------------------------------------------------------


def _make_fit(run: Run, step: Step, workdir: pathlib.Path, slice_: Slice | None) -> None:
    """Compile with other settings, one more at a time, until the step fits; print what to type."""
    config, changes = run.config, dict[str, Any]()
    while run.room is not None and step.needed > run.room:
        more = remedy(run, step.needed)
        if more is None:
            _say("", "nothing helps: take more or larger devices, a smaller model, or bfloat16 parameters")
            return
        changes |= more
        run = _open(changed(config, changes), workdir, slice_)
        step = _compile(run)
        _say("", f"with {_flags(changes)}: {_memory(run, step)}")
    _say("to type", _flags(changes))


def _flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--config.{name}={str(value).replace(' ', '').strip('()')}" for name, value in changes.items())


def remedy(run: Run, needed: int) -> dict[str, Any] | None:
    """The next thing to change in a run that needs so many bytes on a device; None where there is nothing left."""
    config, size, fsdp = run.config, run.mesh.size, run.mesh.shape["fsdp"]
    room, batch, accumulation = run.room or 0, run.stage.batch_size, config.training.accumulation_steps
    split = {"sharding.fsdp": size} if config.sharding.mode == "jit" and fsdp < size else None
    if split and run.kept > room / 2:
        return split
    if config.task == "diffusion" and not config.model.remat:
        return {"model.remat": True}
    least = size * accumulation
    if batch > least and run.kept < room:
        share = (MARGIN * room - run.kept) / (needed - run.kept)  # what is not kept is as large as the batch
        smaller = min(batch // 2, 2 ** math.floor(math.log2(max(batch * share, 1))))
        smaller = max(least, smaller // least * least)
        if config.progressive_gan.batch_sizes and config.task == "progressive_gan":
            return {"progressive_gan.batch_sizes": tuple(min(b, smaller) for b in config.progressive_gan.batch_sizes)}
        return {"training.batch_size": smaller}
    return split


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A config with other values of some keys, such as {"model.remat": True}."""
    for name, value in changes.items():
        section, key = name.split(".")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})  # type: ignore[arg-type]
    return config
