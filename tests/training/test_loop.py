"""The loop as its user meets it: it goes on where it stopped, to the bit, saves when told to stop, and refuses NaN."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxdiff.config import to_json
from jaxdiff.files import write_text
from jaxdiff.tasks.make import make_task
from jaxdiff.tasks.run import load_run
from jaxdiff.tasks.train import train_run
from jaxdiff.training import maintenance
from jaxdiff.training.checkpoints import Checkpoints, abstract_state
from jaxdiff.training.loop import NonFiniteLossError
from jaxdiff.training.sharding import fsdp_shardings, make_mesh
from tests.metadata_server import metadata_server
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
FORTY = {
    "training.num_steps": 40,
    "training.log_every": 10,
    "training.checkpoint_every": 17,
    "training.sample_every": 0,
}


def start(config, workdir):
    """A training process of its own, on one device."""
    program = (
        "import jax, json, sys, pathlib\n"
        "from jaxdiff.command_line import set_up_compilation_cache\n"
        "from jaxdiff.config import to_config\n"
        "from jaxdiff.tasks.train import train_run\n"
        "set_up_compilation_cache()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)\n"
        "outcome = train_run(to_config(json.loads(pathlib.Path(sys.argv[1]).read_text())), pathlib.Path(sys.argv[2]))\n"
        "sys.exit(3 if outcome.stopped_by else 0)\n"
    )
    path = workdir.parent / f"{workdir.name}.json"
    write_text(path, to_json(config))
    with log_of(workdir).open("a") as log:
        command = [sys.executable, "-c", program, str(path), str(workdir)]
        return subprocess.Popen(command, cwd=ROOT, stderr=log, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def log_of(workdir):
    """What the process said."""
    return workdir.parent / f"{workdir.name}.log"


def final_state(config, workdir):
    mesh = make_mesh(config.sharding, jax.devices()[:1])
    shapes = jax.eval_shape(make_task(config).trainable(mesh).init, jax.random.key(0))
    checkpoints = Checkpoints(workdir / "checkpoints")
    return checkpoints.restore_latest(abstract_state(shapes, fsdp_shardings(shapes, mesh)))


def wait_for(path, process, workdir):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, log_of(workdir).read_text()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 40 steps without interruption."""
    config, workdir = tiny_config(**FORTY), tmp_path_factory.mktemp("straight") / "run"
    process = start(config, workdir)
    assert process.wait(300) == 0, log_of(workdir).read_text()
    return config, workdir


def test_killed_and_resumed_is_bit_identical(straight, tmp_path):
    config, workdir = straight[0], tmp_path / "run"
    process = start(config, workdir)
    wait_for(workdir / "checkpoints" / "17", process, workdir)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert final_state(config, workdir)[0] < 40, "the run was over before it was killed: the test shows nothing"
    resumed = start(config, workdir)
    assert resumed.wait(300) == 0, log_of(workdir).read_text()
    (step, state), (_, expected) = final_state(config, workdir), final_state(config, straight[1])
    assert step == 40
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_metrics_after_a_resume_have_every_step_once(straight):
    records = [json.loads(line) for line in (straight[1] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [10, 17, 20, 30, 34, 40]
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)


@pytest.mark.parametrize("told_by", ["signal", "Google Cloud"])
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, told_by):
    config = tiny_config(**FORTY | {"training.num_steps": 100_000, "training.checkpoint_every": 100_000})
    workdir, answers = tmp_path / "run", {"maintenance-event": "NONE"}
    with metadata_server(answers) as (host, _):
        monkeypatch.setenv(maintenance.HOST, host)
        process = start(config, workdir)
        wait_for(workdir / "metrics.jsonl", process, workdir)
        while not (workdir / "metrics.jsonl").stat().st_size:
            time.sleep(0.005)
        if told_by == "signal":
            process.terminate()
        else:
            answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert process.wait(120) == 3, log_of(workdir).read_text()
    assert "SIGTERM: stopping after this step" in log_of(workdir).read_text()
    step, _ = final_state(config, workdir)
    assert 10 <= step < 100_000


def test_a_finished_run_leaves_everything_to_look_at(straight):
    _, workdir = straight
    assert (workdir / "samples" / "step_0000040.png").is_file()
    assert (workdir / "curves.png").is_file()
    assert list((workdir / "tensorboard").iterdir())
    run = load_run(workdir)
    assert run.step == 40 and run.class_names == tuple("0123456789")


def test_a_finished_run_does_nothing_when_started_again(straight):
    config, workdir = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    process = start(config, workdir)
    assert process.wait(120) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(**{
        "training.num_steps": 64, "training.checkpoint_every": 2, "training.log_every": 2, "training.sample_every": 0,
        "optimizer.learning_rate": 1e20, "optimizer.warmup_steps": 1, "optimizer.clip_norm": 0.0,
    })  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the loss is .*; the last good checkpoint is that of step"):
        train_run(config, tmp_path / "run")
    for step in Checkpoints(tmp_path / "run" / "checkpoints").steps():
        assert step < 64
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["loss"]) for record in records)
