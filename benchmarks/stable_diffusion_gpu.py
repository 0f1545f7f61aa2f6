"""Images a second of Stable Diffusion 1.5 on an NVIDIA GPU, against diffusers with torch.compile: same random weights, one run.

    pip install -e '.[peer,cuda]' && python benchmarks/stable_diffusion_gpu.py
    pip install -e '.[peer]' && python benchmarks/stable_diffusion_gpu.py --tiny

This has not been run on a GPU: there was none to be had. What --tiny runs, a small model on the CPU in 2 steps, with PyTorch
eager and without cuDNN, is the same code, and its numbers say nothing of speed.

Text to image, 512x512, 50 steps of the file's sampler (PNDM) with guidance, bfloat16, batches of 1 and 8; ours with cuDNN's
attention, theirs with PyTorch's own choice. The checkpoint is built by diffusers and transformers and saved once, 2 GB: in
--folder, where a later run finds it, else in a temporary one. Both sides lie on one GPU together. Each makes a batch first,
which compiles and is not timed, then they take turns; a time is that of the whole call, from prompts to images on the
host. Each draws its own noise, so that images are not compared here (tests/tasks/test_stable_diffusion_full.py does that):
only how much their pixels vary is printed, which is alike where both do the same work.
"""

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room on the same GPU

import jax
import numpy as np

import jaxdiff
from jaxdiff.config import ShardingConfig
from jaxdiff.training.sharding import make_mesh

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests/

PROMPT, GUIDANCE, BATCHES = "an astronaut on a horse", 7.5, (1, 8)


def write_checkpoint(folder: Path, tiny: bool) -> None:
    """A folder in diffusers' layout with random numbers in every parameter; of the full size in bfloat16."""
    from tests.tasks import small_checkpoint as small

    small.write(folder, small.KINDS[0])  # index, scheduler; the networks are written over where they are to be large
    if tiny:
        return
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.golden.make_latent_diffusion import randomise
    from tests.tasks.test_stable_diffusion_full import TEXT, TOKENS, UNET, VAE

    small.tokenizer(small.KINDS[0], TOKENS).save(folder / "tokenizer")
    networks: dict[str, Callable[[], Any]] = {
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
        "unet": lambda: UNet2DConditionModel(**UNET),
    }
    for component, make in networks.items():
        randomise(make()).to(torch.bfloat16).save_pretrained(folder / component)
        gc.collect()


def ours(folder: Path, steps: int, tiny: bool) -> Callable[[int], np.ndarray]:
    """Makes a batch of images here, on one device."""
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    attention: Any = "xla" if tiny else "cudnn"
    sd = jaxdiff.load_stable_diffusion(folder, dtype="bfloat16", mesh=mesh, attention_implementation=attention)

    def run(batch: int) -> np.ndarray:
        settings = dataclasses.replace(sd.settings, batch_per_device=batch)
        seeds = list(range(batch))
        return jaxdiff.text_to_image(
            sd, [PROMPT] * batch, seeds, steps=steps, guidance=GUIDANCE, settings=settings, mesh=mesh
        )

    return run


def theirs(folder: Path, steps: int, tiny: bool, mode: str) -> Callable[[int], np.ndarray]:
    """Makes a batch of images there; on a GPU in the order of axes, and compiled, as diffusers' pages on speed advise."""
    import diffusers
    import torch

    diffusers.logging.set_verbosity_error()
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **none)
    pipe.set_progress_bar_config(disable=True)
    if not tiny:
        pipe.to("cuda")
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)

    def run(batch: int) -> np.ndarray:
        inputs = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "np"}
        return np.round(255 * pipe([PROMPT] * batch, **inputs).images).astype(np.uint8)

    return run


def measure(sides: dict[str, Callable[[int], np.ndarray]], batch: int, rounds: int) -> float:
    """Print the images a second of both at a batch size; how many times ours are theirs."""
    begin, shapes, spread = time.perf_counter(), set(), {}
    for name, run in sides.items():
        images = run(batch)
        shapes.add(images.shape)
        spread[name] = images.std()
        print(f"batch {batch}: {name}'s first call took {time.perf_counter() - begin:.1f} s", flush=True)
        begin = time.perf_counter()
    (shape,) = shapes  # both have made the same number of images of the same size
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            run(batch)
            times[name].append(time.perf_counter() - begin)
    speeds = {name: batch / min(taken) for name, taken in times.items()}
    told = ", ".join(f"{name} {speed:.3f} images/s (pixels +-{spread[name]:.0f})" for name, speed in speeds.items())
    print(f"batch {batch}, {shape[1]}x{shape[2]}, the quickest of {rounds}: {told}", flush=True)
    return speeds["jaxdiff"] / speeds["diffusers"]


def main() -> None:
    """Write the checkpoint unless it is there, time both sides, print the ratios last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written and kept")
    parser.add_argument("--steps", type=int, help="default 50, with --tiny 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", default="max-autotune", help="torch.compile's (default max-autotune)")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to try this script")
    args = parser.parse_args()
    if args.tiny:
        jax.config.update("jax_platforms", "cpu")
    try:
        from tests.any_torchvision import import_torchvision

        import_torchvision()
        import diffusers
        import torch
    except ImportError as error:
        print(
            f"error: {error.name} is missing: pip install -e '.[peer]' brings what this compares with", file=sys.stderr
        )
        raise SystemExit(2) from error
    if not args.tiny and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        print(
            "error: JAX and PyTorch must both see an NVIDIA GPU; --tiny tries the script without one", file=sys.stderr
        )
        raise SystemExit(2)
    device = "CPU, a small model" if args.tiny else torch.cuda.get_device_name()
    versions = f"jax {jax.__version__}; torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{device}; {versions}; bfloat16", flush=True)
    steps = args.steps or (2 if args.tiny else 50)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "complete").is_file():
            write_checkpoint(folder, args.tiny)
            (folder / "complete").touch()
        sides = {"jaxdiff": ours(folder, steps, args.tiny), "diffusers": theirs(folder, steps, args.tiny, args.mode)}
        ratios = {batch: measure(sides, batch, args.rounds) for batch in BATCHES}
    told = ", ".join(f"{ratio:.2f} times at batch {batch}" for batch, ratio in ratios.items())
    print(f"speed against diffusers, {steps} steps: {told}")


if __name__ == "__main__":
    main()
