"""TPU slices that one need not have: the real TPU compiler compiles for a described topology on any machine with libtpu."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from jaxdiff.config import ConfigError
from jaxdiff.training.chips import CHIPS, Chip

EXAMPLES = {"v5e": "1x1, 2x2, 2x4, 4x4", "v6e": "1x1, 2x2, 2x4, 4x4", "v5p": "2x2x1, 2x2x2, 2x4x4"}
# What libtpu would otherwise ask a cloud machine's surroundings for, at length and in vain.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two may compile at a time: nobody has a TPU to himself here
}
_SIZE = re.compile(r"([\d.]+)([KMGTP]?)\b")
_NOT_ENOUGH = (
    re.compile(r"Used ([\d.]+[KMGTP]?) of ([\d.]+[KMGTP]?) hbm", re.I),
    re.compile(r"\(([\d.]+[KMGTP]?)\) exceeds available HBM \(([\d.]+[KMGTP]?)\)", re.I),
)


class Slice(NamedTuple):
    """Chips that belong together."""

    name: str
    chip: Chip
    devices: list[jax.Device]
    room: int  # bytes of a chip's memory that the compiler gives to a program


def choose_target(name: str) -> None:
    """Make ready to compile for a slice; before JAX looks for devices. Raises ConfigError for a name that means none."""
    kind, _, sides = name.partition(":")
    if kind not in EXAMPLES or not re.fullmatch(r"\d+(x\d+){1,2}", sides):
        known = "; ".join(f"{chip}:{examples.replace(', ', f', {chip}:')}" for chip, examples in EXAMPLES.items())
        raise ConfigError(f"--target {name}: must be a TPU slice, of any size that there is, such as {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--target needs the TPU compiler: pip install 'jaxdiff[tpu]', best in an environment of its own"
        )
    for variable, value in SURROUNDINGS.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # without a TPU no program can be read back from it
    compilation_cache.reset_cache()  # whether it is used was settled with the first program compiled


def open_target(name: str) -> Slice:
    """The slice of a name like "v5e:2x4", after `choose_target`. Raises ConfigError where there is none of that shape."""
    from jax.experimental import topologies

    kind, sides = name.split(":")
    alone = {"chips_per_host_bounds": [1, 1, 1]} if set(sides) <= set("1x") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:  # JaxRuntimeError is a RuntimeError
        raise ConfigError(
            f"--target {name}: the TPU compiler knows no such slice ({str(error).splitlines()[0]}); "
            f"some sizes of {kind}: {EXAMPLES[kind]}"
        ) from error
    chip = next(chip for chip in CHIPS if chip.name == kind)
    return Slice(name, chip, list(found), _room(found[0]))


def memory_wanting(error: Exception) -> tuple[int, int] | None:
    """Bytes that a program needs and bytes that there are, where the TPU compiler gave up for want of memory; else None."""
    for pattern in _NOT_ENOUGH:
        if found := pattern.search(str(error)):
            return _bytes(found[1]), _bytes(found[2])
    return None


def _room(device: jax.Device) -> int:
    """A compiler tells what memory there is when it is asked for far too much."""
    where = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=where)
    try:
        jax.jit(lambda x: x + 1, out_shardings=where).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if wanting := memory_wanting(error):
            return wanting[1]
        raise
    raise ConfigError(f"--target: the TPU compiler does not tell the memory of a {device.device_kind}")


def _bytes(text: str) -> int:
    """Of 15.75G, say: the compiler's units are powers of 1024."""
    found = _SIZE.fullmatch(text.upper())
    assert found is not None
    return round(float(found[1]) * 1024 ** " KMGTP".index(found[2] or " "))
