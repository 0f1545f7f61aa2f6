"""From the published file's tensors to parameters: complete, folded rightly, and nothing else is let in."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.inception import InceptionV3
from jaxdiff.weights import inception
from jaxdiff.weights.inception import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    inception_params,
    inception_weights,
    params_from_torch,
    torch_from_params,
    torch_shapes,
)
from tests.models.random_inception import random_tensors


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(0)


def test_counts_are_those_of_the_published_file():
    shapes = torch_shapes()
    assert len(shapes) == 472
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 23_885_392


def test_file_name_bears_the_hash():
    assert INCEPTION_SHA256[:8] in INCEPTION_FILE and len(INCEPTION_SHA256) == 64


def test_parameters_are_those_of_the_network(tensors):
    params = params_from_torch(tensors, "random weights")
    wanted = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), wanted)


def test_batch_norm_is_folded(tensors):
    """To gamma (w . x - mean) / sqrt(variance + 1e-3) + beta, on one pixel of a 1x1 convolution."""
    name = "Mixed_6d.branch7x7_1"
    gamma, beta, mean, variance = (
        tensors[f"{name}.bn.{field}"].astype(np.float64) for field in ("weight", "bias", "running_mean", "running_var")
    )
    x = np.random.default_rng(1).normal(size=768)
    y = tensors[f"{name}.conv.weight"][:, :, 0, 0].astype(np.float64) @ x
    unit = params_from_torch(tensors, "random weights")["Mixed_6d"]["branch7x7_1"]
    wanted = gamma * (y - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(x @ unit["kernel"][0, 0] + unit["bias"], wanted, atol=1e-5)


def test_round_trip_through_pytorch_names(tensors):
    params = params_from_torch(tensors, "random weights")
    back = torch_from_params(params)
    assert {name: value.shape for name, value in back.items()} == torch_shapes()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=0), params_from_torch(back, "x"), params)


def test_a_foreign_network_is_refused_in_one_line(tensors):
    wrong = dict(tensors)
    del wrong["Mixed_5b.branch1x1.conv.weight"]
    wrong["AuxLogits.fc.bias"] = np.zeros(3)
    wrong["fc.bias"] = np.zeros(1000, np.float32)
    with pytest.raises(ValueError) as error:
        params_from_torch(wrong, "weights.pth")
    message = str(error.value)
    assert message.startswith("weights.pth ") and "\n" not in message
    for part in (
        "1 tensors missing (Mixed_5b.branch1x1.conv.weight)",
        "1 tensors unknown (AuxLogits.fc.bias)",
        "1 tensors of the wrong shape (fc.bias (1000,) for (1008,))",
    ):
        assert part in message


def test_long_lists_are_cut(tensors):
    with pytest.raises(ValueError, match=r"470 tensors missing \(Conv2d_1a_3x3.bn.bias, .*, \.\.\.\)$"):
        params_from_torch({name: tensors[name] for name in ("fc.weight", "fc.bias")}, "weights.pth")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Mixed_7c.branch_pool.conv.weight", np.nan, "numbers that are not finite"),
        ("fc.weight", np.inf, "numbers that are not finite"),
        ("Mixed_7a.branch3x3_1.bn.running_var", -1.0, "negative variances"),
    ],
)
def test_damaged_numbers_are_refused(tensors, name, value, message):
    damaged = tensors[name].copy()
    damaged.flat[7] = value
    with pytest.raises(ValueError, match=f"^weights.pth is damaged: {name} has {message}$"):
        params_from_torch(tensors | {name: damaged}, "weights.pth")


def test_counters_of_newer_files_are_passed_over(tensors):
    params_from_torch(tensors | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}, "weights.pth")


def test_hash_of_the_file_comes_with_the_parameters(tensors, tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"content")
    monkeypatch.setattr(inception, "read_pth", lambda path: tensors)
    params, sha256 = inception_params(tmp_path / "weights.pth")
    assert sha256 == hashlib.sha256(b"content").hexdigest()
    assert set(params) == {name.split(".")[0] for name in torch_shapes()}


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(ValueError) as error:
        inception_weights()
    message = str(error.value)
    for part in ("http://127.0.0.1:9/", str(tmp_path / "jaxdiff" / INCEPTION_FILE), "--weights", "efficientnet-lite0"):
        assert part in message
    assert "\n" not in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_file_in_the_cache_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    path = tmp_path / "jaxdiff" / INCEPTION_FILE
    path.parent.mkdir()
    path.write_bytes(b"content")
    assert inception_weights() == str(path)


@pytest.mark.peer
def test_a_file_of_torch_is_read(tensors, tmp_path):
    import torch

    path = tmp_path / "weights.pth"
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    params, sha256 = inception_params(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    jax.tree.map(np.testing.assert_array_equal, params, params_from_torch(tensors, "random weights"))
