"""Bricks against closed forms in NumPy float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.embeddings import sinusoidal_embedding
from jaxdiff.models.layers import (
    BOTTOM_RIGHT,
    SYMMETRIC,
    Downsample,
    Dropout,
    ResidualBlock,
    Upsample,
    convolve_doubled,
    depth_to_space,
    group_norm,
    num_groups,
    repeat_pixels,
    space_to_depth,
)
from tests.models.tiny_networks import jit, random_parameters


def test_num_groups_is_32_or_fewer_and_divides():
    assert [num_groups(c) for c in (128, 256, 320, 64, 96, 24, 10, 4, 1)] == [32, 32, 32, 16, 24, 6, 2, 1, 1]


def test_group_norm_matches_numpy():
    x = 5.0 + 2.0 * jax.random.normal(jax.random.key(0), (2, 3, 5, 24))
    norm = group_norm(24, 1e-2, jnp.float32, jnp.float32, "norm")  # a large epsilon, so that it shows
    variables = random_parameters(norm, x)
    scale, bias = (np.asarray(variables["params"][name], np.float64) for name in ("scale", "bias"))

    groups = np.asarray(x, np.float64).reshape(2, 15, 6, 4)
    mean = groups.mean(axis=(1, 3), keepdims=True)
    variance = groups.var(axis=(1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-2)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(jit(norm.apply)(variables, x), expected, atol=1e-5)


def test_group_norm_statistics_are_float32_in_bfloat16():
    """1000 + noise: bfloat16 sums of squares would lose the variance altogether."""
    x = (256.0 + jax.random.randint(jax.random.key(0), (1, 16, 16, 8), 0, 4)).astype(jnp.bfloat16)
    norm = group_norm(8, 1e-6, jnp.bfloat16, jnp.float32, "norm")
    y = norm.apply(norm.init(jax.random.key(1), x), x)
    assert y.dtype == jnp.bfloat16
    groups = np.asarray(x, np.float64).reshape(256, 2, 4)
    mean, deviation = groups.mean(axis=(0, 2), keepdims=True), groups.std(axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), ((groups - mean) / deviation).reshape(x.shape), atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_is_flax_s_own_number_for_number(dtype):
    """So that a run goes on as it was. Without training nothing is drawn, and no key is needed."""
    x, rngs = jax.random.normal(jax.random.key(0), (4, 8, 8, 16), dtype), {"dropout": jax.random.key(1)}

    def gradient(module, **how):
        return jit(
            jax.value_and_grad(lambda x: (module.apply({}, x, rngs=rngs, **how) ** 2).astype(jnp.float32).sum())
        )(x)

    ours, theirs = gradient(Dropout(0.3), train=True), gradient(nn.Dropout(0.3), deterministic=False)
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert 0.25 < (ours[1] == 0).mean() < 0.35
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)


def convolve(x, kernel, padding, stride=1):
    """3x3 convolution, term by term."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    rows, columns = ((size - 3) // stride + 1 for size in x.shape[1:3])
    return sum(
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
        @ np.asarray(kernel[i, j], np.float64)
        for i in range(3)
        for j in range(3)
    )


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), BOTTOM_RIGHT])
def test_downsample_is_a_strided_convolution_with_stated_padding(padding):
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 3))
    layer = Downsample(padding=padding)
    variables = random_parameters(layer, x)
    conv = variables["params"]["conv"]
    expected = convolve(x, conv["kernel"], padding, stride=2) + np.asarray(conv["bias"])
    assert expected.shape == (1, 3, 2, 3)
    np.testing.assert_allclose(jit(layer.apply)(variables, x), expected, atol=1e-5)


def test_upsample_repeats_pixels_then_convolves():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    repeated = np.asarray(x).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(repeat_pixels(x), repeated)
    assert "gather" not in jax.jit(repeat_pixels).lower(x).as_text()

    layer = Upsample()
    variables = random_parameters(layer, x)
    conv = variables["params"]["conv"]
    expected = convolve(repeated, conv["kernel"], ((1, 1), (1, 1))) + np.asarray(conv["bias"])
    np.testing.assert_allclose(jit(layer.apply)(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 1, 3, 2)])
