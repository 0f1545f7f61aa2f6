"""What the commands share: config flags, sampling flags, errors as one line, the compilation cache."""

import argparse
import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxdiff.config import Config, ConfigError, SamplingConfig, check, to_config
from jaxdiff.evaluation.extractors import EXTRACTORS, PRECISIONS
from jaxdiff.evaluation.scores import Options, check_metrics
from jaxdiff.files import cache_folder, obstacle
from jaxdiff.host_memory import keep_freed_memory
from jaxdiff.tasks.evaluate import ALL_METRICS, RECONSTRUCTION_METRICS, WANT_REFERENCE
from jaxdiff.tasks.stable_diffusion import StableDiffusion
from jaxdiff.training.checkpoints import CheckpointError, ReadError, SaveError
from jaxdiff.training.loop import NonFiniteLossError
from jaxdiff.training.processes import JoinError, Place, ending_with_the_others, join

USAGE_ERROR = 2
LONGEST_LINE = 1200  # characters of an error: a line repeats what it complains about, however long that is


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the user's mistakes into one line on stderr and exit status 2; what went wrong on the way (1) into one, too."""
    with ending_with_the_others():
        try:
            yield
        except (ConfigError, CheckpointError) as error:
            sys.exit(_print_error(str(error), USAGE_ERROR))
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            sys.exit(_print_error(str(error), 1 if is_full else USAGE_ERROR))
        except (NonFiniteLossError, SaveError, ReadError, JoinError) as error:
            sys.exit(_print_error(str(error), 1))


def _print_error(message: str, status: int) -> int:
    line = " ".join(message.split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """argparse's, but a wrong flag is said in one line, as all else."""

    def error(self, message: str) -> typing.NoReturn:
        """Print the line and exit with status 2."""
        sys.exit(_print_error(f"{message} (`{self.prog} --help` lists the flags)", USAGE_ERROR))


def config_from_flags(argv: list[str], usage: str) -> tuple[Config, pathlib.Path]:
    """The config of `--config FILE --config.key=value ... [--workdir DIR]` and the workdir (default: runs/<name of the file>).

    `--help` prints `usage` and every key with its value. Raises ConfigError for anything that isn't understood.
    """
    if any(arg.split("=")[0] in ("--flagfile", "-flagfile") for arg in argv):
        raise ConfigError(
            "--flagfile is not read here: give the flags themselves, or write their values into the config file"
        )
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Config file.", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Where everything goes.", flag_values=values)
    helping = any(arg in ("-h", "--help", "-help") for arg in argv)
    argv = [arg for arg in argv if arg not in ("-h", "--help", "-help")]
    path = _config_path(argv)
    if helping:
        print(usage.strip())
    if path is None:
        if helping:
            sys.exit(0)
        raise ConfigError("--config is missing: give a config file, such as --config configs/digits.py")
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        left = values(argv)[1:]
        config = values["config"].value
    except Exception as error:  # whatever the user's config file raises when it runs
        raise ConfigError(_explain(error, argv, path)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: get_config() must return default_config() with changes, not {type(config).__name__}"
        )
    if left:
        raise ConfigError(f"{left[0]!r} is not understood: flags begin with two dashes, as in --config.seed=1")
    if helping:
        print(f"\nkeys of {path}, to be changed by --config.<key>=<value>:\n{config}")
        sys.exit(0)
    workdir = os.path.expanduser(values["workdir"].value or f"runs/{path.stem}")  # of --workdir=~/x no shell does it
    if "://" in workdir:
        raise ConfigError(
            f"--workdir {workdir}: it must be a folder; mount the bucket (docs/running/storage_gs.md) and name that"
        )
    if problem := obstacle(workdir):
        raise ConfigError(f"--workdir {workdir}: {problem}")
    return to_config(config), pathlib.Path(workdir)


def _config_path(argv: list[str]) -> pathlib.Path | None:
    """The config file that is named. Raises ConfigError where two are: their flags would be mixed."""
    named = []
    for here, after in zip(argv, [*argv[1:], None], strict=True):
        if here in ("--config", "-config") and after is not None:
            named.append(after)
        if here.startswith(("--config=", "-config=")):
            named.append(here.split("=", 1)[1])
    if len(named) > 1:
        raise ConfigError(f"--config is given more than once ({' and '.join(named)}): give one config file")
    return pathlib.Path(named[0].split(":", 1)[0]) if named else None  # file.py:text is get_config(text) of file.py


def _explain(error: Exception, argv: list[str], path: pathlib.Path) -> str:
    """What absl and config_flags complain about, as a line; config_flags names only the part of a key that is wrong."""
    if isinstance(error, OSError | SyntaxError):
        return f"{path}: {error}"
    if said := _said_by_the_file(error, path):
        return f"{path}: {said}"
    message = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, flags.Error):
        return message
    meant = re.search(r'Did you mean "(\w+)"', message)
    hint = f"; did you mean {meant[1]}?" if meant else f"; `--config {path} --help` lists the keys"
    for arg in argv:
        name = arg.lstrip("-").split("=")[0]
        if name.startswith("config.") and any(f"'{part}" in message for part in name.split(".")[1:]):
            return f"unknown config key {name}{hint}"
    return f"{path}: {message}"


