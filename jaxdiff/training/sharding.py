"""Where arrays live: one mesh with the axes `data` and `fsdp`, and the two ways to run an update on it (jit and pmap).

The batch is split over both axes; parameters, optimiser state and their moving average are split over `fsdp` (ZeRO-3,
Rajbhandari et al. 2020), or are copied to every device where fsdp = 1.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.config import ConfigError, ShardingConfig

BATCH_AXES = ("data", "fsdp")
ACTIVATIONS = 0.25  # of a device's memory, where it has to be guessed


def make_mesh(config: ShardingConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """All devices (or those given) as a mesh [data, fsdp]; fsdp = 0 counts as 1 as long as nobody knows what fits.

    Raises ConfigError where fsdp does not divide their number.
    """
    if config.mode == "pmap" and devices is None and jax.process_count() > 1:
        raise ConfigError("config.sharding.mode = 'pmap' is for one process: of several processes take 'jit'")
    devices, fsdp = devices or jax.devices(), config.fsdp or 1
    if len(devices) % fsdp:
        raise ConfigError(f"config.sharding.fsdp = {config.fsdp} must divide the number of devices, {len(devices)}")
    if config.mode == "pmap" and config.fsdp > 1:
        raise ConfigError("config.sharding.mode = 'pmap' copies the parameters: it needs config.sharding.fsdp = 1")
    shape = (len(devices) // fsdp, fsdp)
    return Mesh(np.array(devices).reshape(shape), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def padded_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> int:
    """What a batch is filled up to, with examples of weight 0, for every device to get the same share of every micro-batch."""
    needed = mesh.size * accumulation_steps
    return -(-batch_size // needed) * needed


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def fsdp_shardings(shapes: Any, mesh: Mesh, min_size: int = 4096) -> Any:
    """A sharding for each leaf: its largest dimension divisible by the `fsdp` axis is split, small leaves are copied."""

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axis = _split_axis(leaf.shape, mesh.shape["fsdp"], min_size)
        return replicated(mesh) if axis is None else NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(rule, shapes)


def _split_axis(shape: tuple[int, ...], fsdp: int, min_size: int) -> int | None:
    """Which dimension of an array is split; None: it is copied."""
    divisible = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
    if fsdp == 1 or not divisible or math.prod(shape) < min_size:
        return None
    return max(divisible, key=lambda axis: shape[axis])


def bytes_a_device(shapes: Any, fsdp: int, min_size: int = 4096) -> int:
    """Of arrays split as `fsdp_shardings` says: what a device holds."""

    def share(leaf: Any) -> int:
        parts = 1 if _split_axis(leaf.shape, fsdp, min_size) is None else fsdp
        return math.prod(leaf.shape) * leaf.dtype.itemsize // parts

    return sum(map(share, jax.tree.leaves(shapes)))


def fewest_that_fit(kept: Any, used: Any, num_devices: int, room: int | None) -> int:
    """The smallest fsdp with which training fits into a device's `room` (bytes; None: not known, so 1).

    kept: all arrays that last from step to step, split; used: those of them that a step needs whole, and makes gradients of.
    A quarter of the room is left to activations, which nobody knows before compiling. Raises ConfigError if nothing fits.
    """
    if room is None:
        return 1
    passing, sizes = 2 * bytes_a_device(used, 1), [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    needed = {n: bytes_a_device(kept, n) + (passing if n > 1 else passing // 2) for n in sizes}
    for fsdp, size in needed.items():
        if size <= room * (1 - ACTIVATIONS):
            return fsdp
    raise ConfigError(
        f"config.sharding.fsdp = 0: parameters, gradients and optimiser state take {needed[num_devices] / 2**30:.2f} GiB on each "
        f"device even if split over all {num_devices}, and of the {room / 2**30:.2f} GiB that it has {ACTIVATIONS:.0%} are for "
        "activations: take more devices, a smaller model, or say an fsdp to try it nevertheless"
    )


def state_shardings(shapes: Any, mesh: Mesh, mode: str) -> Any:
    """Where each leaf of a training state lives: "jit" as `fsdp_shardings` says, "pmap" a copy on every device."""
    if mode == "jit":
        return fsdp_shardings(shapes, mesh)
    return jax.tree.map(lambda _: replicated(mesh), shapes)


def whole(params: Any) -> Any:
    """Parameters with every split one gathered on each device, for as long as they are used; does nothing where none is split.

    Said of what a step differentiates, it makes the parameters travel, never the activations, each once a step; else the
    compiler moves whichever is smaller, wherever a product of matrices meets a split one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return params
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), params)