def test_convolving_a_doubled_image_without_making_it(shape):
    """Values and gradients are those of the long way, in float64, with fewer operations."""
    with jax.enable_x64(True):
        x, kernel, pull = (
            jax.random.normal(key, size, jnp.float64)
            for key, size in zip(
                jax.random.split(jax.random.key(0), 3),
                (shape, (3, 3, shape[-1], 5), (shape[0], 2 * shape[1], 2 * shape[2], 5)),
                strict=True,
            )
        )

        def long_way(x, kernel):
            return jax.lax.conv_general_dilated(
                repeat_pixels(x), kernel, (1, 1), SYMMETRIC, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        made, back = jax.vjp(convolve_doubled, x, kernel)
        expected, back_long = jax.vjp(long_way, x, kernel)
        np.testing.assert_allclose(made, expected, atol=1e-13)
        for gradient, wanted in zip(back(pull), back_long(pull), strict=True):
            np.testing.assert_allclose(gradient, wanted, atol=1e-12)
        short, long = (jax.jit(f).lower(x, kernel).cost_analysis()["flops"] for f in (convolve_doubled, long_way))
    if shape[1] > 1:
        assert short < 0.6 * long  # 4 of 9, but for the borders


def test_patches_fold_and_unfold():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    folded = space_to_depth(x, 2)
    assert folded.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(folded[1, 2, 1].reshape(2, 2, 3), x[1, 4:6, 2:4])
    np.testing.assert_array_equal(depth_to_space(folded, 2), x)


def test_residual_block_matches_its_formula():
    def swish(a):
        return a / (1 + np.exp(-a))

    def norm(a, p):
        groups = a.reshape(a.shape[0], -1, num_groups(a.shape[-1]), a.shape[-1] // num_groups(a.shape[-1]))
        centred = groups - groups.mean(axis=(1, 3), keepdims=True)
        return (centred / np.sqrt(groups.var(axis=(1, 3), keepdims=True) + 1e-6)).reshape(a.shape) * p["scale"] + p[
            "bias"
        ]

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    embedding = jax.random.normal(jax.random.key(1), (2, 5))
    block = ResidualBlock(12)
    variables = random_parameters(block, x, embedding)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    symmetric = ((1, 1), (1, 1))
    h = convolve(swish(norm(np.asarray(x, np.float64), p["norm1"])), p["conv1"]["kernel"], symmetric)
    told = swish(np.asarray(embedding, np.float64)) @ p["embedding_projection"]["kernel"]
    h += p["conv1"]["bias"] + (told + p["embedding_projection"]["bias"])[:, None, None]
    h = convolve(swish(norm(h, p["norm2"])), p["conv2"]["kernel"], symmetric) + p["conv2"]["bias"]
    expected = h + np.asarray(x, np.float64) @ p["shortcut"]["kernel"] + p["shortcut"]["bias"]
    np.testing.assert_allclose(jit(block.apply)(variables, x, embedding), expected, atol=3e-5)


def test_scale_and_shift_are_those_of_the_norm():
    """An embedding that always answers (s, b) makes the block that has norm2 with scale * (1 + s) and bias * (1 + s) + b."""
    block, plain = ResidualBlock(8, scale_shift=True), ResidualBlock(8)
    x, embedding = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.ones((2, 3))
    params = random_parameters(block, x, embedding)["params"]
    s, b = jnp.split(params["embedding_projection"]["bias"], 2)
    params["embedding_projection"]["kernel"] *= 0
    scale, bias = params["norm2"]["scale"], params["norm2"]["bias"]
    bare = {name: leaf for name, leaf in params.items() if name != "embedding_projection"}
    bare["norm2"] = {"scale": scale * (1 + s), "bias": bias * (1 + s) + b}
    expected = jit(plain.apply)({"params": bare}, x)
    np.testing.assert_allclose(jit(block.apply)({"params": params}, x, embedding), expected, atol=1e-5)


def test_residual_block_starts_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    y, _ = ResidualBlock(8).init_with_output(jax.random.key(1), x)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(("dim", "shift", "cosine_first"), [(8, 1.0, False), (8, 0.0, True), (7, 1.0, False)])
def test_sinusoidal_embedding_matches_formula(dim, shift, cosine_first):
    t = np.array([0.0, 0.3, 17.0, 999.0])
    half = dim // 2
    angles = t[:, None] * np.exp(-np.log(10_000.0) * np.arange(half) / (half - shift))
    parts = [np.sin(angles), np.cos(angles)]
    expected = np.concatenate(parts[::-1] if cosine_first else parts, axis=1)
    embedding = sinusoidal_embedding(
        jnp.asarray(t),
        dim,
        frequency_shift=shift,
        cosine_first=cosine_first,
    )
    assert embedding.shape == (4, dim) and embedding.dtype == jnp.float32
    np.testing.assert_allclose(embedding[:, : 2 * half], expected, atol=2e-4)
    np.testing.assert_array_equal(embedding[:, 2 * half :], 0.0)
