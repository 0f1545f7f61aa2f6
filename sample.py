"""Make images with a trained run, or with a Stable Diffusion checkpoint.

    python sample.py --workdir runs/mnist --num 64 --out samples/
    python sample.py --workdir runs/mnist --num 64 --label 7 --sampler ddim --steps 50 --guidance 3 --seed 0 --out samples/
    python sample.py --workdir runs/mnist --num 1000 --label 0,1,2 --npz samples.npz
    python sample.py --workdir runs/shapes_text --prompt "a small red star at the top" --negative_prompt "a circle" --num 4
    python sample.py --workdir runs/shapes_text --prompt "a blue star" --init_image in.png --strength 0.6
    python sample.py --workdir runs/shapes_text --prompt "a blue star" --init_image in.png --mask_image mask.png
    python sample.py --workdir runs/mnist --label 3 --interpolate 8
    python sample.py --workdir runs/digits_progressive_gan --num 64 --truncation 0.7 --resolution 4
    python sample.py --model path/to/stable-diffusion-v1-5 --prompt "an astronaut on a horse" --guidance 7.5 --steps 30 --num 4
    python sample.py --model v1-5-pruned-emaonly.safetensors --prompt "a cat" --sampler dpm++2m
    python sample.py --model path/to/sd-inpainting --prompt "a hat" --init_image in.png --mask_image mask.png

Writes one PNG per image into --out (named by its seed) and a grid of them beside the folder; or, with --npz, one file with the
uint8 array `images` [n h w c], `labels` and `seeds`. Image i has the seed SEED + i and depends on nothing else but the model and
the settings below: not on --num or the number of devices, nor on --batch_per_device (on CPU to the bit; a GPU or TPU may round
otherwise for another one). Defaults of the settings are those of the run.

--model takes Stable Diffusion 1.x and 2.x, inpainting models too: folders in diffusers' layout and single .safetensors files.
There the settings are the scheduler file's; --num is the number of prompts. No safety checker looks at the images.

--init_image begins from an image, noised as far as --strength says. With --mask_image only what is white there is made anew.
--interpolate N makes N images, named 0 to N - 1, from seed SEED to SEED + 1, or from one --prompt to another, and a GIF of them.

Of a progressive GAN's run images have the resolution that it has grown to; --resolution asks for fewer pixels, the means of
those made. --truncation keeps the numbers of the latents near 0: less variety.
"""

import argparse
import os
import sys

from jaxdiff.command_line import (
    Parser,
    add_process_flags,
    add_sampling_flags,
    model_settings,
    one_line_errors,
    sampling_settings,
    set_up_jax,
)
from jaxdiff.tasks.asked import (
    add_image_flags,
    add_model_flags,
    check_place,
    how_many,
    open_asked,
    strength_of,
    what_is_asked,
    write_images,
)
from jaxdiff.tasks.dry_run import dry_run
from jaxdiff.tasks.run import Run


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; argparse itself ends with status 2 on a wrong one."""
    usage, text = (__doc__ or "").split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("sample.py", description=usage, epilog=text, formatter_class=formatter, allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--num", type=int, help="how many images (default 16; of --model one for each prompt)")
    parser.add_argument(
        "--label", default="", help="class, or classes to cycle through, as in 0,1,2 (default: all of them)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to show, of a model that reads text; may be repeated"
    )
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from (default: no text)")
    add_image_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default 0)")
    parser.add_argument(
        "--out", type=os.path.expanduser, default="samples", help="folder for the PNG files (default samples/)"
    )
    parser.add_argument("--npz", type=os.path.expanduser, help="write one .npz file instead of PNG files")
    add_sampling_flags(parser)
    add_process_flags(parser)
    return parser.parse_args(argv)


def main() -> None:
    """Open the model, make the images, write them."""
    args = parse_args(sys.argv[1:])
    with one_line_errors():
        check_place(args)
        set_up_jax(args)
        model = open_asked(args)
        num = how_many(args)
        if isinstance(model, Run):
            settings = sampling_settings(args, model.task.config, num)
            asked = what_is_asked(args, model, num)
            what = f"{args.workdir}, step {model.step}: {num} images, {model.task.describe_sampling(settings)}"
        else:
            settings = model_settings(args, model, num)
            what = f"{args.model}: {model.describe()}: {num} images, {model.describe_sampling(settings)}"
            if args.dry_run:
                print(what, flush=True)
                print(dry_run(model, settings, strength_of(args)))
                return
            asked = what_is_asked(args, model, num)
            model = model.load()
        print(what, flush=True)
        images = model.make(asked.seeds, asked.request, settings, strength=asked.strength)
        print(f"wrote {write_images(args, asked, images)}")


if __name__ == "__main__":
    main()
