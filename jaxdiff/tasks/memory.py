"""How much memory there is, and how much parameters take, before any of them is read."""

import math
import os
from typing import Any

import jax
from jax.sharding import Sharding

from jaxdiff.config import ConfigError


def device_memory(device: jax.Device, sharing: int = 1) -> int | None:
    """Bytes that a device has for arrays; of a CPU the machine's, `sharing` devices alike. None where nobody tells."""
    if device.platform != "cpu":
        limit = (device.memory_stats() or {}).get("bytes_limit")
        return int(limit) if limit else None
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return total // sharing if total > 0 else None


def bytes_of(shapes: Any) -> int:
    """Of a tree of arrays or shapes, whole."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def check_room(shapes: Any, device: jax.Device, sharing: int = 1) -> None:
    """Raise ConfigError if a device has no room for its share of these (shapes with a sharding); see `device_memory`."""

    def share(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, Sharding) else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    needed, room = sum(map(share, jax.tree.leaves(shapes))), device_memory(device, sharing)
    if room is not None and needed > room:
        raise ConfigError(
            f"the parameters alone need {needed / 2**30:.2f} GiB on every device, which has {room / 2**30:.2f}: take a "
            "smaller dtype, or split them over devices (a mesh with fsdp)"
        )
