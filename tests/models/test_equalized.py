"""Layers of equalised learning rate, pixelwise normalisation, minibatch standard deviation: variances and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.config import ShardingConfig
from jaxdiff.models.equalized import EqualizedConv, EqualizedDense, minibatch_stddev, pixelwise_norm
from jaxdiff.training.sharding import BATCH_AXES, make_mesh
from tests.models.tiny_networks import jit


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_the_variance_at_initialisation_is_the_gain_squared(gain):
    x = jax.random.normal(jax.random.key(0), (8, 12, 12, 48))
    for layer, example in (
        (EqualizedConv(96, 3, gain), x),
        (EqualizedConv(96, 1, gain), x),
        (EqualizedDense(96, gain), x[:, 0, 0]),
    ):
        variables = layer.init(jax.random.key(1), example)
        kernel = variables["params"]["kernel"]
        np.testing.assert_allclose(kernel.std(), 1.0, atol=0.02)  # the parameter is not scaled: Adam sees N(0, 1)
        out = layer.apply(variables, example)
        out = out[:, 1:-1, 1:-1] if out.ndim == 4 else out  # where no zeros were seen
        np.testing.assert_allclose(out.var(), gain**2, rtol=0.12)


def test_the_bias_is_not_scaled():
    for layer, x in (
        (EqualizedConv(2, gain=5.0), jnp.zeros((1, 4, 4, 3))),
        (EqualizedDense(2, gain=5.0), jnp.zeros((1, 3))),
    ):
        params = layer.init(jax.random.key(0), x)["params"] | {"bias": jnp.array([1.0, -2.0])}
        np.testing.assert_array_equal(layer.apply({"params": params}, x).reshape(-1, 2)[0], [1.0, -2.0])


def test_pixelwise_norm_has_unit_rms():
    x = 300 * jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        y = pixelwise_norm(x.astype(dtype))
        assert y.dtype == dtype
        np.testing.assert_allclose((y.astype(jnp.float32) ** 2).mean(-1), 1.0, rtol=tolerance)
    np.testing.assert_allclose(y.astype(jnp.float32) / y[..., :1], x / x[..., :1], rtol=0.03)
    np.testing.assert_array_equal(pixelwise_norm(jnp.zeros((1, 3))), 0)  # and no NaN


def by_loops(x, groups):
    """The root of a group's biased variance, averaged over pixels and channels; groups are lists of places in the batch."""
    values = np.zeros(len(x))
    for group in groups:
        values[group] = np.sqrt(x[group].var(0) + 1e-8).mean()
    return values


def test_minibatch_stddev_by_groups():
    x = np.random.default_rng(0).standard_normal((8, 2, 3, 5)).astype(np.float32)
    cases = (
        (4, 1, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 2, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (None, 1, [list(range(8))]),
        (4, 8, [[i] for i in range(8)]),
        (16, 1, [list(range(8))]),
    )
    for group_size, shards, groups in cases:
        y = np.asarray(minibatch_stddev(jnp.asarray(x), group_size, shards))
        np.testing.assert_array_equal(y[..., :5], x)
        expected = np.broadcast_to(by_loops(x, groups)[:, None, None], (8, 2, 3))
        np.testing.assert_allclose(y[..., 5], expected, rtol=1e-5)


def test_minibatch_stddev_of_equal_images_is_zero_but_for_epsilon():
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 4, 4, 3)), (4, 4, 4, 3))
    np.testing.assert_allclose(minibatch_stddev(x)[..., -1], math.sqrt(1e-8), rtol=1e-3)
    assert np.isfinite(jax.grad(lambda x: minibatch_stddev(x).sum())(x)).all()


def test_the_papers_other_batch_sizes():
    """14 images are groups of 2, 6 are groups of 3, 3 are one group."""
    x = np.random.default_rng(0).standard_normal((14, 1, 1, 2)).astype(np.float32)
    for number, groups in ((14, [[i, i + 7] for i in range(7)]), (6, [[0, 2, 4], [1, 3, 5]]), (3, [[0, 1, 2]])):
        y = minibatch_stddev(jnp.asarray(x[:number]))
        np.testing.assert_allclose(y[:, 0, 0, 2], by_loops(x[:number], groups), rtol=1e-5)
    with pytest.raises(ValueError, match="7 images .* groups of 2 to 4"):
        minibatch_stddev(jnp.zeros((14, 1, 1, 2)), shards=2)
    with pytest.raises(ValueError, match="14 cannot be split into 4"):
        minibatch_stddev(jnp.zeros((14, 1, 1, 2)), shards=4)


def test_minibatch_stddev_on_four_devices_needs_no_word_between_them():
    """The same groups give the same on 1 and on 4 devices; with a part for each device nothing is exchanged."""
    x = np.random.default_rng(0).standard_normal((16, 2, 2, 3)).astype(np.float32)
    mesh = make_mesh(ShardingConfig(), jax.devices()[:4])
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    programs = {
        shards: jit(lambda x, shards=shards: minibatch_stddev(x, 4, shards), out_shardings=sharding)
        for shards in (1, 4)
    }
    split = jax.device_put(x, sharding)
    for shards, program in programs.items():
        np.testing.assert_allclose(program(split), minibatch_stddev(jnp.asarray(x), 4, shards), rtol=1e-6)
    words = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    text = {shards: program.lower(split).compile().as_text() for shards, program in programs.items()}
    assert not any(word in text[4] for word in words)
    assert any(word in text[1] for word in words)
    pmapped = jax.pmap(minibatch_stddev, devices=jax.devices()[:4])(x.reshape(4, 4, 2, 2, 3))
    np.testing.assert_allclose(pmapped.reshape(16, 2, 2, 4), minibatch_stddev(jnp.asarray(x), 4, 4), rtol=1e-6)
