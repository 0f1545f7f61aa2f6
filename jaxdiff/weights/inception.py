"""The published weights of FID's Inception network, and the rules that turn them into parameters of models/inception.py.

The file is the TensorFlow graph of 2015-12-05 ported to PyTorch: for each of 94 convolutions a kernel and BatchNorm's scale,
shift, mean and variance, and the last dense layer; 472 tensors, 23,885,392 numbers. BatchNorm is folded into the kernels
here. The bias of the dense layer is left out: no score uses it.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.files import cache_folder
from jaxdiff.weights.download import fetch_file, sha256_of
from jaxdiff.weights.pth import read_pth

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
# Whole hash of the file, of which its name bears the first 8 digits. torch-fidelity publishes the same file.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

EPSILON = 1e-3  # of BatchNorm
FIELDS = ("weight", "bias", "running_mean", "running_var")
CLASSES, POOL = 1008, 2048

Shape = tuple[int, ...]
Kernels = dict[str, tuple[int, int, int, int]]  # path in the network -> kernel shape [h w in out]


def inception_weights() -> str:
    """Path of the weights file in the cache folder, downloaded when it is not there yet.

    Raises ValueError with one line that says what to do where there is no network.
    """
    path = cache_folder() / INCEPTION_FILE
    try:
        return str(fetch_file(INCEPTION_URL, INCEPTION_SHA256, path))
    except ValueError as error:
        raise ValueError(
            f"Inception's weights are needed: {error}; put the file at {path} or name it with --weights, "
            "or score offline with --extractor efficientnet-lite0"
        ) from error


def inception_params(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """Parameters of `InceptionV3` from a weights file, and the file's SHA-256.

    Raises ValueError with one line for a file that is not one of PyTorch, or not exactly this network.
    """
    return params_from_torch(read_pth(path), str(path)), sha256_of(path)


def params_from_torch(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Nested dict of float32 kernels and biases, BatchNorm folded in; `where` names the source in errors."""
    _check_names_and_shapes(tensors, where)
    _check_values(tensors, where)
    params: dict[str, Any] = {"fc": {"kernel": _float32(np.asarray(tensors["fc.weight"]).T)}}
    for name in KERNELS:
        gamma, beta, mean, variance = (tensors[f"{name}.bn.{field}"].astype(np.float64) for field in FIELDS)
        scale = gamma / np.sqrt(variance + EPSILON)
        kernel = tensors[f"{name}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0)  # [out in h w] -> [h w in out]
        *blocks, unit = name.split(".")
        node = params
        for block in blocks:
            node = node.setdefault(block, {})
        node[unit] = {"kernel": _float32(kernel * scale), "bias": _float32(beta - mean * scale)}
    return params


def torch_from_params(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same network as PyTorch tensors: a BatchNorm that only adds the bias, and a zero bias of the dense layer."""
    tensors = {"fc.weight": _float32(np.asarray(params["fc"]["kernel"]).T), "fc.bias": np.zeros(CLASSES, np.float32)}
    for name, (*_, channels) in KERNELS.items():
        node: Any = params
        for part in name.split("."):
            node = node[part]
        norm = (np.ones(channels), np.asarray(node["bias"]), np.zeros(channels), np.full(channels, 1 - EPSILON))
        tensors[f"{name}.conv.weight"] = _float32(np.asarray(node["kernel"]).transpose(3, 2, 0, 1))
        tensors |= {f"{name}.bn.{field}": _float32(value) for field, value in zip(FIELDS, norm, strict=True)}
    return tensors


def torch_shapes() -> dict[str, Shape]:
    """Name and shape of each of the 472 tensors."""
    shapes: dict[str, Shape] = {"fc.weight": (CLASSES, POOL), "fc.bias": (CLASSES,)}
    for name, (height, width, channels_in, channels) in KERNELS.items():
        shapes[f"{name}.conv.weight"] = (channels, channels_in, height, width)
        shapes |= {f"{name}.bn.{field}": (channels,) for field in FIELDS}
    return shapes


def _check_names_and_shapes(tensors: Mapping[str, np.ndarray], where: str) -> None:
    wanted = torch_shapes()
    # Newer versions of PyTorch also write a counter of batches, which evaluation does not look at.
    found = {name: np.shape(value) for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}
    misshapen = [
        f"{name} {found[name]} for {wanted[name]}" for name in wanted.keys() & found if found[name] != wanted[name]
    ]
    faults = {"missing": wanted.keys() - found, "unknown": found.keys() - wanted, "of the wrong shape": misshapen}
    lists = [f"{len(names)} tensors {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if lists:
        raise ValueError(f"{where} does not hold the Inception network of FID: {'; '.join(lists)}")


def _check_values(tensors: Mapping[str, np.ndarray], where: str) -> None:
    for name in torch_shapes():
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{where} is damaged: {name} has numbers that are not finite")
        if name.endswith("running_var") and np.min(tensors[name]) < 0:
            raise ValueError(f"{where} is damaged: {name} has negative variances")


def _some(names: Any) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def _block35(channels: int, pool: int) -> Kernels:
    return {
        "branch1x1": (1, 1, channels, 64),
        "branch5x5_1": (1, 1, channels, 48),
        "branch5x5_2": (5, 5, 48, 64),
        "branch3x3dbl_1": (1, 1, channels, 64),
        "branch3x3dbl_2": (3, 3, 64, 96),
        "branch3x3dbl_3": (3, 3, 96, 96),
        "branch_pool": (1, 1, channels, pool),
    }


def _block17(width: int) -> Kernels:
    return {
        "branch1x1": (1, 1, 768, 192),
        "branch7x7_1": (1, 1, 768, width),
        "branch7x7_2": (1, 7, width, width),
        "branch7x7_3": (7, 1, width, 192),
        "branch7x7dbl_1": (1, 1, 768, width),
        "branch7x7dbl_2": (7, 1, width, width),
        "branch7x7dbl_3": (1, 7, width, width),
        "branch7x7dbl_4": (7, 1, width, width),
        "branch7x7dbl_5": (1, 7, width, 192),
        "branch_pool": (1, 1, 768, 192),
    }


def _block8(channels: int) -> Kernels:
    return {
        "branch1x1": (1, 1, channels, 320),
        "branch3x3_1": (1, 1, channels, 384),
        "branch3x3_2a": (1, 3, 384, 384),
        "branch3x3_2b": (3, 1, 384, 384),
        "branch3x3dbl_1": (1, 1, channels, 448),
        "branch3x3dbl_2": (3, 3, 448, 384),
        "branch3x3dbl_3a": (1, 3, 384, 384),
        "branch3x3dbl_3b": (3, 1, 384, 384),
        "branch_pool": (1, 1, channels, 192),
    }


BLOCKS: dict[str, Kernels] = {
    "Mixed_5b": _block35(192, 32),
    "Mixed_5c": _block35(256, 64),
    "Mixed_5d": _block35(288, 64),
    "Mixed_6a": {
        "branch3x3": (3, 3, 288, 384),
        "branch3x3dbl_1": (1, 1, 288, 64),
        "branch3x3dbl_2": (3, 3, 64, 96),
        "branch3x3dbl_3": (3, 3, 96, 96),
    },
    "Mixed_6b": _block17(128),
    "Mixed_6c": _block17(160),
    "Mixed_6d": _block17(160),
    "Mixed_6e": _block17(192),
    "Mixed_7a": {
        "branch3x3_1": (1, 1, 768, 192),
        "branch3x3_2": (3, 3, 192, 320),
        "branch7x7x3_1": (1, 1, 768, 192),
        "branch7x7x3_2": (1, 7, 192, 192),
        "branch7x7x3_3": (7, 1, 192, 192),
        "branch7x7x3_4": (3, 3, 192, 192),
    },
    "Mixed_7b": _block8(1280),
    "Mixed_7c": _block8(2048),
}

# A convolution's name here is its path in the parameters (with / for .) and its name in the file.
KERNELS: Kernels = {
    "Conv2d_1a_3x3": (3, 3, 3, 32),
    "Conv2d_2a_3x3": (3, 3, 32, 32),
    "Conv2d_2b_3x3": (3, 3, 32, 64),
    "Conv2d_3b_1x1": (1, 1, 64, 80),
    "Conv2d_4a_3x3": (3, 3, 80, 192),
} | {f"{block}.{unit}": shape for block, units in BLOCKS.items() for unit, shape in units.items()}
