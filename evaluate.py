"""Score images: inception score, FID and their kin; or a run's likelihood, or an autoencoder's reconstructions.

    python evaluate.py --workdir runs/mnist --metrics fid,is,kid,pr --num 5000
    python evaluate.py --images samples/ --reference photos/ --metrics fid
    python evaluate.py --make_reference --data tfds:cifar10 --out cifar10-train.npz
    python evaluate.py --workdir runs/digits --metrics bpd
    python evaluate.py --workdir runs/emoji_vae --metrics psnr,ssim,rfid

A run's samples are scored against its own data set, unless --reference says otherwise. --images, --reference and --data take a
folder, an .npz file of images (`images` or `arr_0`, uint8 [n h w c]) or a data source (digits, mnist, tfds:<name>); --reference
also a statistics file (.npz with `mu` and `sigma`, this command's or another tool's).

fid   Frechet inception distance          is   inception score           kid  kernel inception distance
sfid  the same of an inner layer          pr   precision and recall      bpd  bits per dimension, by the bound and the ODE
swd, ms_ssim       sliced Wasserstein distance; how alike pairs of images are (both without a network)
psnr, ssim, rfid   of an autoencoder's reconstructions: dB, structural similarity, fid against the originals

The table is printed and added to results.json in the workdir (for --images: NAME_results.json beside them) with all that it takes
to make it again; evaluation.png shows images and, for `is`, their classes. Scores of any network but FID's own carry its name.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterator

from jaxdiff import command_line
from jaxdiff.config import Config, ConfigError
from jaxdiff.evaluation.extractors import load_extractor
from jaxdiff.evaluation.images import open_images
from jaxdiff.tasks import evaluate as tasks
from jaxdiff.tasks.results import Results, read_results
from jaxdiff.tasks.run import load_run
from jaxdiff.tasks.score import Scorer, local_mesh


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; argparse itself ends with status 2 on a wrong one."""
    usage, text = (__doc__ or "").split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = command_line.Parser(
        "evaluate.py", description=usage, epilog=text, formatter_class=formatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=os.path.expanduser, help="score samples of this run")
    what.add_argument("--images", type=os.path.expanduser, help="score these images")
    what.add_argument("--make_reference", action="store_true", help="write the statistics of --data to --out")
    parser.add_argument("--metrics", default="fid,is", help="of the names below (default fid,is)")
    parser.add_argument("--num", type=int, help="how many (default: 5000 samples; swd 16384, bpd 256; else all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample, and of every random choice")
    parser.add_argument("--reference", help="what to compare with (default with --workdir: the run's data)")
    parser.add_argument("--data", help="with --make_reference: the images")
    parser.add_argument("--data_dir", help="where data sources lie, such as TFDS's data_dir")
    parser.add_argument("--split", help="of a data source (default train; bpd: test where there is one)")
    parser.add_argument("--image_size", type=int, help="cut images of folders and data sources to this many pixels")
    parser.add_argument(
        "--out", type=os.path.expanduser, help="with --make_reference: the .npz to write; else the folder for results"
    )
    command_line.add_score_flags(parser)
    command_line.add_process_flags(parser)
    command_line.add_sampling_flags(parser.add_argument_group("sampling, with --workdir (defaults: the run's own)"))
    return parser.parse_args(argv)


def results_of(args: argparse.Namespace, metrics: list[str]) -> Iterator[Results]:
    """The results asked for, one after the other."""
    run = load_run(args.workdir) if args.workdir else None
    sampling = run and command_line.sampling_settings(args, run.task.config, args.num or tasks.default_num(metrics))
    if run and "bpd" in metrics:
        yield tasks.evaluate_likelihood(run, args.data_dir, args.split, args.num or 256, args.seed, args.ode_steps)

    def make_scorer() -> Scorer:
        config = run.task.config if run else None
        extractor = load_extractor(*command_line.chosen_extractor(args, config), args.precision)
        return Scorer(extractor, local_mesh(config or Config()), args.extract_batch)

    if run and (asked := [name for name in metrics if name in tasks.RECONSTRUCTION_METRICS]):
        yield tasks.evaluate_reconstructions(asked, run, make_scorer, args.data_dir, args.split, args.num, args.seed)
    metrics = [name for name in metrics if name in tasks.IMAGE_METRICS]
    if not metrics and not args.make_reference:
        return
    options, split, size = command_line.score_options(args), args.split or "train", args.image_size
    if run and sampling:
        run.task.describe_sampling(sampling)  # says so where it makes none
        where, against = args.workdir, tasks.Reference(args.reference or "", args.data_dir, split, size)
        yield tasks.evaluate_samples(metrics, run, where, against, make_scorer, options, args.num, args.seed, sampling)
        return
    images = open_images(args.data or args.images, args.data_dir, split, size=size, num=args.num, seed=args.seed)
    if args.make_reference:
        yield tasks.make_reference(images, make_scorer(), pathlib.Path(args.out))
        return
    compared = tasks.Reference(args.reference, args.data_dir, split, size) if args.reference else None
    yield tasks.evaluate_images(metrics, images, compared, make_scorer, options)


def main() -> None:
    """Check the flags, work the scores out, print, write and draw them."""
    args = parse_args(sys.argv[1:])
    with command_line.one_line_errors():
        metrics = command_line.check_evaluation_flags(args)
        command_line.one_cpu_device_a_core()
        command_line.set_up_jax(args)
        place = pathlib.Path(args.workdir or args.images or args.out)
        name = "results.json" if args.workdir else f"{place.stem}_results.json"
        path = pathlib.Path(args.out or (place if args.workdir else place.parent)) / name
        read_results(path)  # so that a file that cannot be added to is found out first
        try:
            for results in results_of(args, metrics):
                for line in results.warnings:
                    print(f"warning: {line}", file=sys.stderr)
                print(results.table())
                print("wrote", args.out if args.make_reference else " and ".join(map(str, results.save(path))))
        except ValueError as error:
            raise ConfigError(str(error)) from error


if __name__ == "__main__":
    main()
