"""Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), as functions on trees of parameters.

The factors of a network are a tree as its parameters are, with {"a", "b"} in the place of each kernel that is adapted and
without all others. Networks know nothing of it: they are applied with merged parameters, or, in training, within `adapted`.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

Params = Any  # a tree of arrays, or of their shapes

# Config.lora.targets: the network, and what its adapted layers are called.
TARGETS = {
    "attention": ("unet", r".*/transformer/block_\d+/(self|cross)_attention/(query|key|value|out)"),
    "feed_forward": ("unet", r".*/transformer/block_\d+/feed_forward/dense_(in|out)"),
    "projections": ("unet", r".*/transformer/project_(in|out)"),
    "text_encoder": ("text_encoder", r"block_\d+/attention/(query|key|value|out)"),
    "text_feed_forward": ("text_encoder", r"block_\d+/dense_(in|out)"),
}


def target_kernels(shapes: Mapping[str, Params], targets: tuple[str, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of each network the kernels that `targets` mean, by path, with their shapes."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part, pattern in (TARGETS[name] for name in targets):
        for path, leaf in flatten_dict(shapes[part], sep="/").items():
            if re.fullmatch(f"{pattern}/kernel", path):
                found.setdefault(part, {})[path] = leaf.shape
    return found


def init_factors(
    key: Key[Array, ""], shapes: Mapping[str, Params], targets: tuple[str, ...], rank: int
) -> dict[str, Params]:
    """Factors of each network that `targets` mean something of: A random, B zero, so that nothing is changed yet (section 4.1).

    A is uniform within 1 / sqrt(inputs), as in the authors' code. Always float32.
    """
    trees = {}
    kernels = target_kernels(shapes, targets)
    keys = iter(jax.random.split(key, sum(map(len, kernels.values()))))
    for part, found in sorted(kernels.items()):
        leaves: dict[str, Array] = {}
        for path, (inputs, outputs) in sorted(found.items()):
            bound = inputs**-0.5
            leaves[f"{path}/a"] = jax.random.uniform(next(keys), (inputs, rank), minval=-bound, maxval=bound)
            leaves[f"{path}/b"] = jnp.zeros((rank, outputs))
        trees[part] = unflatten_dict(leaves, sep="/")
    return trees


def merge(params: Params, factors: Params, scale: Any) -> Params:
    """W + scale A B for every kernel with factors (section 4.1), in float32 at least; all else as it is."""
    if not isinstance(params, Mapping):
        return _merged(params, factors["a"], factors["b"], scale)
    return {name: merge(leaf, factors[name], scale) if name in factors else leaf for name, leaf in params.items()}


@jax.jit
def _merged(
    kernel: Float[Array, "*k o"], a: Float[Array, "*k r"], b: Float[Array, "r o"], scale: Float[Array, ""]
) -> Float[Array, "*k o"]:
    """Of a convolution [h w i o] too, whose A is a convolution to r channels [h w i r], and B one of 1x1."""
    update = jnp.tensordot(a, b, axes=1, precision="highest", preferred_element_type=jnp.float32)
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)) + scale * update


@contextlib.contextmanager
def adapted(params: Params, factors: Params, scale: float) -> Iterator[dict[str, Params]]:
    """Variables that, within the context, make a network with factors compute x W + scale (x A) B (equation 3).

    The same as merging, but the gradient of W is never made: it is as large as W, and devices would average it instead of those
    of A and B. Dense layers only, which is all that `TARGETS` means.
    """
    if not factors:
        yield {"params": params}
        return

    def add(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y, layer = call(*args, **kwargs), context.module
        if not isinstance(layer, nn.Dense) or not layer.has_variable("lora", "kernel"):
            return y
        of_kernel: Any = layer.get_variable("lora", "kernel")
        x, a, b = nn.dtypes.promote_dtype(*args, of_kernel["a"], scale * of_kernel["b"], dtype=layer.dtype)
        return y + (x @ a) @ b

    with nn.intercept_methods(add):
        yield {"params": params, "lora": factors}
