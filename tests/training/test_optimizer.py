"""Muon against the singular value decomposition; what it leaves to Nadam; the same on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdiff.config import OptimizerConfig
from jaxdiff.training.optimizer import MUON_RMS, make_optimizer

CONFIG = OptimizerConfig(name="muon", learning_rate=0.1, clip_norm=0.0)


def tree(seed):
    """Parameters, or gradients, of a convolution, a dense layer and an embedding."""
    shapes = {
        "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
        "dense": {"kernel": (32, 16), "bias": (16,)},
        "token": {"embedding": (10, 16)},
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


def updates(config, gradients, params):
    optimizer = make_optimizer(config, 100)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_a_kernels_update_is_its_gradient_with_singular_values_of_about_one(layer):
    gradients = tree(0)
    update = updates(CONFIG, gradients, tree(1))[layer]["kernel"]
    gradient = gradients[layer]["kernel"].reshape(-1, update.shape[-1])
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    assert values.max() > 1.8 * values.min()
    inner = left.T @ -np.asarray(update).reshape(gradient.shape) @ right.T
    inner /= CONFIG.learning_rate * MUON_RMS * np.sqrt(max(gradient.shape))
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-3)  # its singular vectors
    assert np.diag(inner).min() > 0.65 and np.diag(inner).max() < 1.25  # five steps of Newton and Schulz come no nearer
    rms = np.sqrt(np.mean(np.square(update)))
    assert rms == pytest.approx(CONFIG.learning_rate * MUON_RMS, rel=0.2)


def test_what_is_no_kernel_is_adams_with_nesterovs_momentum():
    gradients, params = tree(0), tree(1)
    found = updates(CONFIG, gradients, params)
    adam = optax.nadam(CONFIG.learning_rate, CONFIG.beta1, CONFIG.beta2, CONFIG.epsilon)
    expected = adam.update(gradients, adam.init(params), params)[0]
    for layer, name in (("conv", "bias"), ("dense", "bias"), ("token", "embedding")):
        np.testing.assert_allclose(found[layer][name], expected[layer][name], rtol=1e-5)
    assert np.abs(found["dense"]["kernel"] - expected["dense"]["kernel"]).max() > 0.01


def test_weight_decay_shrinks_kernels_only():
    config, zeros = dataclasses.replace(CONFIG, weight_decay=0.5), jax.tree.map(jnp.zeros_like, tree(0))
    decayed = updates(config, zeros, tree(1))
    np.testing.assert_allclose(decayed["conv"]["kernel"], -0.05 * tree(1)["conv"]["kernel"], rtol=1e-6)
    assert not np.any(decayed["conv"]["bias"]) and not np.any(decayed["token"]["embedding"])


def test_shards_give_the_whole_ones_update():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    gradients, params = tree(0), tree(1)
    split = {"conv": {"kernel": PartitionSpec(None, None, None, "fsdp")}, "dense": {"kernel": PartitionSpec("fsdp")}}

    def place(tree):
        return {
            layer: {
                name: jax.device_put(x, NamedSharding(mesh, split.get(layer, {}).get(name, PartitionSpec())))
                for name, x in leaves.items()
            }
            for layer, leaves in tree.items()
        }

    whole, sharded = updates(CONFIG, gradients, params), updates(CONFIG, place(gradients), place(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, sharded)
