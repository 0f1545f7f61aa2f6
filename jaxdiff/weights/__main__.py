"""Give a fine-tuned Stable Diffusion back to PyTorch's world.

    python -m jaxdiff.weights export --workdir runs/finetune --out my-sd/
    python -m jaxdiff.weights export --workdir runs/finetune --out my-sd.safetensors --format single-file --dtype float16
    python -m jaxdiff.weights export --workdir runs/finetune --out my-lora.safetensors --format lora

diffusers: a folder that StableDiffusionPipeline.from_pretrained opens. single-file: one .safetensors file with the names of
Stable Diffusion's first authors. lora: the factors alone, of a run with config.lora.rank. What is written are the moving
averages of the newest checkpoint's parameters. Nothing is ever written over.
"""

import argparse
import pathlib
import sys

from jaxdiff.command_line import Parser, one_line_errors, set_up_compilation_cache
from jaxdiff.tasks.export import DTYPES, FORMATS, export_run
from jaxdiff.weights.lora import NAMINGS


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; argparse itself ends with status 2 on a wrong one."""
    usage, text = (__doc__ or "").split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "python -m jaxdiff.weights", description=usage, epilog=text, formatter_class=formatter, allow_abbrev=False
    )
    export = parser.add_subparsers(dest="command", required=True).add_parser("export", allow_abbrev=False)
    export.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a run that began from --config.model.pretrained"
    )
    export.add_argument("--out", required=True, type=pathlib.Path, help="folder or file to be made")
    export.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"default {FORMATS[0]}")
    export.add_argument("--naming", choices=NAMINGS, default=NAMINGS[0], help=f"of a LoRA file (default {NAMINGS[0]})")
    export.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"of a whole model (default {DTYPES[0]})")
    return parser.parse_args(argv)


def main() -> None:
    """Read the flags, export."""
    args = parse_args(sys.argv[1:])
    with one_line_errors():
        set_up_compilation_cache()
        workdir, out = args.workdir.expanduser(), args.out.expanduser()
        print(export_run(workdir, out, args.format, args.naming, args.dtype))


if __name__ == "__main__":
    main()
