"""The weights of LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924), version 0.1, as its users have them: two files.

VGG16's ImageNet weights in torchvision's file, of which the convolutions are taken, and the weights of the channels from the
file of the package `lpips`. Neither comes with this library, and neither is fetched.
"""

import hashlib
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.weights.pth import read_pth

Blocks = tuple[tuple[int, int], ...]

VGG16_FILE = "vgg16-397923af.pth"  # torchvision names a file by the first digits of its SHA-256
LINEAR_FILE = "vgg.pth"
LINEAR_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"  # as lpips 0.1.4 on PyPI has it
WHERE = {
    VGG16_FILE: f"from https://download.pytorch.org/models/{VGG16_FILE}",
    LINEAR_FILE: "from the package lpips of PyPI, lpips/weights/v0.1/vgg.pth",
}


class LPIPSWeights(NamedTuple):
    """Parameters of VGG16 and, for each of its maps, a weight for every channel."""

    vgg16: dict[str, Any]
    channels: list[np.ndarray]


def lpips_weights(folder: str | pathlib.Path, blocks: Blocks) -> LPIPSWeights:
    """Read both files in `folder`. Raises ValueError with one line where one is missing, or is not what it should be.

    blocks: channels and number of VGG16's convolutions before each pooling.
    """
    paths = {name: pathlib.Path(folder).expanduser() / name for name in WHERE}
    for name, path in paths.items():
        if not path.is_file():
            raise ValueError(f"LPIPS needs {path}, which is not there: get it {WHERE[name]}")
        _check_hash(path, VGG16_FILE.removesuffix(".pth")[-8:] if name == VGG16_FILE else LINEAR_SHA256)
    return LPIPSWeights(vgg16_params(paths[VGG16_FILE], blocks), channel_weights(paths[LINEAR_FILE], blocks))


def _check_hash(path: pathlib.Path, digits: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digits):
        raise ValueError(
            f"{path} is not the file it should be (SHA-256 {found[:8]}..., not {digits[:8]}...): "
            f"get it {WHERE[path.name]}"
        )


def vgg16_params(path: pathlib.Path, blocks: Blocks) -> dict[str, Any]:
    """Parameters of models/vgg.py from torchvision's names: `features.N`, N counting convolutions, ReLUs and poolings."""
    tensors, params = read_pth(path), {}
    number, inputs = 0, 3
    for block, (channels, count) in enumerate(blocks):
        for i in range(count):
            kernel = _tensor(tensors, f"features.{number}.weight", (channels, inputs, 3, 3), path)
            bias = _tensor(tensors, f"features.{number}.bias", (channels,), path)
            params[f"conv_{block}_{i}"] = {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), "bias": bias}
            number, inputs = number + 2, channels  # a ReLU follows each convolution
        number += 1  # pooling
    return params


def channel_weights(path: pathlib.Path, blocks: Blocks) -> list[np.ndarray]:
    """A weight for every channel of each map, none negative: the `lin0` ... `lin4`, 1x1 convolutions without bias."""
    tensors = read_pth(path)
    names = [(f"lin{i}.model.1.weight", channels) for i, (channels, _) in enumerate(blocks)]
    return [_tensor(tensors, name, (1, channels, 1, 1), path).reshape(-1) for name, channels in names]


def _tensor(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], path: pathlib.Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{path} has no {name}: it is not the file that LPIPS needs")
    if tensors[name].shape != shape:
        raise ValueError(f"{path}: {name} has the shape {list(tensors[name].shape)}, not {list(shape)}")
    return tensors[name].astype(np.float32)
