"""The peers' Inception networks with given weights, built without a download (pip install torch pytorch-fid torch-fidelity)."""

import tempfile

import torch

from tests.any_torchvision import import_torchvision

import_torchvision()
import pytorch_fid.inception  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402

resize = interpolate_bilinear_2d_like_tensorflow1x


def _state(tensors):
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


def torch_fidelity_network(tensors, features=("2048", "logits_unbiased")):
    """Network of uint8 [b c h w] of any size -> the features named."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(_state(tensors), file.name)
        return FeatureExtractorInceptionV3("inception", list(features), feature_extractor_weights_path=file.name)


def pytorch_fid_network(tensors, block=3):
    """Network of float [b c 299 299] in [-1, 1) -> the output of a block, 3 being the pooled features."""
    loader = pytorch_fid.inception.load_state_dict_from_url
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: _state(tensors)
    try:
        network = pytorch_fid.inception.InceptionV3([block], resize_input=False, normalize_input=False)
    finally:
        pytorch_fid.inception.load_state_dict_from_url = loader
    return network.eval()
