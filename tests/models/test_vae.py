"""Autoencoders: Stable Diffusion's parameter count, shapes, and what must hold of encode and decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.vae import AutoencoderKL, ConvVAE
from tests.models.tiny_networks import jit, random_parameters

TINY = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "latent_channels": 3}
X = jax.random.normal(jax.random.key(1), (2, 4, 6, 3))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def variables():
    return random_parameters(AutoencoderKL(**TINY), X, scale=0.2)


def test_stable_diffusions_autoencoder_has_exactly_83653863_parameters():
    network, x = AutoencoderKL(), jnp.zeros((1, 64, 32, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    assert count(shapes) == 83_653_863
    reconstruction, posterior = jax.eval_shape(network.apply, shapes, x)
    assert posterior.mean.shape == posterior.log_variance.shape == (1, 8, 4, 4) and network.downsampling == 8
    assert reconstruction.shape == x.shape
    without = AutoencoderKL(quant_conv=False)
    shapes = jax.eval_shape(without.init, jax.random.key(0), x)
    assert count(shapes) == 83_653_863 - (8 * 8 + 8) - (4 * 4 + 4)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_level_but_the_first_halves_the_image(levels):
    network = AutoencoderKL(**TINY | {"channel_multipliers": (1,) * levels})
    x = jnp.zeros((1, 16, 24, 3))
    factor = 2 ** (levels - 1)
    (reconstruction, posterior), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x)
    assert posterior.mean.shape == (1, 16 // factor, 24 // factor, 3) and network.downsampling == factor
    assert reconstruction.shape == x.shape


def test_indivisible_images_are_refused():
    with pytest.raises(ValueError, match="8x7 pixels.*2 levels.*multiples of 2"):
        jax.eval_shape(AutoencoderKL(**TINY).init, jax.random.key(0), jnp.zeros((1, 8, 7, 3)))
    with pytest.raises(ValueError, match="30x28 pixels.*2 levels.*multiples of 4"):
        jax.eval_shape(ConvVAE(image_shape=(30, 28, 1)).init, jax.random.key(0), jnp.zeros((1, 30, 28, 1)))


def test_calling_is_encoding_then_decoding(variables):
    """The mean without a key; with one a sample, whose image i hangs on key i only."""
    network = AutoencoderKL(**TINY)
    apply = jit(network.apply)
    posterior = jit(lambda v, x: network.apply(v, x, method="encode"))(variables, X)
    decode = jit(lambda v, z: network.apply(v, z, method="decode"))
    reconstruction, again = apply(variables, X)
    np.testing.assert_allclose(again.mean, posterior.mean, atol=1e-5)
    np.testing.assert_allclose(reconstruction, decode(variables, posterior.mean), atol=1e-4)
    keys = jax.random.split(jax.random.key(3), 2)
    drawn, _ = apply(variables, X, keys)
    np.testing.assert_allclose(drawn, decode(variables, posterior.sample(keys)), atol=1e-3)
    assert not np.allclose(drawn, reconstruction, atol=1e-2)
    swapped, _ = apply(variables, X[::-1], keys[::-1])
    np.testing.assert_allclose(swapped[::-1], drawn, atol=1e-3)


def test_bfloat16_computes_nearly_the_same_and_its_moments_are_float32(variables):
    full, _ = jit(AutoencoderKL(**TINY).apply)(variables, X)
    half, posterior = jit(AutoencoderKL(**TINY, dtype=jnp.bfloat16).apply)(variables, X)
    assert half.dtype == posterior.mean.dtype == posterior.log_variance.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((full - half) ** 2) / jnp.mean(full**2)))
    assert 1e-4 < error < 0.05, error


def test_gradient_reaches_every_parameter(variables):
    network = AutoencoderKL(**TINY)

    def loss(variables):
        reconstruction, posterior = network.apply(variables, X, jax.random.key(2))
        return jnp.sum(reconstruction * jnp.sin(X)) + posterior.kl_to_standard().sum()

    gradients = jax.tree_util.tree_leaves_with_path(jit(jax.grad(loss))(variables))
    assert all(bool(jnp.isfinite(leaf).all()) for _, leaf in gradients)
    untouched = [jax.tree_util.keystr(path) for path, leaf in gradients if float(jnp.abs(leaf).max()) < 1e-5]
    assert all("['key']['bias']" in path for path in untouched), untouched  # it moves all logits alike


def test_conv_vae_goes_from_an_image_to_a_vector_and_back():
    network = ConvVAE(latent_dim=5, channels=(4, 8), hidden=16, learned_std=True)
    x = jax.random.normal(jax.random.key(0), (3, 28, 28, 1))
    variables = random_parameters(network, x)
    assert variables["params"]["log_std"].shape == ()
    keys = jax.random.split(jax.random.key(1), 3)
    image, posterior = jit(network.apply)(variables, x, keys)
    assert posterior.mean.shape == (3, 5) and image.shape == x.shape and image.dtype == jnp.float32
    decode = jit(lambda v, z: network.apply(v, z, method="decode"))
    again = decode(variables, posterior.sample(keys))
    np.testing.assert_allclose(image, again, rtol=1e-4, atol=1e-4)
    mean, _ = jit(network.apply)(variables, x)
    np.testing.assert_allclose(mean, decode(variables, posterior.mean), rtol=1e-4, atol=1e-4)
    assert not np.allclose(mean, image, atol=1e-2)
    plain = jax.eval_shape(network.clone(learned_std=False).init, jax.random.key(0), x)["params"]
    assert "log_std" not in plain
    assert network.apply(variables, method=lambda module: module.log_std) == variables["params"]["log_std"]


def test_conv_vae_has_as_many_levels_as_it_is_given():
    for channels in [(4,), (4, 6, 8)]:
        network = ConvVAE((16, 8, 3), latent_dim=2, channels=channels, hidden=8)
        (image, posterior), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, 16, 8, 3)))
        assert image.shape == (1, 16, 8, 3) and posterior.mean.shape == (1, 2)
