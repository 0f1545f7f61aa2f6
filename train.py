"""Train an image generator.

    python train.py --config configs/digits.py
    python train.py --config configs/mnist.py --workdir runs/mnist
    python train.py --config configs/cifar10.py --config.data.dir=~/tensorflow_datasets --config.training.batch_size=256
    python train.py --config configs/folder.py --config.data.dir=my_photos

--config FILE           what to train; each file in configs/ says what it needs, how long it takes and what to expect
--config.KEY=VALUE      change one key of it; `--config FILE --help` lists them all with their values
--workdir DIR           where everything goes (default: runs/<name of the config file>)
--dry_run               train nothing: print what a step takes (operations, memory, traffic), and whether it fits; the only file
                        written is first_batch.png in the workdir
--target SLICE          a --dry_run for TPUs that you need not have, such as v5e:2x4 (docs/preflight.md)
--profile               also write a trace of a few steps into the workdir, for Perfetto or TensorBoard
--coordinator HOST:PORT --process_id I --num_processes N
                        on several hosts: the same command on each, with its number (docs/several_hosts.md)

The workdir gets config.json, metrics.jsonl, tensorboard/, samples/ (a PNG grid now and then), curves.png and checkpoints/.
The same command again goes on where the run stopped. Ctrl-C and SIGTERM save first. Then: python sample.py --workdir DIR
"""

import shlex
import sys

from jaxdiff.command_line import config_from_flags, one_line_errors, process_flags, set_up_jax
from jaxdiff.tasks.preflight import preflight
from jaxdiff.tasks.targets import choose_target
from jaxdiff.tasks.train import train_run


def main() -> None:
    """Read the flags, train, say what to do next."""
    with one_line_errors():
        args, argv = process_flags(sys.argv)
        config, workdir = config_from_flags(argv, __doc__ or "")
        if args.target is not None:
            choose_target(args.target)
        set_up_jax(args, saves=True)
        if args.dry_run:
            return preflight(config, workdir, args.target)
        outcome = train_run(config, workdir, args.profile)
    if outcome.stopped_by is not None:
        again = shlex.join(["python", *sys.argv])
        print(f"stopped by {outcome.stopped_by.name} at step {outcome.step}, all is saved; to go on: {again}")
        sys.exit(128 + outcome.stopped_by)
    curves = " and curves.png" if (workdir / "curves.png").exists() else ""
    pictures = "reconstructions" if config.task == "autoencoder" else "samples"
    print(f"done at step {outcome.step}: see {pictures}/{curves} in {workdir}")
    where = shlex.quote(str(workdir))
    if config.task == "autoencoder":
        print(f"how well it reconstructs: python evaluate.py --workdir {where} --metrics psnr,ssim,rfid")
        print(f"to train in its latents: python train.py --config configs/emoji_text.py --config.autoencoder={where}")
    else:
        print(f"to make images: python sample.py --workdir {where} --num 16 --out samples/")


if __name__ == "__main__":
    main()
