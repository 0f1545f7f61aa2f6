"""What a user types wrongly is answered by one line and exit status 2, before anything compiles."""

import os
import pathlib
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

import evaluate
import sample
from jaxdiff import export
from jaxdiff.command_line import config_from_flags, one_line_errors
from jaxdiff.config import ConfigError
from jaxdiff.training.checkpoints import ReadError

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.py")


def run(*argv, **options):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def processor_seconds():
    """Of all children so far that have ended, on every core."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


WRONG_FLAGS = [
    (
        [f"--config={DIGITS}", "--config.training.batchsize=3"],
        "key config.training.batchsize; did you mean batch_size.\n",
    ),
    (
        [f"--config={DIGITS}", "--config.trainin.batch_size=3"],
        "key config.trainin.batch_size; did you mean training.\n",
    ),
    (
        [f"--config={DIGITS}", "--config.training.batch_size=many"],
        "config.training.batch_size=many: invalid literal .*'many'\n",
    ),
    ([f"--config={DIGITS}", "--config.data.flip=maybe"], "config.data.flip=maybe"),
    ([f"--config={DIGITS}", "config.seed=1"], "'config.seed=1' is not understood: flags begin with two dashes"),
    ([f"--config={DIGITS}", "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    ([f"--config={DIGITS}", "--config.data.image_size=9"], "config.data.image_size = 9 must be divisible by"),
    (["--config=configs/nothing.py"], "--config configs/nothing.py: no such file"),
    (["--workdir=x"], "--config is missing"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG_FLAGS, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_wrong_flags_are_named(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as caught, one_line_errors():
        config_from_flags(sys.argv, "usage")
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_overrides_reach_the_config(monkeypatch, tmp_path):
    argv = [
        "train.py",
        f"--config={DIGITS}",
        "--config.training.batch_size=32",
        "--config.data.dir=~/x",
        "--config.model.channel_multipliers=1,2,2",
        "--config.data.image_size=16",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    config, workdir = config_from_flags(argv, "usage")
    assert config.training.batch_size == 32
    assert config.model.channel_multipliers == (1, 2, 2)
    assert workdir == pathlib.Path("runs/digits")
    assert config.data.dir == "~/x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=configs/folder.py", "--config.data.dir=nowhere"], "nowhere"),
        (
            [f"--config={DIGITS}", "--config.training.batch_size=31", "--config.sharding.fsdp=2"],
            "config.sharding.fsdp = 2",
        ),
        ([f"--config={DIGITS}", "config.seed=1"], "config.seed=1"),
    ],
)
def test_train_refuses_within_ten_seconds(argv, message, tmp_path):
    """Of a processor, so that a busy machine changes nothing; and a compilation would be a second line."""
    before, environment = processor_seconds(), os.environ | {"JAX_LOG_COMPILES": "1"}
    result = run("train.py", *argv, f"--workdir={tmp_path / 'run'}", env=environment)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert processor_seconds() - before < 10
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_sample_refuses_a_folder_that_is_no_run(tmp_path):
    result = run("sample.py", f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}/config.json not found: {tmp_path} is not the workdir of a run\n"


@pytest.mark.parametrize("command", ["train.py", "sample.py"])
def test_help_is_worth_reading(command):
    result = run(command, "--help")
    assert result.returncode == 0
    assert "--workdir" in result.stdout and f"python {command}" in result.stdout


def test_a_workdir_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config, workdir = config_from_flags(["train.py", f"--config={DIGITS}", "--workdir=~/x"], "usage")
    assert workdir == tmp_path / "x"
    args = sample.parse_args(["--workdir=~/x", "--out=~/y", "--npz=~/z", "--init_image=~/i", "--mask_image=~/m"])
    given = [args.workdir, args.out, args.npz, args.init_image, args.mask_image]
    assert given == [str(tmp_path / name) for name in "xyzim"]
    args = evaluate.parse_args(["--workdir=~/x", "--out=~/y", "--weights=~/z"])
    assert [args.workdir, args.out, args.weights] == [str(tmp_path / name) for name in "xyz"]
    assert evaluate.parse_args(["--images=~/i"]).images == str(tmp_path / "i")
    assert export.parse_args(["--workdir=~/x", "--out=o"]).workdir == str(tmp_path / "x")


def test_one_line_errors_keeps_bugs_visible():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        np.float64(1) / 1 + 1 // 0


def test_config_errors_become_status_2(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise ConfigError("two\nlines")
    assert caught.value.code == 2 and capsys.readouterr().err == "error: two lines\n"


def test_what_may_go_better_another_time_becomes_status_1(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise ReadError("checkpoint 3 cannot be read now")
    assert caught.value.code == 1 and capsys.readouterr().err == "error: checkpoint 3 cannot be read now\n"
