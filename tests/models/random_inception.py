"""Random weights for FID's Inception network, as PyTorch tensors: every parameter and every running statistic."""

import numpy as np

from jaxdiff.weights.inception import torch_shapes


def random_tensors(seed):
    """Scaled such that activations stay of order 1 through all layers, and that no two units are alike."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    for name, shape in sorted(torch_shapes().items()):
        if name.endswith("running_var"):
            # Small ones too: only there does BatchNorm's epsilon of 1e-3 show.
            value = np.exp(rng.uniform(np.log(0.003), np.log(0.3), shape))
        elif name.endswith("bn.weight"):
            # Drawn after its running_var (by the alphabet), whose root it has to undo.
            value = rng.uniform(1.2, 2.0, shape) * np.sqrt(tensors[name.replace("weight", "running_var")])
        elif name.endswith((".bias", "running_mean")):
            value = rng.uniform(-0.1, 0.1, shape)
        elif name == "fc.weight":
            value = rng.uniform(-1, 1, shape) * np.sqrt(3 / shape[1])
        else:
            value = rng.uniform(-1, 1, shape) * np.sqrt(3 / np.prod(shape[1:]))
        tensors[name] = value.astype(np.float32)
    return tensors


def random_images(seed, *shape):
    """uint8 noise that is not the same at all scales: each image is a random blend of coarse and fine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    b, h, w, c = shape
    coarse = rng.uniform(0, 255, (b, -(-h // 16), -(-w // 16), c)).repeat(16, axis=1).repeat(16, axis=2)[:, :h, :w]
    return (0.7 * coarse + 0.3 * rng.uniform(0, 255, shape)).astype(np.uint8)
