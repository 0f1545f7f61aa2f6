"""The peers' Inception networks with given weights, built without a download (pip install torch pytorch-fid torch-fidelity)."""

import tempfile

import torch

_register_fake = torch.library.register_fake


def _register_fake_but_torchvision(op, *args, **kwargs):
    """The wheel of torchvision may not carry the operators that its Python half describes; none is needed here."""
    if isinstance(op, str) and op.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(op, *args, **kwargs)


torch.library.register_fake = _register_fake_but_torchvision
try:
    import pytorch_fid.inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
finally:
    torch.library.register_fake = _register_fake

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
