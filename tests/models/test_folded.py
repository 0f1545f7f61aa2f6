"""Folded convolutions do to 2x2 patches in the channels what the plain ones do to the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.losses import gradient_penalty
from jaxdiff.models.equalized import EqualizedConv, pixelwise_norm
from jaxdiff.models.folded import channel_means, fold_doubling_kernel, fold_kernel, patch_mean
from jaxdiff.models.layers import convolve_doubled, depth_to_space, space_to_depth
from jaxdiff.models.progressive_gan import Discriminator, Generator, fade_images, halve_pixels
from tests.models.tiny_networks import random_parameters

LAYOUT = ("NHWC", "HWIO", "NHWC")
X = jax.random.normal(jax.random.key(0), (2, 6, 8, 3))


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def whole_numbers(key, *shape):
    """Small ones, of which float32 makes sums without rounding."""
    return jax.random.randint(jax.random.key(key), shape, -8, 9).astype(jnp.float32)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_folded_kernel_is_the_kernel(size):
    x, kernel = whole_numbers(0, 2, 6, 8, 3), whole_numbers(1, size, size, 3, 2)
    folded = convolve(space_to_depth(x, 2), fold_kernel(kernel))
    np.testing.assert_array_equal(depth_to_space(folded, 2), convolve(x, kernel))


def test_a_folded_doubling_kernel_is_the_doubling_convolution():
    x, kernel = whole_numbers(0, 2, 6, 8, 3), whole_numbers(1, 3, 3, 3, 2)
    folded = convolve(x, fold_doubling_kernel(kernel))
    np.testing.assert_array_equal(depth_to_space(folded, 2), convolve_doubled(x, kernel))


def test_means_of_patches_and_of_a_pixels_channels():
    folded = space_to_depth(X, 2)
    np.testing.assert_allclose(patch_mean(folded), halve_pixels(X), atol=1e-6)
    means = jnp.broadcast_to(X.mean(-1, keepdims=True), X.shape)
    np.testing.assert_allclose(depth_to_space(channel_means(folded), 2), means, atol=1e-6)
    np.testing.assert_allclose(depth_to_space(pixelwise_norm(folded, True), 2), pixelwise_norm(X), atol=1e-6)


@pytest.mark.parametrize("doubled", [False, True])
def test_a_layer_has_the_same_parameters_folded_or_not(doubled):
    plain, folded = (EqualizedConv(5, doubled=doubled, folded=f) for f in (False, True))
    variables = random_parameters(plain, X)
    shown = X if doubled else space_to_depth(X, 2)
    assert jax.tree.map(jnp.shape, folded.init(jax.random.key(0), shown)) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_allclose(
        depth_to_space(folded.apply(variables, shown), 2), plain.apply(variables, X), rtol=1e-5, atol=1e-5
    )


SMALL = {"resolution": 16, "channel_base": 32, "channel_max": 12}  # 12, 8 and 4 channels at 4, 8 and 16 pixels


@pytest.mark.parametrize(("stage", "fold_below", "unfold"), [(1, 9, False), (2, 5, True), (2, 9, False)])
def test_networks_make_judge_and_learn_the_same_folded_or_not(stage, fold_below, unfold):
    z = jax.random.normal(jax.random.key(1), (4, 6))
    reals = jax.random.normal(jax.random.key(2), (4, 8 * stage, 8 * stage, 3))
    whole = jnp.zeros((4, 16, 16, 3))
    params = [
        random_parameters(network, inputs, scale=1.0)
        for network, inputs in ((Generator(latent_dim=6, **SMALL), z), (Discriminator(**SMALL), whole))
    ]

    def losses(fold_below, unfold=True):
        maker = Generator(latent_dim=6, fold_below=fold_below, **SMALL)
        judge = Discriminator(fold_below=fold_below, **SMALL)

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            def critic(x):
                return judge.apply(params[1], x, stage=stage, alpha=0.3)[0]

            fakes = maker.apply(params[0], z, stage=stage, alpha=0.3, unfold=unfold)
            patch = fakes.shape[-1] // 3
            x = fade_images(space_to_depth(reals, 2) if patch > 1 else reals, 0.3, patch > 1)
            return (critic(fakes) + gradient_penalty(critic, x)).mean() + (fakes**2).mean()

        return loss(params)

    for ours, theirs in zip(jax.tree.leaves(losses(fold_below, unfold)), jax.tree.leaves(losses(0)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(jnp.abs(theirs).max()))
