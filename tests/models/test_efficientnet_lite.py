"""EfficientNet-Lite0: it knows what real photographs show, and agrees with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdiff.models.efficientnet_lite import (
    EfficientNetLite0,
    depthwise,
    grouped_depthwise,
    preprocess,
    shifted_depthwise,
)
from jaxdiff.weights.efficientnet_lite import efficientnet_lite_file, efficientnet_lite_params
from jaxdiff.weights.pth import read_pth

HIGHEST = lax.Precision.HIGHEST


@pytest.fixture(scope="module")
def params():
    try:
        return efficientnet_lite_params()[0]
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def photographs():
    """Photographs that come with scikit-image, each with the ImageNet classes that describe it."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    return {
        "chelsea": (data.chelsea(), {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        "coffee": (data.coffee(), {967}),  # espresso
        "motorcycle": (data.stereo_motorcycle()[0], {665, 670}),  # moped, motor scooter
        "camera": (data.camera()[..., None], {872}),  # tripod; a grey image
    }


@pytest.fixture(scope="module")
def extract(params):
    network = EfficientNetLite0()
    return jax.jit(lambda images: network.apply({"params": params}, images))


@pytest.fixture(scope="module")
def prepared(photographs):
    return jnp.concatenate([preprocess(image[None]) for image, _ in photographs.values()])


def test_real_photographs_are_classified_rightly(extract, photographs, prepared):
    features = extract(prepared)
    assert features.pool.shape == (4, 1280) and features.logits.shape == (4, 1000) and features.spatial is None
    probabilities = jax.nn.softmax(features.logits)
    for row, (name, (_, right)) in zip(probabilities, photographs.items(), strict=True):
        assert int(row.argmax()) in right, name
        assert row[np.array(list(right))].sum() > 0.75, name


def torch_forward(tensors, x):
    """The network in torch, BatchNorm and all, from the state dict (x: [b 3 224 224])."""
    import torch
    import torch.nn.functional as F

    def convolve(x, conv, norm, stride=1, groups=1):
        weight = tensors[f"{conv}.weight"]
        size = weight.shape[-1]
        total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:]]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        mean, var, gamma, beta = (
            tensors[f"{norm}.{field}"] for field in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, gamma, beta, eps=1e-3)

    with torch.no_grad():
        x = F.relu6(convolve(x, "_conv_stem", "_bn0", stride=2))
        first_of_stage = {1: 2, 3: 2, 5: 2, 11: 2}
        for i in range(16):
            block, h = f"_blocks.{i}", x
            if f"{block}._expand_conv.weight" in tensors:
                h = F.relu6(convolve(h, f"{block}._expand_conv", f"{block}._bn0"))
            stride = first_of_stage.get(i, 1)
            h = F.relu6(convolve(h, f"{block}._depthwise_conv", f"{block}._bn1", stride, groups=h.shape[1]))
            h = convolve(h, f"{block}._project_conv", f"{block}._bn2")
            x = x + h if stride == 1 and h.shape == x.shape else h
        pool = F.relu6(convolve(x, "_conv_head", "_bn1")).mean((2, 3))
        return pool, F.linear(pool, tensors["_fc.weight"], tensors["_fc.bias"])


@pytest.mark.peer
def test_features_and_logits_are_those_of_torch(extract, prepared):
    torch = pytest.importorskip("torch")
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    x = np.concatenate([prepared, noise])
    tensors = torch.load(efficientnet_lite_file(), weights_only=True)
    ours = read_pth(efficientnet_lite_file())
    assert all(ours[name].tobytes() == tensors[name].contiguous().numpy().tobytes() for name in tensors)
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    pool, logits = torch_forward(tensors, torch.from_numpy(x).double().permute(0, 3, 1, 2))
    features = extract(x)
    for got, expected in ((features.pool, pool.numpy()), (features.logits, logits.numpy())):
        error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() < 1e-4
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (3, 2)])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_ways_of_a_depthwise_convolution_agree(shape, size, stride):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *shape, 6)).astype(np.float32)
    kernel = random.normal(size=(size, size, 6)).astype(np.float32)
    expected = grouped_depthwise(x, kernel, stride, HIGHEST)
    np.testing.assert_allclose(shifted_depthwise(x, kernel, stride), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(depthwise(x, kernel, stride, HIGHEST), expected, rtol=1e-5, atol=1e-5)


def test_depthwise_suits_the_platform():
    """No grouped convolution in the CPU's program, where it is slow; one in CUDA's and the TPU's."""
    traced = jax.jit(lambda x, kernel: depthwise(x, kernel, 1, HIGHEST)).trace(
        jnp.zeros((1, 8, 8, 6)), jnp.zeros((3, 3, 6))
    )
    for platform, convolutions in (("cpu", 0), ("cuda", 1), ("tpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform


def test_preprocess_scales_and_repeats_grey():
    grey = np.full((2, 50, 40, 1), 127 + 64, np.uint8)
    np.testing.assert_allclose(preprocess(grey), np.full((2, 224, 224, 3), 0.5), atol=1e-6)
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        preprocess(np.zeros((1, 8, 8, 4), np.uint8))


def test_preprocess_is_antialiased_bilinear_with_half_pixel_centres():
    """At half size pixel i sees 2i - 1 .. 2i + 2 with weights 1 3 3 1 over 8; at twice the size 3/4 and 1/4 of two neighbours."""
    random = np.random.default_rng(0)
    large = random.integers(0, 256, (1, 448, 448, 3), dtype=np.uint8)
    window = large[0, 19:23, 29:33].astype(np.float64)
    weights = np.array([1, 3, 3, 1]) / 8
    expected = (np.einsum("hwc,h,w->c", window, weights, weights) - 127) / 128
    np.testing.assert_allclose(preprocess(large)[0, 10, 15], expected, atol=1e-5)

    small = random.integers(0, 256, (1, 112, 112, 3), dtype=np.uint8)
    weights = np.array([3, 1]) / 4
    expected = (np.einsum("hwc,h,w->c", small[0, 10:12, 15:17].astype(np.float64), weights, weights) - 127) / 128
    np.testing.assert_allclose(preprocess(small)[0, 21, 31], expected, atol=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"224x224x3.*got \(32, 32, 3\)"):
        EfficientNetLite0().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