def _said_by_the_file(error: BaseException | None, path: pathlib.Path) -> str | None:
    """What the user's file raised, with its line: config_flags puts a whole traceback in its place."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).absolute() == path.absolute()]
        if lines:
            told = (
                error.args[0] if error.args and isinstance(error.args[0], Exception) else error
            )  # ml_collections does so
            message = str(told.args[0]) if isinstance(told, KeyError) and told.args else str(told)
            message = re.sub(r'Other fields present: ".*"(?=\nDid)', "", message, flags=re.DOTALL)  # pages of them
            return f"line {lines[-1]}: {type(error).__name__}: {message[:500]}"
        wrapper, error = error, error.__context__
        if str(wrapper).startswith("Error whilst parsing config file"):
            return _said_by_the_file(error, path) or str(error)
    return None


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Where this process stands among several."""
    group = parser.add_argument_group("several processes (SLURM, Open MPI and Cloud TPU say this themselves)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 waits for the others")
    group.add_argument("--process_id", type=int, metavar="I", help="number of this process, from 0")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")


def process_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `add_process_flags`, --profile, --dry_run and --target, and all the others. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_process_flags(parser)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--target")
    try:
        args, left = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    args.dry_run = args.dry_run or args.target is not None
    if args.dry_run and args.profile:
        what = "--dry_run" if args.target is None else f"--target {args.target}"
        raise ConfigError(f"--profile writes a trace of training steps, and {what} takes none: leave out one of them")
    return args, left


def set_up_jax(args: argparse.Namespace, saves: bool = False) -> None:
    """Host memory, compilation cache, and the other processes, if there are any. `saves`: see `join`. Raises as `join` does."""
    keep_freed_memory()
    set_up_compilation_cache()
    join(Place(args.coordinator, args.process_id, args.num_processes), saves)


def set_up_compilation_cache() -> None:
    """Keep compiled programs between runs: in $JAX_COMPILATION_CACHE_DIR, or in ~/.cache/jaxdiff/xla."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


SAMPLING_FLAGS = {field.name: field for field in dataclasses.fields(SamplingConfig) if field.name != "num_images"}
GAN_FLAGS = ("truncation", "resolution")
SAMPLING_HELP = {
    "sampler": "ddpm | ddim | euler | heun | dpm++2m | euler_ancestral | pndm | lcm | file (the checkpoint's own)",
    "steps": "steps of the sampler; more is slower and better",
    "spacing": "where the steps lie: linspace | leading | trailing | karras | file (as the checkpoint says)",
    "eta": "ddim: 0 deterministic ... 1 as random as ddpm",
    "variance": "ddpm: fixed_small | fixed_large | learned",
    "guidance": "classifier-free guidance scale; 1 = none, 2 to 5 is usual",
    "guidance_start": "guidance acts from this fraction of sampling ...",
    "guidance_end": "... to this one",
    "guidance_rescale": "0 to 1: pull the guided contrast back to normal",
    "clip": "predicted pixels outside their range: none | clip | dynamic",
    "truncation": "progressive GAN: no number of a latent beyond +- this (0.7, say): less variety; 0 = none cut off",
    "resolution": "progressive GAN: pixels a side, if fewer than it has grown to",
    "batch_per_device": "images that a device makes at a time",
}


def one_cpu_device_a_core() -> None:
    """Let a CPU count as one device a core, unless the user has chosen: networks then look at as many images side by side.

    That is quicker than many cores on one image (benchmarks/evaluation_speed.py). Must come before JAX's first computation.
    """
    chosen = jax.config.values["jax_num_cpu_devices"] != -1 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )
    if not chosen:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def add_sampling_flags(parser: argparse._ActionsContainer) -> None:
    """A flag for each setting of sampling; one that isn't given leaves the run's own value."""
    for name, field in SAMPLING_FLAGS.items():
        kind = field.type if isinstance(field.type, type) else str
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=SAMPLING_HELP[name])


def sampling_settings(args: argparse.Namespace, config: Config, num: int) -> SamplingConfig:
    """The run's sampling settings with the flags' changes, for `num` images from --seed on. Raises ConfigError."""
    changes = _changes(args)
    for name in changes:
        fits = config.task == "progressive_gan" if name in GAN_FLAGS else config.task == "diffusion"
        if not fits and name != "batch_per_device":
            whose = "progressive GANs" if name in GAN_FLAGS else "diffusion models"
            raise ConfigError(f"--{name} belongs to {whose}, and this run is of task {config.task!r}")
    if config.model.pretrained and "variance" in changes:
        raise ConfigError("--variance: of a fine-tuned run the checkpoint's scheduler file says it")
    settings = dataclasses.replace(config.sampling, **changes)
    _check_settings(dataclasses.replace(config, sampling=settings), args, num)
    return settings


def model_settings(args: argparse.Namespace, model: StableDiffusion, num: int) -> SamplingConfig:
    """As `sampling_settings`, of a checkpoint, whose scheduler's file decides what no flag says. Raises ConfigError."""
    changes = _changes(args)
    if "variance" in changes:
        raise ConfigError("--variance: of --model the scheduler's file says it")
    settings = dataclasses.replace(model.settings, **changes)
    plain = dataclasses.replace(settings, sampler="ddim", spacing="trailing", clip="clip")
    _check_settings(dataclasses.replace(Config(), sampling=plain), args, num)
    model.check(settings)
    return settings


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the sampling flags change."""
    changes = {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    for name, value in changes.items():
        choices = getattr(SAMPLING_FLAGS[name].type, "__args__", None)
        if choices and value not in choices:
            raise ConfigError(f"--{name} {value}: must be one of {', '.join(choices)}")
    return changes


def _check_settings(config: Config, args: argparse.Namespace, num: int) -> None:
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.sampling.", "--")) from error
    if num < 1:
        raise ConfigError(f"--num {num}: must be at least 1")
    if not 0 <= args.seed <= 2**32 - num:
        raise ConfigError(f"--seed {args.seed}: the seeds of {num} images must lie from 0 to 2**32 - 1")


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """What looks at the images, and how the scores are worked out."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--extractor",
        choices=EXTRACTORS,
        help="default with --workdir: the run's config.evaluation.extractor; else, or with --weights, inception",
    )
    group.add_argument(
        "--weights", type=os.path.expanduser, help="file of the inception network's weights (default: downloaded once)"
    )
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="default float32")
    group.add_argument("--extract_batch", type=int, default=16, help="images that a device looks at at a time")
    group = parser.add_argument_group("scores")
    group.add_argument("--splits", type=int, default=10, help="of the inception score (default 10)")
    group.add_argument(
        "--marginal", choices=("generated", "real"), default="generated", help="p(y) of the inception score"
    )
    group.add_argument(
        "--bootstrap", type=int, default=0, metavar="R", help="standard errors from R replicates (20, say)"
    )
    group.add_argument("--infinite", action="store_true", help="also FID extrapolated to infinitely many images")
    group.add_argument("--force", action="store_true", help="print scores of what is not comparable, marked as such")
    group.add_argument("--ode_steps", type=int, default=128, help="of bpd's ODE (default 128)")


