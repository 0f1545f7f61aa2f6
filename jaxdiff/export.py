"""Write the sampler of a run, or of a Stable Diffusion checkpoint, for programs that have JAX but not this library.

    python -m jaxdiff.export --workdir runs/mnist --out exported/mnist --sampler ddim --steps 50 --guidance 2
    python -m jaxdiff.export --model path/to/stable-diffusion-v1-5 --out exported/sd --steps 30
    python -m jaxdiff.export --model path/to/sd-inpainting --out exported/hats --kind inpaint --platforms cpu,cuda

Writes a folder: sampler.stablehlo (the program, for any number of images), params.safetensors, sampler.json (what it is called
with) and, of a model that reads text, tokenizer/. Sampler, steps, size of images and whether there is guidance are fixed in the
program; seeds, what to show and the guidance scale are given when it is called. docs/serving.md shows how.
"""

import argparse
import sys

import jax

from jaxdiff.command_line import (
    Parser,
    add_sampling_flags,
    model_settings,
    one_line_errors,
    sampling_settings,
    set_up_compilation_cache,
)
from jaxdiff.config import ConfigError, ShardingConfig
from jaxdiff.generation.export import KINDS, USUAL, check_export, export_sampler
from jaxdiff.tasks.asked import add_model_flags, open_model
from jaxdiff.tasks.run import Run
from jaxdiff.training.sharding import make_mesh


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; argparse itself ends with status 2 on a wrong one."""
    usage, text = (__doc__ or "").split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "python -m jaxdiff.export", description=usage, epilog=text, formatter_class=formatter, allow_abbrev=False
    )
    add_model_flags(parser, dry_run=False)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to be made")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help=f"what it begins from (default {KINDS[0]})")
    parser.add_argument("--platforms", default=",".join(USUAL), help=f"where it can run (default {','.join(USUAL)})")
    add_sampling_flags(parser)
    parser.set_defaults(seed=0, dry_run=False)
    return parser.parse_args(argv)


def main() -> None:
    """Open the model, write its sampler."""
    args = parse_args(sys.argv[1:])
    with one_line_errors():
        platforms = [name.strip() for name in args.platforms.split(",") if name.strip()]
        folder = check_export(args.out, args.kind, platforms)
        if args.batch_per_device is not None:
            raise ConfigError("--batch_per_device: the sampler makes as many images at a time as it is given seeds")
        set_up_compilation_cache()
        model = open_model(args)
        if isinstance(model, Run):
            settings = sampling_settings(args, model.task.config, 1)
        else:
            settings = model_settings(args, model, 1)
            model = model.load(make_mesh(ShardingConfig(), jax.devices()[:1]))
        export_sampler(model, folder, kind=args.kind, settings=settings, platforms=platforms)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"wrote {folder}/: {args.kind}, {settings.sampler}, {settings.steps} steps, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
