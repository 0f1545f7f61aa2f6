"""Where arrays live: one mesh with the axes `data` and `fsdp`, and the two ways to run an update on it (jit and pmap).

The batch is split over both axes; parameters, optimiser state and their moving average are split over `fsdp` (ZeRO-3,
Rajbhandari et al. 2020), or are copied to every device where fsdp = 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.config import ConfigError, ShardingConfig

BATCH_AXES = ("data", "fsdp")


def make_mesh(config: ShardingConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """All devices (or those given) as a mesh [data, fsdp]. Raises ConfigError where fsdp does not divide their number."""
    devices = devices or jax.devices()
    if len(devices) % config.fsdp:
        raise ConfigError(f"config.sharding.fsdp = {config.fsdp} must divide the number of devices, {len(devices)}")
    if config.mode == "pmap" and config.fsdp > 1:
        raise ConfigError("config.sharding.mode = 'pmap' copies the parameters: it needs config.sharding.fsdp = 1")
    shape = (len(devices) // config.fsdp, config.fsdp)
    return Mesh(np.array(devices).reshape(shape), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh, name: str = "training.batch_size") -> None:
    """Raise ConfigError unless every device gets the same share of every micro-batch. `name`: of the key that says its size."""
    needed = mesh.size * accumulation_steps
    if batch_size % needed:
        below = batch_size // needed * needed
        nearest = f"{below} or {below + needed}" if below else f"{needed}"
        by = f"{mesh.size} devices" + (f" x {accumulation_steps} accumulation steps" if accumulation_steps > 1 else "")
        raise ConfigError(f"config.{name} = {batch_size} must be divisible by {by}: {nearest} would do")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def fsdp_shardings(shapes: Any, mesh: Mesh, min_size: int = 4096) -> Any:
    """A sharding for each leaf: its largest dimension divisible by the `fsdp` axis is split, small leaves are copied."""
    size = mesh.shape["fsdp"]

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not divisible or np.prod(leaf.shape) < min_size:
            return replicated(mesh)
        axis = max(divisible, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(rule, shapes)


def state_shardings(shapes: Any, mesh: Mesh, mode: str) -> Any:
    """Where each leaf of a training state lives: "jit" as `fsdp_shardings` says, "pmap" a copy on every device."""
    if mode == "jit":
        return fsdp_shardings(shapes, mesh)
    return jax.tree.map(lambda _: replicated(mesh), shapes)


@dataclasses.dataclass(frozen=True)
class Runner:
    """A compiled update and the way to feed it."""

    step: Callable[..., tuple[Any, Any]]  # (state, device batch, key, *frozen) -> (state, metrics)
    put_batch: Callable[[dict[str, np.ndarray]], Any]  # this process's share of a batch -> device batch
    state_shardings: Any
    frozen: tuple[Any, ...] = ()  # what no step changes, on the devices


def make_runner(
    make_update: Callable[[str | None], Callable[..., Any]],
    state_shapes: Any,
    mesh: Mesh,
    mode: str,
    frozen: Any = None,
) -> Runner:
    """Run `make_update(axis_name)` on the mesh: mode "jit" (global arrays, donated state) or "pmap" (a literal `jax.pmap`).

    frozen: arrays that no step changes, brought to the devices once, split as the state is; the update's fourth argument where
    there are some.
    """
    where = () if frozen is None else (state_shardings(frozen, mesh, mode),)
    extra = () if frozen is None else (jax.device_put(frozen, *where),)
    shardings = state_shardings(state_shapes, mesh, mode)
    if mode == "jit":
        sharding = batch_sharding(mesh)
        step = jax.jit(
            make_update(None),
            in_shardings=(shardings, sharding, replicated(mesh), *where),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
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