def chosen_extractor(args: argparse.Namespace, config: Config | None) -> tuple[str, str | None]:
    """Name and weights file of what looks at the images: the flags', else those of the run's config, else FID's own."""
    if args.extractor or args.weights or config is None:
        return args.extractor or "inception", args.weights
    return config.evaluation.extractor, config.evaluation.weights or None


def score_options(args: argparse.Namespace) -> Options:
    """How scores are worked out, as the flags say."""
    names = ("splits", "marginal", "bootstrap", "infinite", "seed", "force")
    return Options(**{name: getattr(args, name) for name in names})


def check_evaluation_flags(args: argparse.Namespace) -> list[str]:
    """The metrics that evaluate.py was asked for. Raises ConfigError for flags that cannot work, alone or together."""
    metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
    try:
        check_metrics(metrics, ALL_METRICS)
    except ValueError as error:
        raise ConfigError(f"--metrics: {error}") from error
    least = {"num": 1, "seed": 0, "image_size": 1, "extract_batch": 1, "splits": 1, "ode_steps": 1, "bootstrap": 0}
    for name, bound in least.items():
        if (value := getattr(args, name)) is not None and value < bound:
            raise ConfigError(f"--{name} {value}: must be at least {bound}")
    if args.bootstrap == 1:
        raise ConfigError("--bootstrap 1: must be 0 (none) or at least 2")
    if args.make_reference and not (args.data and (args.out or "").endswith(".npz")):
        raise ConfigError("--make_reference needs --data (the images) and --out NAME.npz (the file to write)")
    if args.data and not args.make_reference:
        raise ConfigError("--data goes with --make_reference: use --images or --reference")
    if "bpd" in metrics and not args.workdir and not args.make_reference:
        raise ConfigError("--metrics bpd is the likelihood of a model: it needs --workdir")
    of_runs = [name for name in metrics if name in RECONSTRUCTION_METRICS]
    if of_runs and not args.workdir:
        raise ConfigError(f"--metrics {','.join(of_runs)}: how an autoencoder reconstructs needs its --workdir")
    wants = [name for name in metrics if name in WANT_REFERENCE] + ["--marginal real"] * (args.marginal == "real")
    if args.images and wants and not args.reference:
        raise ConfigError(f"{', '.join(wants)} of --images needs --reference: a folder, an .npz file or a data source")
    return metrics
