"""What train.py and sample.py share: config flags, errors as one line, the compilation cache."""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import jax
from absl import flags
from ml_collections import config_flags

from jaxdiff.config import Config, ConfigError, to_config
from jaxdiff.files import cache_folder
from jaxdiff.training.checkpoints import CheckpointError
from jaxdiff.training.loop import NonFiniteLossError

USAGE_ERROR = 2


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the user's mistakes into one line on stderr and exit status 2; a run that diverged into exit status 1."""
    try:
        yield
    except (ConfigError, CheckpointError, OSError) as error:
        sys.exit(_print_error(str(error), USAGE_ERROR))
    except NonFiniteLossError as error:
        sys.exit(_print_error(str(error), 1))


def _print_error(message: str, status: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def config_from_flags(argv: list[str], usage: str) -> tuple[Config, pathlib.Path]:
    """The config of `--config FILE --config.key=value ... [--workdir DIR]` and the workdir (default: runs/<name of the file>).

    `--help` prints `usage` and every key with its value. Raises ConfigError for anything that isn't understood.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Config file.", flag_values=values)
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
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_explain(error, argv, path)) from error
    if left:
        raise ConfigError(f"{left[0]!r} is not understood: flags begin with two dashes, as in --config.seed=1")
    if helping:
        print(f"\nkeys of {path}, to be changed by --config.<key>=<value>:\n{config}")
        sys.exit(0)
    return to_config(config), pathlib.Path(values["workdir"].value or f"runs/{path.stem}")


def _config_path(argv: list[str]) -> pathlib.Path | None:
    for here, after in zip(argv, [*argv[1:], None], strict=True):
        if here in ("--config", "-config") and after is not None:
            return pathlib.Path(after)
        if here.startswith(("--config=", "-config=")):
            return pathlib.Path(here.split("=", 1)[1])
    return None


def _explain(error: Exception, argv: list[str], path: pathlib.Path) -> str:
    """What absl and config_flags complain about, as a line; config_flags names only the part of a key that is wrong."""
    message = str(error.args[0]) if error.args else str(error)
    if isinstance(error, flags.Error):
        return message
    meant = re.search(r'Did you mean "(\w+)"', message)
    hint = f"; did you mean {meant[1]}?" if meant else f"; `--config {path} --help` lists the keys"
    for arg in argv:
        name = arg.lstrip("-").split("=")[0]
        if name.startswith("config.") and any(f"'{part}" in message for part in name.split(".")[1:]):
            return f"unknown config key {name}{hint}"
    return f"{path}: {message}"


def set_up_compilation_cache() -> None:
    """Keep compiled programs between runs: in $JAX_COMPILATION_CACHE_DIR, or in ~/.cache/jaxdiff/xla."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
