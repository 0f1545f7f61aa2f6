"""Spherical interpolation against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.generation.interpolation import lerp, slerp


def test_slerp_is_the_formula_and_keeps_the_norm():
    a, b = (jax.random.normal(jax.random.key(i), (5, 16, 16, 3)) for i in (0, 1))
    weight = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])
    found = np.asarray(slerp(a, b, weight))
    for i in range(1, 4):
        x, y, w = np.float64(a[i]), np.float64(b[i]), float(weight[i])
        theta = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin((1 - w) * theta) * x + np.sin(w * theta) * y) / np.sin(theta)
        np.testing.assert_allclose(found[i], expected, atol=1e-5)
    norms = np.linalg.norm(found.reshape(5, -1), axis=1)
    np.testing.assert_allclose(norms, np.sqrt(16 * 16 * 3), rtol=0.1)
    np.testing.assert_array_equal(found[0], a[0])
    np.testing.assert_array_equal(found[4], b[4])


def test_slerp_from_noise_to_itself_and_to_its_opposite_is_finite():
    a = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    np.testing.assert_allclose(slerp(a, a, jnp.full(2, 0.3)), a, atol=1e-6)
    assert np.isfinite(slerp(a, -a, jnp.full(2, 0.3))).all()


def test_lerp_is_a_line_for_every_leaf_and_refuses_labels():
    tree = lerp({"a": jnp.zeros((3, 2))}, {"a": jnp.ones((3, 2))}, jnp.array([0, 0.25, 1]))
    np.testing.assert_allclose(tree["a"][:, 0], [0, 0.25, 1])
    with pytest.raises(ValueError, match="between two labels"):
        lerp(jnp.array([1]), jnp.array([2]), jnp.array([0.5]))
