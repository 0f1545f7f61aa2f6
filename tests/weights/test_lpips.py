"""LPIPS: the right file or one clear line; and, with random weights, the numbers of the package lpips."""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.losses import perceptual_distance
from jaxdiff.models.vgg import BLOCKS, VGG16
from jaxdiff.tasks.perceptual import lpips_distance
from jaxdiff.weights import lpips
from tests.any_torchvision import import_torchvision
from tests.weights.test_pth import LEGACY, dictionary, program, save, storage, tensor

SMALL = ((4, 2), (6, 1))


def write(path, arrays):
    """A .pth file of these arrays."""
    values, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        values[name] = tensor(storage(str(number), array.dtype, array.size, LEGACY), array.shape, strides)
        storages[str(number)] = array.reshape(-1)
    return save(path, LEGACY, program(dictionary(**values)), storages)


def random_vgg(blocks, seed=0):
    """Tensors by torchvision's names."""
    random, tensors, number, inputs = np.random.default_rng(seed), {}, 0, 3
    for channels, count in blocks:
        for _ in range(count):
            kernel = random.normal(0, np.sqrt(2 / (9 * inputs)), (channels, inputs, 3, 3))
            tensors[f"features.{number}.weight"] = kernel.astype(np.float32)
            tensors[f"features.{number}.bias"] = random.normal(0, 0.1, channels).astype(np.float32)
            number, inputs = number + 2, channels
        number += 1
    return tensors


def random_channels(blocks, seed=1):
    random = np.random.default_rng(seed)
    shapes = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, (channels, _) in enumerate(blocks)}
    return {name: random.uniform(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def test_parameters_are_those_of_the_network(tmp_path):
    path = write(tmp_path / "a.pth", random_vgg(SMALL) | {"classifier.0.weight": np.zeros((2, 2), np.float32)})
    params = lpips.vgg16_params(path, SMALL)
    shapes = jax.eval_shape(VGG16(SMALL).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert jax.tree.all(jax.tree.map(lambda array, shape: array.shape == shape.shape, params, shapes))


def test_the_last_number_of_a_map_by_hand(tmp_path):
    """Correlation with the kernel [out in h w], zeros outside, ReLU, 2x2 maxima."""
    tensors = random_vgg(SMALL)
    params = lpips.vgg16_params(write(tmp_path / "a.pth", tensors), SMALL)
    x = np.random.default_rng(2).normal(size=(1, 5, 4, 3))
    maps = VGG16(SMALL).apply({"params": params}, jnp.asarray(x, jnp.float32))
    h = x
    for block, numbers in enumerate(((0, 2), (5,))):
        if block:
            h = h[:, :4, :4].reshape(1, 2, 2, 2, 2, -1).max((2, 4))
        for number in numbers:
            kernel, bias = (tensors[f"features.{number}.{kind}"].astype(np.float64) for kind in ("weight", "bias"))
            padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
            h = np.maximum(np.einsum("bhwcij,ocij->bhwo", windows, kernel) + bias, 0)
        np.testing.assert_allclose(maps[block], h, rtol=1e-4, atol=1e-5)


def test_files_that_are_missing_or_others_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="needs .*vgg16-397923af.pth, which is not there: get it from https://download"
    ):
        lpips.lpips_weights(tmp_path, BLOCKS)
    write(tmp_path / "vgg16-397923af.pth", random_vgg(SMALL))
    with pytest.raises(ValueError, match=r"SHA-256 \w{8}..., not 397923af...\): get it from https://download"):
        lpips.lpips_weights(tmp_path, BLOCKS)
    monkeypatch.setattr(lpips, "_check_hash", lambda *_: None)
    with pytest.raises(ValueError, match=r"needs .*/vgg.pth, which is not there: get it from the package lpips"):
        lpips.lpips_weights(tmp_path, BLOCKS)
    write(tmp_path / "vgg.pth", random_channels(SMALL))
    with pytest.raises(ValueError, match=r"features.0.weight has the shape \[4, 3, 3, 3\], not \[64, 3, 3, 3\]"):
        lpips.lpips_weights(tmp_path, BLOCKS)
    with pytest.raises(ValueError, match="has no features.8.weight"):
        lpips.vgg16_params(tmp_path / "vgg16-397923af.pth", (*SMALL, (3, 1)))


def test_the_distance_in_float64():
    random = np.random.default_rng(0)
    shapes, weights = ((2, 4, 4, 3), (2, 2, 2, 5)), [random.uniform(0, 1, n) for n in (3, 5)]
    x, y = ([random.normal(size=shape) for shape in shapes] for _ in range(2))
    unit = [[f / np.linalg.norm(f, axis=-1, keepdims=True) for f in maps] for maps in (x, y)]
    parts = [((a - b) ** 2 * w).sum(-1).mean((1, 2)) for a, b, w in zip(*unit, weights, strict=True)]
    plain = [((a - b) ** 2).sum(-1).mean((1, 2)) for a, b in zip(*unit, strict=True)]
    arrays = [[jnp.asarray(f, jnp.float32) for f in maps] for maps in (x, y, weights)]
    np.testing.assert_allclose(perceptual_distance(*arrays), sum(parts), rtol=1e-5)
    np.testing.assert_allclose(perceptual_distance(*arrays[:2]), sum(plain) / 2, rtol=1e-5)
    np.testing.assert_array_equal(perceptual_distance(arrays[0], arrays[0]), 0)


def test_the_gradient_is_finite_where_a_network_sees_nothing():
    nothing, something = [jnp.zeros((1, 2, 2, 3))], [jnp.ones((1, 2, 2, 3))]

    def distance(x):
        return perceptual_distance([jax.nn.relu(x[0])], something)[0]

    assert np.isfinite(jax.grad(distance)(nothing)[0]).all()


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_lpips_package_gives_the_same(tmp_path):
    """Random VGG16, the real weights of the channels from the package; images of 32 pixels."""
    torch, package, theirs = their_lpips()
    files = pathlib.Path(package.__file__).parent / "weights" / "v0.1"
    assert hashlib.sha256((files / "vgg.pth").read_bytes()).hexdigest() == lpips.LINEAR_SHA256
    tensors = random_vgg(BLOCKS)
    names = theirs.net.state_dict()  # slice1.0.weight is features.0.weight
    theirs.net.load_state_dict({n: torch.from_numpy(tensors[f"features.{n.split('.', 1)[1]}"]) for n in names})
    params = {
        "vgg16": lpips.vgg16_params(write(tmp_path / "a.pth", tensors), BLOCKS),
        "channels": lpips.channel_weights(files / "vgg.pth", BLOCKS),
    }
    random = np.random.default_rng(3)
    x, y = (random.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32) for _ in range(2))
    with torch.no_grad():
        expected = theirs(*(torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, y))).numpy().reshape(-1)
    np.testing.assert_allclose(jax.jit(lpips_distance)(params, x, y), expected, rtol=2e-5)


def their_lpips():
    torch = pytest.importorskip("torch")
    import_torchvision()
    package = pytest.importorskip("lpips")
    return torch, package, package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
