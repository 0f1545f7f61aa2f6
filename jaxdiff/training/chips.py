"""What accelerators can do at best, as their makers publish it; nothing here is measured.

Cloud TPU: https://cloud.google.com/tpu/docs/v5e (and v4, v5p, v6e), key specifications; `link` is half of the bidirectional
inter-chip bandwidth of a chip. NVIDIA: the data sheets of the A100, H100 and H200 Tensor Core GPUs, matrix products without
sparsity; `link` is half of NVLink's bandwidth (with PCIe cards that of a bridge between two).
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Peaks of one chip, in operations or bytes a second; a multiplication and an addition count as two operations."""

    name: str
    kinds: tuple[str, ...]  # what `jax.Device.device_kind` begins with
    flops: float  # matrix products in bfloat16
    memory: float  # bytes
    memory_bandwidth: float
    link: float  # sent to other chips of the same slice or machine, all links together


CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * 2**30, 1200e9, 300e9),  # six links of 50 GB/s: its page has none
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 819e9, 200e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1638e9, 400e9),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95e9, 2765e9, 600e9),
    Chip("A100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2039e9, 300e9),
    Chip("A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40e9, 1555e9, 300e9),
    Chip("H200 NVL", ("NVIDIA H200 NVL",), 835e12, 141e9, 4800e9, 450e9),  # before the H200, with which it begins
    Chip("H200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9),
    Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2000e9, 300e9),
    Chip("H100 NVL", ("NVIDIA H100 NVL",), 835e12, 94e9, 3900e9, 300e9),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3350e9, 450e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device is; None where it is not listed, such as a CPU."""
    return next((chip for chip in CHIPS if device_kind.startswith(chip.kinds)), None)
