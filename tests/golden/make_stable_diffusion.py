"""Make stable_diffusion.npz: images of diffusers' own pipelines from the small checkpoints of tests/tasks/small_checkpoint.py.

pip install -e '.[peer]', then from the repository: python -m tests.golden.make_stable_diffusion

A key for each case in KEPT: the image [2 h w 3] float32 in [-1, 1], not clipped, from the noise that jaxdiff would draw for
SEEDS. Where an image is encoded the peer's posterior draws the same noise too.
"""

import contextlib
import json
import pathlib
import tempfile

import numpy as np

from jaxdiff.diffusion.samplers import INITIAL_NOISE
from jaxdiff.generation.sampling import IMAGE_LATENTS, KNOWN_LATENTS
from tests.any_torchvision import import_torchvision
from tests.golden.make_latent_diffusion import channels_first, channels_last
from tests.tasks import small_checkpoint as small

SEEDS, PROMPTS, NEGATIVE, GUIDANCE, STEPS = (3, 4), ["a cat", "my dog!"], "blur", 7.5, 6
SD1, INPAINT1, SD2, INPAINT2 = small.KINDS
# Name -> kind, our sampler (None: the file's), strength (None: text to image), with a mask.
CASES = {
    "text pndm": (SD1, None, None, False),
    "text ddim": (SD1, "ddim", None, False),
    "text dpm++2m": (SD1, "dpm++2m", None, False),
    "text euler_ancestral": (SD1, "euler_ancestral", None, False),
    "text euler": (SD1, "euler", None, False),
    "text heun": (SD1, "heun", None, False),
    "text v": (SD2, None, None, False),
    "text v karras": (SD2, "dpm++2m karras", None, False),
    "image pndm": (SD1, None, 0.7, False),
    "image ddim": (SD1, "ddim", 0.7, False),
    "image euler": (SD1, "euler", 0.7, False),
    "image v": (SD2, None, 0.7, False),
    "inpaint": (SD1, "ddim", 1.0, True),
    "inpaint pndm": (SD1, None, 0.7, True),
    "inpaint euler": (SD1, "euler", 0.7, True),
    "inpaint v": (SD2, None, 0.7, True),
    "channels": (INPAINT1, None, 1.0, True),
    "channels ddim": (INPAINT1, "ddim", 0.7, True),
    "channels 2": (INPAINT2, None, 1.0, True),
}  # fmt: skip
KEPT = ("text pndm",)


def noise(number):
    """Standard normal [2 h/f w/f 4], as jaxdiff draws it for the seeds."""
    import jax

    side = small.SIDE // 4
    keys = [jax.random.fold_in(jax.random.key(seed), number) for seed in SEEDS]
    return np.stack([jax.random.normal(key, (side, side, 4)) for key in keys])


def scheduler_of(folder, sampler):
    """Another scheduler with the file's options, as diffusers' documentation says."""
    import diffusers

    from jaxdiff.generation.foreign_schedule import CLASSES

    name, _, karras = sampler.partition(" ")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    return getattr(diffusers, CLASSES[name]).from_config(config | ({"use_karras_sigmas": True} if karras else {}))


@contextlib.contextmanager
def drawn(module, numbers):
    """`randn_tensor` of a module of diffusers gives our noise of these numbers, one after the other."""
    before, numbers = module.randn_tensor, iter(numbers)
    module.randn_tensor = lambda *a, **k: channels_first(noise(next(numbers)))
    try:
        yield
    finally:
        module.randn_tensor = before


def pipeline(folder, sampler, strength, masked):
    """Built with the scheduler: building it corrects steps_offset and clip_sample."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    name = "StableDiffusionPipeline" if strength is None else "StableDiffusionImg2ImgPipeline"
    name = "StableDiffusionInpaintPipeline" if masked else name
    build = getattr(diffusers, name).from_pretrained
    quiet = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = build(folder, **quiet, **({"scheduler": scheduler_of(folder, sampler)} if sampler else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(folder, case):
    """The images of diffusers from a folder."""
    import_torchvision()
    import torch
    from diffusers.models.autoencoders import vae
    from PIL import Image

    kind, sampler, strength, masked = CASES[case]
    pipe = pipeline(folder, sampler, strength, masked)
    inputs = {"prompt": PROMPTS, "negative_prompt": [NEGATIVE] * 2, "guidance_scale": GUIDANCE}
    inputs |= {"num_inference_steps": STEPS, "output_type": "latent"}
    start = 0
    if strength is None:
        inputs |= {"latents": channels_first(noise(INITIAL_NOISE)), "height": small.SIDE, "width": small.SIDE}
    else:
        inputs |= {"image": [Image.fromarray(small.image(i)) for i in range(2)], "strength": strength}
        start = STEPS - int(STEPS * strength)
    if masked:
        inputs |= {"mask_image": Image.fromarray(small.mask()[..., 0]), "height": small.SIDE, "width": small.SIDE}
    # The image's latents are drawn unless only noise is begun from, those of what is known for mask channels alone.
    channels = "inpainting" in kind
    encoded = [IMAGE_LATENTS] * (strength is not None and not (channels and strength == 1)) + [KNOWN_LATENTS] * masked
    steps = iter(range(start, STEPS))
    scheduler_module = __import__(pipe.scheduler.__module__, fromlist=["x"])
    pipe_module = __import__(type(pipe).__module__, fromlist=["x"])
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(drawn(vae, encoded))
        if strength is not None:
            stack.enter_context(drawn(pipe_module, [INITIAL_NOISE]))
        if hasattr(scheduler_module, "randn_tensor"):
            stack.enter_context(drawn(scheduler_module, steps))
        latents = pipe(**inputs).images
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return np.ascontiguousarray(channels_last(images))


def make():
    """The images of the cases in KEPT."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        small.write(folder, SD1)
        return {case: theirs(folder, case) for case in KEPT}


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("stable_diffusion.npz"), **make())