def is_table(path: jax.tree_util.KeyPath) -> bool:
    """Whether this is where the parameters of Flax's Embed are, of which a step looks up some rows."""
    return bool(path) and getattr(path[-1], "key", None) == "embedding"


def whole_tables(gradient: Any) -> Any:
    """A gradient in which that of every table (Flax's Embed) is whole on each device; does nothing where nothing is split.

    Wanted in parts only, it would be added up by rows: every device would be sent the activations of all examples.
    """

    def rule(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        return whole(leaf) if is_table(path) else leaf

    return jax.tree_util.tree_map_with_path(rule, gradient)


@dataclasses.dataclass(frozen=True)
class Runner:
    """A compiled update and the way to feed it."""

    step: Callable[..., tuple[Any, Any]]  # (state, device batch, key, *frozen) -> (state, metrics)
    put_batch: Callable[[dict[str, np.ndarray]], Any]  # this process's share of a batch -> device batch
    state_shardings: Any
    frozen: tuple[Any, ...] = ()  # what no step changes, on the devices


def _bring(leaf: Any, where: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)


# What does not wait for each other runs side by side, as far as there are cores: the two networks of a GAN, for one.
SIDE_BY_SIDE = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}


def step_options(mesh: Mesh) -> dict[str, Any] | None:
    """Options for compiling a training step, beyond XLA's own: of one CPU device, whose cores would idle otherwise."""
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return SIDE_BY_SIDE if alone and _known(**SIDE_BY_SIDE) else None


@functools.cache
def _known(**options: Any) -> bool:
    """Whether this XLA has the options: they are not part of JAX's interface."""
    try:
        jax.jit(lambda x: x).lower(jnp.zeros(())).compile(options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def make_runner(
    make_update: Callable[[str | None], Callable[..., Any]],
    state_shapes: Any,
    mesh: Mesh,
    mode: str,
    frozen: Any = None,
) -> Runner:
    """Run `make_update(axis_name)` on the mesh: mode "jit" (global arrays, donated state) or "pmap" (a literal `jax.pmap`).

    frozen: arrays that no step changes, brought to the devices once, split as the state is; the update's fourth argument where
    there are some. Their shapes will do for compiling ahead of time.
    """
    where = () if frozen is None else (state_shardings(frozen, mesh, mode),)
    extra = () if frozen is None else (jax.tree.map(_bring, frozen, *where),)
    shardings = state_shardings(state_shapes, mesh, mode)
    if mode == "jit":
        sharding, of_mesh = batch_sharding(mesh), make_update(None)

        def update(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `whole`
                return of_mesh(*args)

        step = jax.jit(
            update,
            in_shardings=(shardings, sharding, replicated(mesh), *where),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
            compiler_options=step_options(mesh),
        )

        def put_global(batch: dict[str, np.ndarray]) -> Any:
            return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

        return Runner(step, put_global, shardings, extra)

    # Under pmap the state has no leading device axis: in_axes and out_axes None keep one (replicated) copy of it.
    pmapped = jax.pmap(
        make_update("data"),
        axis_name="data",
        in_axes=(None, 0, None, *(None,) * len(extra)),
        out_axes=(None, None),
        devices=list(mesh.devices.flat),
    )
    local = jax.local_device_count() if mesh.is_multi_process else mesh.size

    def put_split(batch: dict[str, np.ndarray]) -> Any:
        return {k: v.reshape(local, -1, *v.shape[1:]) for k, v in batch.items()}

    return Runner(pmapped, put_split, shardings, extra)
