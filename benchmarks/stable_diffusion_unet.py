"""One evaluation of Stable Diffusion 1.5's U-Net against diffusers' in PyTorch: same random weights, this machine's CPU.

    pip install -e '.[peer]' && python benchmarks/stable_diffusion_unet.py

Latents of 64x64 (images of 512x512), a batch of 2 (one image with guidance), float32. The numbers of both sides are
compared, then the two are timed in turns, so that whatever else the machine does slows both. Both keep the memory that they
free, as `sample.py` does (`jaxdiff.host_memory`). Ours is compiled by `jax.jit` first, which the time does not hold; PyTorch
runs eagerly. Beside each time in brackets the processor time divided by the cores, which other programs on the machine
disturb less. Wants 12 GB of memory; --width 64 is a network with a fifth of the channels, for a try.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.host_memory import keep_freed_memory
from jaxdiff.tasks.stable_diffusion import unet_from_config
from jaxdiff.weights.checkpoint import component_rules
from jaxdiff.weights.names import to_ours

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests/

TOKENS, TEXT = 77, 768


def config_of(width: int, side: int) -> dict[str, Any]:
    """What a checkpoint's unet/config.json says; 320 channels are Stable Diffusion 1.5's."""
    return {
        "sample_size": side,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 8,
    }


def make_peer(config: dict[str, Any], seed: int) -> Any:
    """Diffusers' network with random numbers in every parameter; kernels keep the size of what goes through."""
    from tests.any_torchvision import import_torchvision

    import_torchvision()
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    network = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            else:
                tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    return network


def ours(config: dict[str, Any], peer: Any, inputs: tuple[np.ndarray, ...]) -> Callable[[], np.ndarray]:
    """One evaluation here, compiled, with the peer's weights."""
    network = unet_from_config(config)
    x, t, context = map(jnp.asarray, inputs)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t, None, context))["params"]
    tensors = {name: tensor.detach().numpy() for name, tensor in peer.state_dict().items()}
    params = jax.device_put(to_ours(tensors, component_rules("unet", config), shapes))
    begin = time.perf_counter()
    run = (
        jax.jit(lambda p, x, t, c: network.apply({"params": p}, x, t, context=c)).lower(params, x, t, context).compile()
    )
    memory = run.memory_analysis()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f} million parameters; compiled in {time.perf_counter() - begin:.0f} s, ", end="")
    print(f"{(memory.temp_size_in_bytes if memory else 0) / 2**30:.2f} GiB of activations", flush=True)
    return lambda: np.asarray(run(params, x, t, context))


def theirs(peer: Any, inputs: tuple[np.ndarray, ...]) -> Callable[[], np.ndarray]:
    """One evaluation there; images come and go in our order."""
    import torch

    x, t, context = inputs
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    arguments = x, torch.from_numpy(t), torch.from_numpy(context)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return peer(*arguments).sample.numpy().transpose(0, 2, 3, 1)

    return run


def seconds(run: Callable[[], Any]) -> np.ndarray:
    """How long one evaluation takes by the clock, and of the processor's time."""
    begin = time.perf_counter(), time.process_time()
    run()
    return np.array([time.perf_counter(), time.process_time()]) - begin


def main() -> None:
    """Compare the numbers, time both in turns, print the ratio last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--latents", type=int, default=64, help="height and width of the latents (default 64)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=320, help="channels of the first level, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        import diffusers
        import torch
    except ImportError as error:
        print(
            f"error: {error.name} is missing: pip install -e '.[peer]' brings what this compares with", file=sys.stderr
        )
        raise SystemExit(2) from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{cores} cores; jax {jax.__version__}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()
    rng, config = np.random.default_rng(0), config_of(args.width, args.latents)
    shapes = ((args.batch, args.latents, args.latents, 4), (args.batch, TOKENS, TEXT))
    x, context = (rng.standard_normal(shape, np.float32) for shape in shapes)
    inputs = x, np.linspace(981, 1, args.batch, dtype=np.float32), context
    peer = make_peer(config, 0)
    sides = {"jaxdiff": ours(config, peer, inputs), "diffusers": theirs(peer, inputs)}
    outputs = {name: run() for name, run in sides.items()}
    largest = np.abs(outputs["diffusers"]).max()
    difference = np.abs(outputs["jaxdiff"] - outputs["diffusers"]).max()
    print(
        f"largest difference {difference:.1e}, of numbers up to {largest:.2f}: {difference / largest:.1e}", flush=True
    )
    times: dict[str, list[np.ndarray]] = {name: [] for name in sides}

    def told(name: str, taken: np.ndarray) -> str:
        return f"{name} {taken[0]:.2f} s ({taken[1] / cores:.2f})"

    for _ in range(args.rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
        print("  " + ", ".join(told(name, taken[-1]) for name, taken in times.items()), flush=True)
    best = {name: np.min(taken, axis=0) for name, taken in times.items()}
    print("the quickest: " + ", ".join(told(name, taken) for name, taken in best.items()))
    ratio = best["diffusers"] / best["jaxdiff"]
    print(f"speed against diffusers: {ratio[0]:.2f} times ({ratio[1]:.2f} by processor time)")


if __name__ == "__main__":
    main()
