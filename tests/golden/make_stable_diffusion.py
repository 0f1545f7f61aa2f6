"""Make stable_diffusion.npz: images of diffusers' own pipelines from the small checkpoints of tests/tasks/small_checkpoint.py.

pip install -e '.[peer]', then from the repository: python -m tests.golden.make_stable_diffusion

A key for each case in KEPT: the image [2 h w 3] float32 in [-1, 1], not clipped, from the noise that jaxdiff would draw for
SEEDS. Where an image is encoded the peer's posterior draws the same noise too.
"""

import contextlib
import json
import pathlib
import tempfile
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.diffusion.samplers import INITIAL_NOISE
from jaxdiff.generation.sampling import IMAGE_LATENTS, KNOWN_LATENTS
from tests.any_torchvision import import_torchvision
from tests.golden.make_latent_diffusion import channels_first, channels_last
from tests.tasks import small_checkpoint as small

SEEDS, PROMPTS, NEGATIVE, GUIDANCE, STEPS = (3, 4), ["a cat", "my dog!"], "blur", 7.5, 6
SD1, INPAINT1, SD2, INPAINT2 = small.KINDS
WIDE = (small.SIDE, small.SIDE + 16)
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Case(NamedTuple):
    """What is asked of a pipeline."""

    kind: str
    sampler: str | None = None  # None: the file's; "karras" after its name
    strength: float | None = None  # None: text to image
    masked: bool = False
    size: tuple[int, int] = (small.SIDE, small.SIDE)  # height and width
    scheduler: dict[str, Any] = {}  # options that the file is to have
    steps: int = STEPS


CASES = {
    "text pndm": Case(SD1),
    "text ddim": Case(SD1, "ddim"),
    "text dpm++2m": Case(SD1, "dpm++2m"),
    "text euler_ancestral": Case(SD1, "euler_ancestral"),
    "text euler": Case(SD1, "euler"),
    "text heun": Case(SD1, "heun"),
    "text lcm": Case(SD1, "lcm"),
    "text wide": Case(SD1, size=WIDE),
    "text v": Case(SD2),
    "text v karras": Case(SD2, "dpm++2m karras"),
    "text v zero snr": Case(SD2, scheduler=ZERO_SNR),
    "text v zero snr euler": Case(SD2, "euler", scheduler=ZERO_SNR),
    "image pndm": Case(SD1, None, 0.7),
    "image ddim": Case(SD1, "ddim", 0.7),
    "image euler": Case(SD1, "euler", 0.7),
    "image dpm++2m": Case(SD1, "dpm++2m", 0.7),
    "image heun": Case(SD1, "heun", 0.7),
    "image euler_ancestral": Case(SD1, "euler_ancestral", 0.7),
    "image lcm": Case(SD1, "lcm", 0.7),
    "image wide": Case(SD1, "ddim", 0.7, size=WIDE),
    "image v": Case(SD2, None, 0.7),
    "image v zero snr": Case(SD2, None, 0.7, scheduler=ZERO_SNR),
    "inpaint": Case(SD1, "ddim", 1.0, True),
    "inpaint pndm": Case(SD1, None, 0.7, True),
    "inpaint euler": Case(SD1, "euler", 0.7, True),
    "inpaint wide": Case(SD1, "ddim", 0.7, True, size=WIDE),
    "inpaint v": Case(SD2, None, 0.7, True),
    "channels": Case(INPAINT1, None, 1.0, True),
    "channels ddim": Case(INPAINT1, "ddim", 0.7, True),
    "channels wide": Case(INPAINT1, "ddim", 0.7, True, size=WIDE),
    "channels 2": Case(INPAINT2, None, 1.0, True),
    "channels 2 part": Case(INPAINT2, None, 0.7, True),
}
KEPT = ("text pndm", "image ddim", "inpaint", "channels", "text v")


def noise(number, size):
    """Standard normal [2 h/f w/f 4], as jaxdiff draws it for the seeds."""
    import jax

    keys = [jax.random.fold_in(jax.random.key(seed), number) for seed in SEEDS]
    return np.stack([jax.random.normal(key, (*size, 4)) for key in keys])


def scheduler_of(folder, case):
    """The file's scheduler, or another with the file's options, as diffusers' documentation says."""
    import diffusers

    from jaxdiff.generation.foreign_schedule import CLASSES

    config = json.loads((folder / "scheduler/scheduler_config.json").read_text()) | case.scheduler
    name, _, karras = (case.sampler or "").partition(" ")
    build = getattr(diffusers, CLASSES[name] if name else config["_class_name"])
    return build.from_config(config | ({"use_karras_sigmas": True} if karras else {}))


@contextlib.contextmanager
def drawn(module, numbers):
    """`randn_tensor` of a module of diffusers gives our noise of these numbers, one after the other."""
    before, numbers = module.randn_tensor, iter(numbers)
    module.randn_tensor = lambda shape, *a, **k: channels_first(noise(next(numbers), shape[-2:]))
    try:
        yield
    finally:
        module.randn_tensor = before


def pipeline(folder, case):
    """Built with the scheduler: building it corrects steps_offset and clip_sample."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    name = "StableDiffusionPipeline" if case.strength is None else "StableDiffusionImg2ImgPipeline"
    name = "StableDiffusionInpaintPipeline" if case.masked else name
    build = getattr(diffusers, name).from_pretrained
    quiet = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = build(folder, scheduler=scheduler_of(folder, case), **quiet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(folder, case):
    """The images of diffusers from a folder."""
    import_torchvision()
    import torch
    from diffusers.models.autoencoders import vae
    from PIL import Image

    (height, width), strength, steps = case.size, case.strength, case.steps
    pipe = pipeline(folder, case)
    inputs = {"prompt": PROMPTS, "negative_prompt": [NEGATIVE] * 2, "guidance_scale": GUIDANCE}
    inputs |= {"num_inference_steps": steps, "output_type": "latent"}
    if strength is not None:
        inputs |= {"image": [Image.fromarray(small.image(i, case.size)) for i in range(2)], "strength": strength}
    if case.masked:
        inputs |= {"mask_image": Image.fromarray(small.mask(case.size)[..., 0])}
    if strength is None or case.masked:
        inputs |= {"height": height, "width": width}
    # The image's latents are drawn unless only noise is begun from, those of what is known for mask channels alone.
    channels = "inpainting" in case.kind
    encoded = [IMAGE_LATENTS] * (strength is not None and not (channels and strength == 1))
    start = 0 if strength is None else steps - int(steps * strength)
    scheduler_module = __import__(pipe.scheduler.__module__, fromlist=["x"])
    pipe_module = __import__(type(pipe).__module__, fromlist=["x"])
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(drawn(vae, encoded + [KNOWN_LATENTS] * case.masked))
        stack.enter_context(drawn(pipe_module, [INITIAL_NOISE]))
        if hasattr(scheduler_module, "randn_tensor"):
            stack.enter_context(drawn(scheduler_module, range(start, steps)))
        latents = pipe(**inputs).images
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return np.ascontiguousarray(channels_last(images))


def make():
    """The images of the cases in KEPT."""
    found = {}
    for case in KEPT:
        with tempfile.TemporaryDirectory() as folder:
            folder = small.write(pathlib.Path(folder), CASES[case].kind)
            found[case] = theirs(folder, CASES[case])
    return found


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("stable_diffusion.npz"), **make())
