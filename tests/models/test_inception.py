"""FID's Inception network: the peers' features from the same random weights, and each quirk of the graph by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.inception import InceptionV3, average_pool, inception_features, max_pool
from jaxdiff.models.resize import tf1_bilinear
from jaxdiff.weights.inception import params_from_torch
from tests.models.random_inception import random_images, random_tensors


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(0)


@pytest.fixture(scope="module")
def params(tensors):
    return params_from_torch(tensors, "random weights")


def relative_error(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b))


def test_features_are_those_of_torch_fidelity(params, golden_dir):
    """The golden image comes second in its batch: who stands beside an image does not matter."""
    images = np.concatenate([random_images(2, 1, 299, 299, 3), random_images(1, 1, 299, 299, 3)])
    features = jax.jit(inception_features)(params, images)
    assert [rows.shape for rows in features] == [(2, 2048), (2, 1008), (2, 2023)]
    for key, golden in np.load(golden_dir / "inception.npz").items():
        assert relative_error(getattr(features, key)[1, :64], golden) < 2e-5, key


def test_the_module_is_what_inception_features_runs(params):
    """On one image at a time (CPU) or the whole batch at once (elsewhere)."""
    image = random_images(1, 1, 299, 299, 3)
    whole = jax.jit(InceptionV3().apply)({"params": params}, (image.astype(np.float32) - 128) / 128)
    for a, b in zip(whole, jax.jit(inception_features)(params, image), strict=True):
        assert relative_error(a, b) < 2e-5


def test_average_pools_do_not_count_padding():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 5, 1)), jnp.float32)
    pooled = average_pool(x)[0, :, :, 0]
    np.testing.assert_allclose(pooled[0, 0], np.mean(x[0, :2, :2]), rtol=1e-5)
    np.testing.assert_allclose(pooled[3, 2], np.mean(x[0, 2:, 1:4]), rtol=1e-5)
    np.testing.assert_allclose(pooled[1, 1], np.mean(x[0, :3, :3]), rtol=1e-5)


def test_max_pools_see_no_padding_either():
    x = -jnp.ones((1, 4, 4, 1)) - jnp.arange(4.0)[None, None, :, None]
    np.testing.assert_array_equal(max_pool(x)[0, :, :, 0], np.array([[-1, -1, -2, -3]] * 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_are_float32_in_any_precision(params, channels):
    images = jax.ShapeDtypeStruct((2, 20, 30, channels), np.uint8)
    features = jax.eval_shape(lambda params, images: inception_features(params, images, jnp.bfloat16), params, images)
    assert all(rows.dtype == np.float32 for rows in features)


def test_wrong_images_are_refused_in_one_line(params):
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        inception_features(params, np.zeros((1, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match=r"299x299x3.*got \(32, 32, 3\)"):
        InceptionV3().apply({"params": params}, jnp.zeros((1, 32, 32, 3)))


@pytest.mark.peer
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (299, 299), (512, 512), (48, 80)])
def test_torch_fidelity_and_pytorch_fid_agree(tensors, params, size):
    """The whole road from uint8 images, and the network alone, at 1e-4 of the largest value and of the images' difference."""
    import torch

    from tests.models.torch_inception import pytorch_fid_network, torch_fidelity_network

    images = random_images(size[0], 2, *size, 3)
    features = jax.jit(inception_features)(params, images)

    spatial = []
    fidelity = torch_fidelity_network(tensors)
    fidelity.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output.numpy()))
    pool, logits = (rows.numpy() for rows in fidelity(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    assert relative_error(features.pool, pool) < 1e-4
    assert relative_error(features.logits, logits) < 1e-4
    assert relative_error(features.spatial, spatial[0][:, :7].transpose(0, 2, 3, 1).reshape(2, -1)) < 1e-4
    assert relative_error(features.pool[0] - features.pool[1], pool[0] - pool[1]) < 1e-4

    x = (tf1_bilinear(images, 299, 299) - 128) / 128
    with torch.no_grad():
        fid = pytorch_fid_network(tensors)(torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy()))[0]
    assert relative_error(features.pool, fid.numpy()[:, :, 0, 0]) < 1e-4
