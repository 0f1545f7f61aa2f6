"""PatchGAN: the size of what a logit sees, and that it sees its own image only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.discriminator import PatchDiscriminator
from tests.models.tiny_networks import jit, random_parameters


def test_logits_are_a_map_of_patches():
    """30x30 of 256 pixels, as of taming-transformers, whose convolutions before a norm have no bias."""
    network = PatchDiscriminator()
    logits, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    assert logits.shape == (1, 30, 30, 1) and logits.dtype == jnp.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 2_765_633 + 128 + 256 + 512


def test_channels_double_up_to_eight_times():
    network = PatchDiscriminator(channels=2, num_layers=5, norm="none")
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 128, 128, 3)))["params"]
    assert [params[f"conv_{i}"]["bias"].shape for i in range(6)] == [(2,), (4,), (8,), (16,), (16,), (16,)]


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(num_layers, patch):
    """Without a norm, whose statistics are the whole image's; the gradient of one logit is nowhere else."""
    network = PatchDiscriminator(channels=2, num_layers=num_layers, norm="none")
    x = jax.random.normal(jax.random.key(0), (1, 96, 96, 1))
    variables = random_parameters(network, x)

    def logit(x):
        logits = network.apply(variables, x)
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    rows, columns = np.nonzero(np.asarray(jit(jax.grad(logit))(x))[0, :, :, 0])
    assert np.ptp(rows) + 1 == patch and np.ptp(columns) + 1 == patch


@pytest.mark.parametrize("norm", ["group", "none"])
def test_a_verdict_does_not_depend_on_the_others_in_the_batch(norm):
    network = PatchDiscriminator(channels=8, num_layers=2, norm=norm)
    x = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    variables = random_parameters(network, x)
    together, alone = jit(network.apply)(variables, x), jit(network.apply)(variables, x[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-4)
    names = set(variables["params"])
    assert ("norm_1" in names) == (norm == "group") and "norm_0" not in names


def test_bfloat16_is_finite():
    network = PatchDiscriminator(channels=8, num_layers=2, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    logits = jit(network.apply)(random_parameters(network, x), x)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_refusals():
    with pytest.raises(ValueError, match="at least 24 pixels"):
        jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 23, 64, 3)))
    with pytest.raises(ValueError, match='must be "group" or "none"'):
        jax.eval_shape(PatchDiscriminator(norm="batch").init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
