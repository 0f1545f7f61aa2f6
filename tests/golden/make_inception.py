"""Make inception.npz: torch-fidelity's Inception network on random weights (pip install torch torch-fidelity pytorch-fid).

Weights and image are those of tests/models/random_inception.py (seed 0; seed 1, one image of 299x299). Keys, each the first
64 numbers: pool (pooled features), logits (without bias), spatial (Mixed_6d.branch1x1, channels 0..6, as h, w, c).
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.models.random_inception import random_images, random_tensors
from tests.models.torch_inception import torch_fidelity_network


def make() -> dict[str, np.ndarray]:
    """The features by key."""
    network = torch_fidelity_network(random_tensors(0))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    image = torch.from_numpy(random_images(1, 1, 299, 299, 3).transpose(0, 3, 1, 2).copy())
    pool, logits = network(image)
    rows = {"pool": pool, "logits": logits, "spatial": spatial[0][:, :7].permute(0, 2, 3, 1).reshape(1, -1)}
    return {key: value[0, :64].numpy() for key, value in rows.items()}


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("inception.npz"), **make())
