"""Low-rank adaptation: W + scale A B, nothing at first, and only where it is wanted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdiff.config import LORA_TARGETS
from jaxdiff.models.lora import TARGETS, adapted, init_factors, merge, target_kernels
from jaxdiff.models.unet import UNetBlock
from tests.tasks import small_checkpoint as small
from tests.tasks import tiny_checkpoint as tiny

ALL = tuple(TARGETS)


@pytest.fixture(scope="module")
def shapes():
    return tiny.networks(tiny.SD1).shapes()


def random(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def test_config_names_the_targets():
    assert LORA_TARGETS == ALL


def test_targets_are_the_transformers_matrices_and_no_others(shapes):
    found = {name: target_kernels(shapes, (name,)) for name in ALL}
    blocks = 1 + 2 + 1  # with a transformer: on the way down, on the way up, in the middle
    counts = {name: {part: len(kernels) for part, kernels in parts.items()} for name, parts in found.items()}
    assert counts == {
        "attention": {"unet": 8 * blocks},
        "feed_forward": {"unet": 2 * blocks},
        "projections": {"unet": 2 * blocks},
        "text_encoder": {"text_encoder": 4},
        "text_feed_forward": {"text_encoder": 2},
    }
    matrices = {path for path, leaf in flatten_dict(shapes["unet"], sep="/").items() if path.endswith("/kernel")}
    in_transformers = {path for path in matrices if "/transformer/" in path}
    assert set().union(*(parts.get("unet", {}) for parts in found.values())) == in_transformers < matrices


def test_at_first_nothing_is_changed_and_what_is_random_is_not_degenerate(shapes):
    factors = init_factors(jax.random.key(0), shapes, ALL, 3)
    params = random({part: shapes[part] for part in ("unet", "text_encoder")})
    for part, tree in factors.items():
        merged = merge(params[part], tree, 2.0)
        jax.tree.map(np.testing.assert_array_equal, merged, params[part])
        leaves = flatten_dict(tree, sep="/")
        assert all(np.any(leaf != 0) == path.endswith("/a") for path, leaf in leaves.items())
        draws = [np.asarray(leaf).tobytes() for path, leaf in leaves.items() if path.endswith("/a")]
        assert len(set(draws)) == len(draws)  # a key of its own for each


def test_merging_is_w_plus_scale_a_b(shapes):
    factors = random(init_factors(jax.random.key(0), shapes, ("attention",), 3)["unet"], 1)
    params = random(shapes["unet"])
    merged, before = flatten_dict(merge(params, factors, 0.7), sep="/"), flatten_dict(params, sep="/")
    leaves, changed = flatten_dict(factors, sep="/"), 0
    for path, kernel in before.items():
        if f"{path}/a" in leaves:
            a, b = (np.asarray(leaves[f"{path}/{name}"], np.float64) for name in "ab")
            kernel, changed = kernel + 0.7 * a @ b, changed + 1
            np.testing.assert_allclose(merged[path], kernel, atol=1e-5)
        else:
            assert merged[path] is kernel
    assert changed == len(leaves) // 2 > 0


def test_a_convolution_adapted_is_a_convolution_to_r_channels_and_one_of_a_pixel():
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.standard_normal(s).astype(np.float32) for s in ((3, 3, 4, 5), (3, 3, 4, 2), (2, 5), (1, 6, 6, 4)))

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, precision="highest")

    together = convolve(x, merge({"kernel": w}, {"kernel": {"a": a, "b": b}}, 0.5)["kernel"])
    apart = convolve(x, w) + 0.5 * convolve(convolve(x, a), b[None, None])
    np.testing.assert_allclose(together, apart, atol=1e-4)


def test_half_a_kernel_is_merged_in_float32():
    """An update too small for bfloat16 must not be lost."""
    w, a, b = jnp.ones((4, 4), jnp.bfloat16), jnp.full((4, 1), 1e-4), jnp.ones((1, 4))
    merged = merge({"kernel": w}, {"kernel": {"a": a, "b": b}}, 1.0)["kernel"]
    assert merged.dtype == jnp.float32
    np.testing.assert_allclose(merged, 1.0001, atol=1e-7)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_network_adapted_is_the_merged_one_forwards_and_backwards(shapes, part):
    """Every target; of the U-Net a block, recomputed."""
    networks, params = tiny.networks(tiny.SD1), tiny.params(tiny.SD1)[part]
    network, inputs = networks.text_encoder, (np.arange(32, dtype=np.int32).reshape(2, 16),)
    factors = jax.tree.map(lambda leaf: 0.3 * leaf, random(init_factors(jax.random.key(0), shapes, ALL, 2)[part], 1))
    if part == "unet":
        params, factors = params["down_0_0"], factors["down_0_0"]
        block = nn.remat(UNetBlock, static_argnums=(4,))
        network = block(16, True, 8, 0.0, 1e-5, 8, False, None, jnp.float32, jnp.float32)
        sizes = (2, 8, 8, 16), (2, 64), (2, small.TOKENS, tiny.CONTEXT)
        x, embedding, context = random([np.zeros(size) for size in sizes])
        inputs = (x, embedding, context, False)

    def merged(factors):
        return network.apply({"params": merge(params, factors, 0.7)}, *inputs)

    def apart(factors):
        with adapted(params, factors, 0.7) as variables:
            return network.apply(variables, *inputs)

    def both(function):
        value, pull_back = jax.vjp(function, factors)
        return value, pull_back(jnp.cos(jnp.arange(value.size, dtype=value.dtype).reshape(value.shape)))[0]

    expected, (value, gradient) = small.jit(lambda: both(merged))(), small.jit(lambda: both(apart))()
    np.testing.assert_allclose(value, expected[0], rtol=1e-4, atol=1e-4)
    plain = small.jit(lambda: network.apply({"params": params}, *inputs))()
    assert np.abs(plain - value).max() > 0.1
    for (path, ours), theirs in zip(flatten_dict(gradient).items(), jax.tree.leaves(expected[1]), strict=True):
        assert np.any(theirs != 0), path
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max(), err_msg=path)


def test_outside_of_its_context_nothing_is_adapted(shapes):
    network, tokens = tiny.networks(tiny.SD1).text_encoder, np.arange(16, dtype=np.int32)[None]
    params = tiny.params(tiny.SD1)["text_encoder"]
    factors = random(init_factors(jax.random.key(0), shapes, ALL, 2)["text_encoder"])
    with adapted(params, {}, 1.0) as variables:
        assert variables == {"params": params}
    with adapted(params, factors, 1.0) as variables:
        pass
    np.testing.assert_array_equal(network.apply(variables, tokens), network.apply({"params": params}, tokens))
