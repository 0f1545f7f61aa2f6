"""CLIP's text encoder: parameter counts, who sees whom, and its closed form for one layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from jaxdiff.models.text_encoder import ACTIVATIONS, CLIPTextEncoder, pooled_text
from tests.models.tiny_networks import jit, random_parameters

TINY = {"vocabulary_size": 20, "context_length": 7, "width": 8, "num_layers": 2, "num_heads": 2}
TOKENS = jnp.array([[18, 3, 5, 7, 19, 19, 19], [18, 1, 19, 19, 19, 19, 19]])


@pytest.fixture(scope="module")
def variables():
    return random_parameters(CLIPTextEncoder(**TINY), TOKENS)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [({}, 123_060_480), ({"width": 1024, "num_layers": 23, "num_heads": 16, "activation": "gelu"}, 340_387_840)],
)
def test_parameter_counts_of_stable_diffusion_1_and_2(settings, parameters):
    network = CLIPTextEncoder(**settings)
    tokens = jnp.zeros((2, 77), jnp.int32)
    hidden, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), tokens)
    assert hidden.shape == (2, 77, network.width) and count(variables) == parameters


def test_a_token_sees_itself_and_those_before_it(variables):
    apply = jit(CLIPTextEncoder(**TINY).apply)
    hidden = apply(variables, TOKENS)
    for position in range(7):
        changed = apply(variables, TOKENS.at[:, position].set(11))
        np.testing.assert_array_equal(changed[:, :position], hidden[:, :position])
        assert (jnp.abs(changed[:, position:] - hidden[:, position:]).max(-1) > 1e-4).all()
    np.testing.assert_allclose(apply(variables, TOKENS[:, :4]), hidden[:, :4], atol=1e-5)  # a shorter prompt


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activations(activation):
    x = np.linspace(-4, 4, 33)
    expected = x * expit(1.702 * x) if activation == "quick_gelu" else x * (1 + erf(x / np.sqrt(2))) / 2
    np.testing.assert_allclose(ACTIVATIONS[activation](jnp.asarray(x, jnp.float32)), expected, atol=1e-6)


def test_the_activation_asked_for_is_used():
    used = [CLIPTextEncoder(**TINY, activation=name) for name in ("quick_gelu", "gelu")]
    variables = random_parameters(used[0], TOKENS)
    quick, exact = (jit(network.apply)(variables, TOKENS) for network in used)
    assert 1e-4 < float(jnp.abs(quick - exact).max()) < 0.2


def test_penultimate_layer_is_a_model_without_the_last(variables):
    """The final LayerNorm still comes after it."""
    params = dict(variables["params"])
    network = CLIPTextEncoder(**TINY)
    penultimate = jit(lambda v: network.apply(v, TOKENS, skip_layers=1))(variables)
    del params["block_1"]
    shorter = jit(CLIPTextEncoder(**TINY | {"num_layers": 1}).apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(penultimate, shorter, atol=1e-6)
    assert not np.allclose(penultimate, jit(network.apply)(variables, TOKENS), atol=1e-3)


def test_pooled_is_the_state_at_the_first_end():
    hidden = jax.random.normal(jax.random.key(0), (2, 7, 8))
    np.testing.assert_array_equal(pooled_text(hidden, TOKENS, 19), jnp.stack([hidden[0, 4], hidden[1, 2]]))


def test_bfloat16_is_finite_and_near(variables):
    full = jit(CLIPTextEncoder(**TINY).apply)(variables, TOKENS)
    half = jit(CLIPTextEncoder(**TINY, dtype=jnp.bfloat16).apply)(variables, TOKENS)
    assert half.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(half - full).max()) < 0.1


def test_refusals():
    for settings, tokens, skip, message in [
        ({"activation": "relu"}, TOKENS, 0, "activation must be one of quick_gelu, gelu, not 'relu'"),
        ({}, jnp.zeros((1, 8), jnp.int32), 0, "8 tokens a prompt, but the context length is 7"),
        ({}, TOKENS, 2, r"skip_layers must be 0 .. 1, as there are 2 layers; got 2"),
        ({"num_heads": 3}, TOKENS, 0, "8 channels cannot be split into 3 heads"),
    ]:
        network = CLIPTextEncoder(**TINY | settings)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda key, n=network, t=tokens, s=skip: n.init(key, t, skip_layers=s), jax.random.key(0))
