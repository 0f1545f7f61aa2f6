"""How much memory there is, and how much parameters and activations take, before anything is read or compiled."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
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


def least_activations(run: Callable[..., Any], *shapes: Any) -> int:
    """Bytes that an evaluation needs at the least, besides its parameters: those of a convolution's input and output.

    No compiler does without the two at once, whatever it fuses with them. Only traced, which takes a fraction of a second; the
    compiler's own plan is up to some times as much, and takes a minute.
    """
    sizes = [0]
    for equation in _equations(jax.make_jaxpr(run)(*shapes).jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            ends = equation.invars[0].aval, equation.outvars[0].aval
            sizes.append(sum(end.size * end.dtype.itemsize for end in ends))
    return max(sizes)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Also those of the functions within."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def check_room(shapes: Any, device: jax.Device, sharing: int = 1, activations: int = 0) -> None:
    """Raise ConfigError if a device has no room for its share of these (shapes with a sharding); see `device_memory`.

    activations: bytes that one image takes at the least, on the same device.
    """

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
    if room is not None and needed + activations > room:
        raise ConfigError(
            f"the parameters need {needed / 2**30:.2f} GiB on every device and one image at least {activations / 2**30:.2f} "
            f"more, but there are {room / 2**30:.2f}: make smaller images, or take a smaller dtype"
        )
