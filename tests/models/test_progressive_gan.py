"""The progressive GAN's networks: the paper's numbers of parameters, and what growing and fading must leave as it was."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.layers import repeat_pixels
from jaxdiff.models.progressive_gan import (
    Discriminator,
    Generator,
    active_part,
    channels_at,
    fade,
    fade_images,
    halve_pixels,
    stage_of,
)
from tests.models.tiny_networks import jit, random_parameters

SMALL = {"resolution": 16, "channel_base": 32, "channel_max": 12}
Z = jax.random.normal(jax.random.key(0), (4, 6))
X = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
GENERATOR, DISCRIMINATOR = Generator(latent_dim=6, **SMALL), Discriminator(**SMALL)


@functools.cache
def parameters():
    return random_parameters(GENERATOR, Z, scale=1.0), random_parameters(DISCRIMINATOR, X, scale=1.0, seed=1)


def generate(params, stage, alpha, z=Z):
    return GENERATOR.apply(params, z, stage=stage, alpha=alpha)


def judge(params, x, stage, alpha):
    return DISCRIMINATOR.apply(params, x, stage=stage, alpha=alpha)[0]


def reals(stage):
    x = X
    for _ in range(2 - stage):
        x = halve_pixels(x)
    return x


def count(network, *inputs):
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_the_papers_numbers_of_parameters():
    assert count(Generator(), jnp.zeros((1, 512))) == 23_079_115
    assert count(Discriminator(), jnp.zeros((1, 1024, 1024, 3))) == 23_087_249
    cifar = {"resolution": 32, "channel_base": 4096, "channel_max": 128}
    assert count(Generator(latent_dim=128, **cifar), jnp.zeros((1, 128))) == 1_296_908
    assert count(Discriminator(**cifar), jnp.zeros((1, 32, 32, 3))) == 1_298_689


def test_the_papers_numbers_of_channels():
    widths = [channels_at(2**i, 8192, 512) for i in range(2, 11)]
    assert widths == [512, 512, 512, 512, 256, 128, 64, 32, 16]


@pytest.mark.parametrize("stage", [1, 2])
def test_alpha_0_is_exactly_the_stage_before_and_alpha_1_exactly_the_new_one(stage):
    g, d = parameters()
    x, old_image = reals(stage), generate(g, stage - 1, 1.0)
    np.testing.assert_array_equal(generate(g, stage, 0.0), repeat_pixels(old_image))
    np.testing.assert_array_equal(judge(d, x, stage, 0.0), judge(d, halve_pixels(x), stage - 1, 1.0))
    # The new stage is what is left when nothing of the old one is heard any more: other colours there change nothing.
    name = f"rgb_{2 ** (stage + 1)}"
    other_g = {"params": {**g["params"], f"to_{name}": jax.tree.map(lambda p: p + 1, g["params"][f"to_{name}"])}}
    other_d = {"params": {**d["params"], f"from_{name}": jax.tree.map(lambda p: p + 1, d["params"][f"from_{name}"])}}
    np.testing.assert_array_equal(generate(g, stage, 1.0), generate(other_g, stage, 1.0))
    np.testing.assert_array_equal(judge(d, x, stage, 1.0), judge(other_d, x, stage, 1.0))
    assert (generate(g, stage, 0.5) != generate(other_g, stage, 0.5)).all()
    assert (judge(d, x, stage, 0.5) != judge(other_d, x, stage, 0.5)).all()
    # And in between images, on the way from one to the other, are the weighted mean of both.
    between = 0.75 * repeat_pixels(old_image) + 0.25 * generate(g, stage, 1.0)
    np.testing.assert_allclose(generate(g, stage, 0.25), between, atol=1e-5)


def test_the_same_holds_for_compiled_programs_and_alpha_is_traced():
    g, d = parameters()
    generator, discriminator = jit(generate, static_argnums=1), jit(judge, static_argnums=2)
    for alpha in (0.0, 1.0, 0.3):
        image, score = generator(g, 2, alpha), discriminator(d, X, 2, alpha)
        np.testing.assert_allclose(image, generate(g, 2, alpha), atol=1e-4)
        np.testing.assert_allclose(score, judge(d, X, 2, alpha), rtol=1e-4, atol=1e-4)
        if alpha == 0:
            np.testing.assert_array_equal(image, repeat_pixels(generator(g, 1, 1.0)))
            np.testing.assert_array_equal(score, discriminator(d, halve_pixels(X), 1, 1.0))
    assert generator._cache_size() == discriminator._cache_size() == 2  # a program a stage


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_touches_its_active_part_and_all_of_it(stage):
    g, d = parameters()
    functions = (
        lambda p: (generate(p, stage, 0.5) ** 2).sum(),
        lambda p: (judge(p, reals(stage), stage, 0.5) ** 2).sum(),
    )
    for params, function in zip((g["params"], d["params"]), functions, strict=True):
        part = active_part(params, stage)
        value, gradient = jit(jax.value_and_grad(lambda p, f=function: f({"params": p})))(params)
        np.testing.assert_allclose(value, jit(function)({"params": part}), rtol=1e-5)  # the rest is not even looked at
        for name, leaves in gradient.items():
            touched = {bool((leaf != 0).any()) for leaf in jax.tree.leaves(leaves)}
            assert touched == {name in part}, name


def test_latents_count_by_their_direction_and_images_by_themselves():
    g = parameters()[0]
    np.testing.assert_allclose(generate(g, 1, 0.5, 3 * Z), generate(g, 1, 0.5), atol=1e-4)
    np.testing.assert_allclose(generate(g, 1, 0.5, Z[2:3]), generate(g, 1, 0.5)[2:3], atol=1e-5)
    assert np.abs(generate(g, 1, 0.5)).max() > 1  # no tanh


def test_the_discriminator_sees_the_batch():
    d = parameters()[1]
    together, alone = judge(d, X, 2, 1.0), judge(d, jnp.repeat(X[:1], 4, axis=0), 2, 1.0)
    assert abs(together[0] - alone[0]) > 1e-3
    np.testing.assert_array_equal(alone[1:], alone[:-1])


def test_class_conditioning():
    generator = Generator(latent_dim=6, num_classes=3, **SMALL)
    discriminator = Discriminator(num_classes=3, **SMALL)
    labels = jnp.array([0, 1, 2, 0])
    g, d = random_parameters(generator, Z, labels, scale=1.0), random_parameters(discriminator, X, scale=1.0)
    assert g["params"]["block_4"]["dense"]["kernel"].shape[0] == 6 + 3
    same = jnp.broadcast_to(Z[:1], Z.shape)
    images = generator.apply(g, same, labels, stage=1)
    np.testing.assert_allclose(images[0], images[3], atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 1e-2
    scores, logits = discriminator.apply(d, X)
    assert scores.shape == (4,) and logits.shape == (4, 3)
    with pytest.raises(ValueError, match="with 3 classes, labels are needed"):
        generator.apply(g, Z)
    with pytest.raises(ValueError, match="with 0 classes, labels are not needed"):
        GENERATOR.apply(parameters()[0], Z, labels)
    assert DISCRIMINATOR.apply(parameters()[1], X)[1] is None


def test_half_precision_computes_alike_and_ends_in_float32():
    g, d = parameters()
    half = {"dtype": jnp.bfloat16, **SMALL}
    image = jit(lambda: Generator(latent_dim=6, **half).apply(g, Z, stage=2, alpha=0.5))()
    score, _ = jit(lambda: Discriminator(**half).apply(d, X, stage=2, alpha=0.5))()
    assert image.dtype == score.dtype == jnp.float32
    np.testing.assert_allclose(image, generate(g, 2, 0.5), atol=0.05 * np.abs(image).max())
    np.testing.assert_allclose(score, judge(d, X, 2, 0.5), atol=0.05 * np.abs(score).max())


def test_reals_fade_as_the_generator_does():
    np.testing.assert_array_equal(fade_images(X, 1.0), X)
    coarse = fade_images(X, 0.0)
    np.testing.assert_array_equal(coarse[:, ::2, ::2], coarse[:, 1::2, 1::2])
    for alpha in (0.0, 0.3):
        np.testing.assert_allclose(halve_pixels(fade_images(X, alpha)), halve_pixels(X), atol=1e-6)
    block = X[0, :2, :2, 0]
    np.testing.assert_allclose(fade_images(X, 0.3)[0, 0, 1, 0], 0.7 * block.mean() + 0.3 * block[0, 1], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_side_that_is_not_heard_is_not_looked_at(alpha):
    """Not even where it overflowed: values and gradients are finite, and those of the other side."""
    heard, unheard = jnp.array([1.0, -2.0, 3.0]), jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    old, new = (heard, unheard) if alpha == 0 else (unheard, heard)
    value, gradients = jit(jax.value_and_grad(lambda *x: (fade(*x, alpha) ** 2).sum(), (0, 1)))(old, new)
    assert value == 14
    np.testing.assert_array_equal(gradients[int(alpha)], 2 * heard)
    np.testing.assert_array_equal(gradients[1 - int(alpha)], 0)
    assert fade(old, new.astype(jnp.bfloat16), alpha).dtype == jnp.bfloat16


def test_refusals():
    g, d = parameters()
    with pytest.raises(ValueError, match=r"stage must be 0 to 2 \(16x16 pixels\), not 3"):
        generate(g, 3, 1.0)
    with pytest.raises(ValueError, match="stage 1 judges images of 8x8 pixels, not 16x16"):
        judge(d, X, 1, 1.0)
    for resolution in (2, 12, 24):
        with pytest.raises(ValueError, match=f"4, 8, 16, ..., not {resolution}"):
            stage_of(resolution)
