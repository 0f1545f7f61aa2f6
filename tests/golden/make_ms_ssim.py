"""Make ms_ssim.npz, the numbers of pytorch-msssim (pip install pytorch-msssim torch), in float64.

Keys: strengths [k], of the noise; values [k, 2], of the pairs that tests/evaluation/test_ms_ssim.py makes with it.
Grey images, as that package averages the channels last, and large ones, as it does not shrink its windows.
"""

import pathlib

import numpy as np
import torch
from pytorch_msssim import ms_ssim

from tests.evaluation.test_ms_ssim import pair

STRENGTHS = (1.0, 10.0, 60.0)


def value(strength: float) -> np.ndarray:
    """Theirs, of both pairs."""
    x, y = (
        torch.from_numpy(side.astype(np.float64).transpose(0, 3, 1, 2)) for side in pair((2, 176, 192, 1), strength)
    )
    return ms_ssim(x, y, data_range=255, size_average=False).numpy()


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_suffix("").with_name("ms_ssim.npz")
    np.savez(path, strengths=np.array(STRENGTHS), values=np.stack([value(strength) for strength in STRENGTHS]))
