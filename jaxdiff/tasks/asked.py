"""What the flags of sample.py ask of a model: labels or prompts, images to begin from, masks, the way between two images."""

import argparse
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8, UInt32

from jaxdiff.config import ConfigError
from jaxdiff.files import obstacle, replacing, save_gif, save_png
from jaxdiff.generation.image_model import Request
from jaxdiff.generation.inputs import read_image
from jaxdiff.generation.pictures import image_grid
from jaxdiff.generation.pipelines import IMAGE_STRENGTH, blend_request, condition_of, edit_request
from jaxdiff.generation.sampling import first_step
from jaxdiff.tasks.attending import ATTENTIONS
from jaxdiff.tasks.run import Run, load_run
from jaxdiff.tasks.stable_diffusion import DTYPES, SizeError, StableDiffusion, open_stable_diffusion
from jaxdiff.training.processes import is_first

NUM = 16  # images of a run, where no number is given
OF_MODELS = (
    "tokenizer",
    "prediction",
    "variant",
    "dtype",
    "attention",
    "lora",
    "lora_scale",
)  # flags that go with --model


class Asked(NamedTuple):
    """What is to be made, and how it is called."""

    seeds: UInt32[np.ndarray, " n"]
    request: Any  # as Run.generate takes it
    strength: float
    names: UInt32[np.ndarray, " n"]  # of the files
    arrays: dict[str, np.ndarray]  # what is stored beside the images


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for images made from others."""
    parser.add_argument(
        "--init_image",
        type=os.path.expanduser,
        metavar="FILE",
        help="image to begin from, scaled and cropped to the model's size",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help=f"0 to 1: how far from it (default {IMAGE_STRENGTH}; 1 with a mask)",
    )
    parser.add_argument(
        "--mask_image",
        type=os.path.expanduser,
        metavar="FILE",
        help="what of it to make anew (white) and to keep (black)",
    )
    parser.add_argument(
        "--interpolate", type=int, metavar="N", help="N images on the way to the next seed, or between two prompts"
    )


def add_model_flags(parser: argparse.ArgumentParser, dry_run: bool = True) -> None:
    """The flags for the model: a run, or a Stable Diffusion checkpoint and how to take it."""
    parser.add_argument("--workdir", type=os.path.expanduser, help="a run's folder, as train.py printed it")
    parser.add_argument(
        "--model", metavar="PATH", help="or Stable Diffusion 1.x or 2.x: a folder or a .safetensors file"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of --model, in the place of its own")
    parser.add_argument("--prediction", help="of --model, where the file does not say: noise | v | x0")
    parser.add_argument("--variant", help="of the files of --model, as fp16")
    parser.add_argument("--dtype", choices=DTYPES, help="of --model: parameters and computation (default float32)")
    parser.add_argument(
        "--lora", metavar="FILE", help="of --model: a LoRA, .safetensors in kohya's or diffusers' naming"
    )
    parser.add_argument("--lora_scale", type=float, help="how much of it to take (default 1)")
    parser.add_argument(
        "--height", type=int, help="of images, of --model or a run that began from one (default: as trained)"
    )
    parser.add_argument("--width", type=int)
    if dry_run:
        parser.add_argument(
            "--attention", choices=ATTENTIONS, help="of --model: whose; auto (the default): cudnn where it can be"
        )
        parser.add_argument("--dry_run", action="store_true", help="of --model: print what it takes, and make nothing")


def open_asked(args: argparse.Namespace) -> Run | StableDiffusion:
    """As `open_model`, after a look at what is asked of the model."""
    if args.model is not None and args.workdir is None:
        _check_flags(args)
        if not args.prompt and not args.dry_run:
            raise ConfigError("--prompt is missing: say what to show")
        if args.label:
            raise ConfigError("this model reads text: ask by --prompt, not by --label")
        for flag in ("init_image", "mask_image"):
            if getattr(args, flag):
                _read(f"--{flag}", getattr(args, flag))  # no image: said before anything is opened
    return open_model(args)


def open_model(args: argparse.Namespace) -> Run | StableDiffusion:
    """The run, loaded, or the checkpoint, of which only the shapes are known yet. Raises ConfigError."""
    if (args.workdir is None) == (args.model is None):
        raise ConfigError("give either --workdir (a run) or --model (a Stable Diffusion checkpoint)")
    if args.model is None:
        given = [name for name in OF_MODELS if getattr(args, name, None) is not None] + ["dry_run"] * args.dry_run
        if given:
            raise ConfigError(f"--{given[0]} goes with --model, and a run has its own")
        return _open_run(args)
    if args.lora is None and args.lora_scale is not None:
        raise ConfigError("--lora_scale says how much of a LoRA to take: give that with --lora")
    how = {name: getattr(args, name) for name in ("variant", "tokenizer", "prediction")}
    # A program that is exported is for every platform.
    how["attention_implementation"] = (args.attention or "auto") if hasattr(args, "attention") else "xla"
    model = _sized(open_stable_diffusion(args.model, dtype=args.dtype or DTYPES[0], **how), args.height, args.width)
    if args.lora is None:
        return model
    try:
        return model.with_lora(args.lora, 1.0 if args.lora_scale is None else args.lora_scale)
    except ConfigError as error:
        raise ConfigError(f"--lora {error}") from error


def _open_run(args: argparse.Namespace) -> Run:
    if args.height is None and args.width is None:
        return load_run(args.workdir)
    try:
        return load_run(args.workdir, args.height, args.width)
    except SizeError as error:
        raise ConfigError(f"--{error}") from error


def _sized(model: StableDiffusion, height: int | None, width: int | None) -> StableDiffusion:
    try:
        return model.with_size(height, width)
    except SizeError as error:
        raise ConfigError(f"--{error}") from error


def check_place(args: argparse.Namespace) -> None:
    """Raise ConfigError where images cannot be written: that is better known before they are made."""
    out, npz = pathlib.Path(args.out), pathlib.Path(args.npz or "x")
    if args.npz and npz.is_dir():
        raise ConfigError(f"--npz {npz}: it is a folder, and a file is to be written")
    if problem := obstacle(npz.parent if args.npz else out):
        raise ConfigError(f"--npz {npz}: {npz.parent}: {problem}" if args.npz else f"--out {out}: {problem}")


def how_many(args: argparse.Namespace) -> int:
    """The number of images asked for. Raises ConfigError."""
    if args.interpolate is None:
        default = NUM if args.workdir else max(1, len(args.prompt))  # a dry run needs no prompt
        return default if args.num is None else args.num
    if args.interpolate < 2:
        raise ConfigError(f"--interpolate {args.interpolate}: must be at least 2, the two ends")
    if args.init_image or args.mask_image:
        raise ConfigError("--interpolate makes images from nothing: leave out --init_image and --mask_image")
    if len(args.prompt) > 2:
        raise ConfigError(f"--interpolate goes from one --prompt to another: got {len(args.prompt)}")
    if args.num is not None and is_first():
        print(f"note: --interpolate {args.interpolate} says how many images, not --num {args.num}", file=sys.stderr)
    return args.interpolate


def what_is_asked(args: argparse.Namespace, run: Run | StableDiffusion, num: int) -> Asked:
    """What `num` images are to show, and what they are made from. Raises ConfigError, and OSError for a missing file."""
    _check_flags(args)
    seeds = np.arange(args.seed, args.seed + num, dtype=np.uint32)
    if args.interpolate is not None:
        return _interpolation(args, run, num)
    condition, labels = _condition(args, run, num)
    arrays = {"seeds": seeds} | ({} if labels is None else {"labels": labels})
    if not args.init_image:
        return Asked(seeds, condition, 1.0, seeds, arrays)
    request, strength = _edit(args, run, condition, seeds), strength_of(args)
    assert strength is not None
    return Asked(seeds, request, strength, seeds, arrays)


def strength_of(args: argparse.Namespace) -> float | None:
    """How far to go from the image given; None where there is none."""
    if not args.init_image:
        return None
    if args.strength is not None:
        return float(args.strength)
    return 1.0 if args.mask_image else IMAGE_STRENGTH


def _check_flags(args: argparse.Namespace) -> None:
    if not args.init_image and args.mask_image:
        raise ConfigError("--mask_image says what of an image to make anew: give that with --init_image")
    if not args.init_image and args.strength is not None:
        raise ConfigError("--strength says how far to go from an image: give that with --init_image")
    if args.strength is not None:
        try:
            first_step(1, args.strength)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error


def _condition(args: argparse.Namespace, run: Run | StableDiffusion, num: int) -> tuple[Any, np.ndarray | None]:
    """What each image is asked to show, and its label where the model has classes."""
    if isinstance(run, StableDiffusion):
        return condition_of(run, [args.prompt[i % len(args.prompt)] for i in range(num)], args.negative_prompt), None
    names = [name.strip() for name in args.label.split(",") if name.strip()]
    if args.prompt or run.tokenizer is not None:
        if names:
            raise ConfigError("this model reads text: ask by --prompt, not by --label")
        prompts = args.prompt or list(run.captions)
        return run.text([prompts[i % len(prompts)] for i in range(num)], args.negative_prompt), None
    if args.negative_prompt:
        raise ConfigError("this model was trained without captions: leave out --negative_prompt")
    labels = run.labels(names, num)
    return labels, labels


def _edit(
    args: argparse.Namespace, run: Run | StableDiffusion, condition: Any, seeds: UInt32[np.ndarray, " n"]
) -> Request:
    image = _read("--init_image", args.init_image)
    request = _fitted("--init_image", run, condition, image, None, seeds)
    if not args.mask_image:
        return request
    return _fitted("--mask_image", run, condition, image, _read("--mask_image", args.mask_image), seeds)


def _fitted(flag: str, run: Run | StableDiffusion, condition: Any, image: Any, mask: Any, seeds: Any) -> Request:
    """The request; whatever is wrong with it, is wrong with the file of this flag."""
    try:
        return edit_request(run, condition, image, mask, seeds)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _interpolation(args: argparse.Namespace, run: Run | StableDiffusion, num: int) -> Asked:
    """From one seed to the next, or with one seed from one prompt to another."""
    ends = 2 if len(args.prompt) == 2 else 1
    condition, labels = _condition(args, run, ends)
    if "," in args.label:
        raise ConfigError("--interpolate shows one --label: nothing lies between two of them")
    seeds = np.arange(args.seed, args.seed + 3 - ends, dtype=np.uint32)
    request, seeds = blend_request(condition, seeds, num)
    assert request.blend is not None
    arrays = {"seeds": seeds, "weights": np.asarray(request.blend.weight)}
    arrays |= {} if labels is None else {"labels": np.repeat(labels, num)}
    return Asked(seeds, request, 1.0, np.arange(num, dtype=np.uint32), arrays)


def write_images(args: argparse.Namespace, asked: Asked, images: UInt8[np.ndarray, "n h w c"]) -> str:
    """Write the images as the flags say, and tell where. Of several processes each writes its share, the first the rest."""
    if args.npz:
        if is_first():
            with replacing(args.npz) as temporary, temporary.open("wb") as file:
                arrays: dict[str, Any] = {"images": images, **asked.arrays}
                np.savez_compressed(file, **arrays)
        return str(args.npz)
    folder = pathlib.Path(args.out)
    for i in range(jax.process_index(), len(images), jax.process_count()):
        save_png(folder / f"{asked.names[i]:06d}.png", images[i])
    written = [folder.parent / f"{folder.name}_grid.png"]
    if is_first():
        save_png(written[0], image_grid(images[:1024]))
    if args.interpolate:
        written.append(folder.parent / f"{folder.name}.gif")
        if is_first():
            save_gif(written[1], np.stack([image_grid(image[None], padding=0) for image in images]))
    return f"{len(images)} PNG files to {folder}/ and {', '.join(map(str, written))}"


def _read(flag: str, path: str) -> UInt8[np.ndarray, "h w c"]:
    try:
        return read_image(path)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
