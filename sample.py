"""Make images with a trained run.

    python sample.py --workdir runs/mnist --num 64 --out samples/
    python sample.py --workdir runs/mnist --num 64 --label 7 --sampler ddim --steps 50 --guidance 3 --seed 0 --out samples/
    python sample.py --workdir runs/mnist --num 1000 --label 0,1,2 --npz samples.npz
    python sample.py --workdir runs/shapes_text --prompt "a small red star at the top" --negative_prompt "a circle" --num 4

Writes one PNG per image into --out (named by its seed) and a grid of them beside the folder; or, with --npz, one file with the
uint8 array `images` [n h w c], `labels` and `seeds`. Image i has the seed SEED + i and depends on nothing else but the model and
the settings below: not on --num or the number of devices, nor on --batch_per_device (on CPU to the bit; a GPU or TPU may round
otherwise for another one). Defaults of the settings are those of the run.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

from jaxdiff.command_line import add_sampling_flags, one_line_errors, sampling_settings, set_up_compilation_cache
from jaxdiff.config import ConfigError
from jaxdiff.files import replacing, save_png
from jaxdiff.generation.pictures import image_grid
from jaxdiff.tasks.run import Run, load_run


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; argparse itself ends with status 2 on a wrong one."""
    usage, text = (__doc__ or "").split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sample.py", description=usage, epilog=text, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, help="the run's folder, as train.py printed it")
    parser.add_argument("--num", type=int, help="how many images (default 16)")
    parser.add_argument(
        "--label", default="", help="class, or classes to cycle through, as in 0,1,2 (default: all of them)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to show, of a model that reads text; may be repeated"
    )
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from (default: no text)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default 0)")
    parser.add_argument("--out", default="samples", help="folder for the PNG files (default samples/)")
    parser.add_argument("--npz", help="write one .npz file instead of PNG files")
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def what_is_asked(args: argparse.Namespace, run: Run, num: int) -> tuple[Any, np.ndarray | None]:
    """The request of each image, and its label where the model has classes. Raises ConfigError."""
    names = [name.strip() for name in args.label.split(",") if name.strip()]
    if args.prompt or run.task.tokenizer is not None:
        if names:
            raise ConfigError("this model reads text: ask by --prompt, not by --label")
        prompts = args.prompt or list(run.captions)
        return run.text([prompts[i % len(prompts)] for i in range(num)], args.negative_prompt), None
    if args.negative_prompt:
        raise ConfigError("this model was trained without captions: leave out --negative_prompt")
    labels = run.labels(names, num)
    return labels, labels


def main() -> None:
    """Open the run, make the images, write them."""
    args = parse_args(sys.argv[1:])
    with one_line_errors():
        set_up_compilation_cache()
        run = load_run(args.workdir)
        num = 16 if args.num is None else args.num
        settings = sampling_settings(args, run.task.config, num)
        request, labels = what_is_asked(args, run, num)
        seeds = np.arange(args.seed, args.seed + num, dtype=np.uint32)
        how = run.task.describe_sampling(settings)
        print(f"{args.workdir}, step {run.step}: {num} images, {how}", flush=True)
        images = run.make(seeds, request, settings)
        if args.npz:
            arrays = {"images": images, "seeds": seeds} | ({} if labels is None else {"labels": labels})
            with replacing(args.npz) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
            print(f"wrote {args.npz}")
            return
        folder = pathlib.Path(args.out)
        for seed, image in zip(seeds, images, strict=True):
            save_png(folder / f"{seed:06d}.png", image)
        grid = folder.parent / f"{folder.name}_grid.png"
        save_png(grid, image_grid(images[:1024]))
        print(f"wrote {num} PNG files to {folder}/ and {grid}")


if __name__ == "__main__":
    main()
