"""Winograd's convolution against the plain one, and where it is taken: on a CPU, in float32, where nothing is differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.layers import conv3x3
from jaxdiff.models.winograd import LAYOUT, convolve3x3, winograd
from jaxdiff.training.watching import flops_of


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)


def inputs(height=16, width=16, channels=32, features=32, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, features)) / np.sqrt(9 * channels)
    return x.astype(dtype), kernel.astype(dtype)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (16, 8)])
def test_whole_numbers_come_out_exactly(height, width):
    x = jax.random.randint(jax.random.key(0), (2, height, width, 3), -8, 9).astype(jnp.float32)
    kernel = 4 * jax.random.randint(jax.random.key(1), (3, 3, 3, 5), -8, 9).astype(jnp.float32)
    np.testing.assert_array_equal(winograd(x, kernel), plain(x, kernel))


def test_errors_are_float32s():
    x, kernel = inputs(channels=256, features=64)
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(plain(x, kernel), np.float64)
    assert np.abs(winograd(x, kernel) - exact).max() < 1e-5


def products(function, *arguments):
    """Of matrices, in the program for a CPU."""
    return jax.jit(function).lower(*arguments).as_text().count("dot_general")


def test_a_cpu_takes_it_where_nothing_is_differentiated():
    x, kernel = inputs()
    assert products(convolve3x3, x, kernel) == 16
    np.testing.assert_allclose(convolve3x3(x, kernel), plain(x, kernel), atol=1e-5)

    def gradient(convolve):
        return jax.grad(lambda x, kernel: (convolve(x, kernel) ** 2).sum(), (0, 1))

    assert products(gradient(convolve3x3), x, kernel) == 0
    for ours, theirs in zip(gradient(convolve3x3)(x, kernel), gradient(plain)(x, kernel), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [{"height": 15}, {"width": 15}, {"channels": 16}, {"features": 4}, {"height": 8}, {"dtype": jnp.bfloat16}],
    ids=str,
)
def test_elsewhere_it_is_the_plain_convolution(changes):
    x, kernel = inputs(**changes)
    assert products(convolve3x3, x, kernel) == 0
    np.testing.assert_array_equal(convolve3x3(x, kernel), plain(x, kernel))


def test_other_platforms_take_the_plain_convolution_and_operations_are_counted_of_it():
    x, kernel = inputs()
    for platform in ("cuda", "tpu"):
        text = jax.jit(convolve3x3).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert "dot_general" not in text and "convolution" in text
    assert flops_of(convolve3x3, x, kernel) == flops_of(plain, x, kernel)


def test_layers_of_stride_1_have_it():
    x, _ = inputs()
    for options, expected in (({}, 16), ({"stride": 2}, 0), ({"doubled": True}, 0), ({"padding": ((0, 1), (0, 1))}, 0)):
        layer = conv3x3(32, jnp.float32, jnp.float32, "conv", **options)
        variables = layer.init(jax.random.key(0), x)
        assert products(layer.apply, variables, x) == expected, options


def test_kernels_are_made_ready_one_after_another():
    x, kernel = inputs(channels=128, features=128)
    kernels = jnp.stack([kernel] * 12)

    def network(x, kernels):
        for one in kernels:
            x = convolve3x3(x, one)
        return x

    plan = jax.jit(network).lower(x, list(kernels)).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 6 * 16 * 128 * 128 * 4  # of twelve
    broken = x.at[0, 0, 0, 0].set(jnp.nan)
    assert jnp.isfinite(convolve3x3(broken, kernel)[1]).all()
