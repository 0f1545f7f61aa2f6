"""train.py as its user starts it is killed again and again, and runs out of disk: nothing that was saved is lost or wrong.

JAXDIFF_KILLS says how often it is killed (default 12).
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxdiff.tasks.make import make_task
from jaxdiff.tasks.run import load_run, read_config
from jaxdiff.training.checkpoints import Checkpoints, abstract_state
from jaxdiff.training.checksums import find_damage
from jaxdiff.training.sharding import fsdp_shardings, make_mesh

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("JAXDIFF_KILLS", "12"))
EVERY = 3  # steps between checkpoints: one is being written nearly all the time
SMALL = {
    "model.channels": 16,
    "model.channel_multipliers": "(1,)",
    "model.num_res_blocks": 1,
    "training.batch_size": 8,
    "training.log_every": 1,
    "training.sample_every": 0,
    "training.checkpoint_every": EVERY,
    "training.keep_checkpoints": 2,
    "sampling.steps": 2,
    "sampling.num_images": 1,
    "sampling.batch_per_device": 1,
}


def command(workdir, steps, **changes):
    options = SMALL | {"training.num_steps": steps} | changes
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    return [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={workdir}", *flags]


@contextlib.contextmanager
def running(workdir, steps, log, **changes):
    """A training process, on one device; ended at the latest with the block."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command(workdir, steps, **changes), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def two_running(workdir, steps, log):
    """A run of two processes with a device each: the processes, and how to read what the first said."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    place = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    started = []
    for number in range(2):
        with log.with_suffix(f".{number}").open("w") as file:
            arguments = [*command(workdir, steps), *place, f"--process_id={number}"]
            started.append(
                subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
            )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def train_to_the_end(workdir, steps, log, **changes):
    with running(workdir, steps, log, **changes) as process:
        assert process.wait(600) == 0, log.read_text()


def wait_until(condition, process, log, pause=0.02):
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(pause)


def steps_in(folder):
    """Steps that have a folder by their name: their saves were finished."""
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal()) if folder.is_dir() else []


def losses(workdir):
    """(step, loss) of every line of metrics.jsonl; a last line that was not written to its end does not count."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def final_state(workdir):
    config, mesh = read_config(workdir), make_mesh(read_config(workdir).sharding, jax.devices()[:1])
    shapes = jax.eval_shape(make_task(config).trainable(mesh).init, jax.random.key(0))
    return Checkpoints(workdir / "checkpoints").restore_latest(abstract_state(shapes, fsdp_shardings(shapes, mesh)))


def wait_for_the_moment(kind, workdir, process, log, random, startup):
    """Wait for a random moment of a kind."""
    folder = workdir / "checkpoints"
    if kind == "starting":  # reading, compiling, clearing up after the kill before
        time.sleep(random.uniform(0, startup))
        return
    logged = (workdir / "metrics.jsonl").stat().st_mtime_ns if (workdir / "metrics.jsonl").exists() else 0
    begun = "going on from step" if steps_in(folder) else "training"
    wait_until(lambda: begun in log.read_text(), process, log)
    wait_until(
        lambda: (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").stat().st_mtime_ns > logged,
        process,
        log,
    )
    if kind == "training":
        time.sleep(random.uniform(0, 1.0))
    elif kind == "saving":
        wait_until(lambda: any("tmp" in name for name in os.listdir(folder)), process, log, 0.001)
        time.sleep(random.uniform(0, 0.03))
    else:
        wait_until(lambda: held_in_a_deletion(folder, process, log, random), process, log)


def held_in_a_deletion(folder, process, log, random):
    """Stop the process when an old checkpoint loses its first file; whether a part was still there. Else it goes on."""
    wait_until(lambda: steps_in(folder), process, log)
    oldest = folder / str(steps_in(folder)[0])
    whole = entries(oldest)
    wait_until(lambda: entries(oldest) < whole or not oldest.is_dir(), process, log, 0.0002)
    time.sleep(random.uniform(0, 0.0005))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until it stands still
    if what_was_hit(folder) == "a deletion":
        return True
    process.send_signal(signal.SIGCONT)
    return False


def entries(folder):
    return len(os.listdir(folder)) if folder.is_dir() else 0


def what_was_hit(folder):
    """What the kill interrupted, as the folder shows it."""
    if not folder.is_dir():
        return "nothing yet"
    if any("tmp" in name for name in os.listdir(folder)):
        return "a save"
    items = ("step", "params", "ema_params", "opt_state")
    steps = steps_in(folder)
    if any(
        find_damage(folder / str(step), items) or not (folder / str(step) / "checksums.json").exists() for step in steps
    ):
        return "a deletion"
    return "a deletion to come" if len(steps) > SMALL["training.keep_checkpoints"] else "between saves"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed KILLS times and then left alone, and what was seen of it."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    random, hits, startup = np.random.default_rng(0), [], 5.0
    for number in range(KILLS):
        log, finished = workdir.parent / f"{number}.log", steps_in(workdir / "checkpoints")
        kind = ("training", "saving", "deleting", "starting")[number % 4]
        started = time.monotonic()
        with running(workdir, 10**6, log) as process:
            wait_for_the_moment(kind, workdir, process, log, random, startup)
            assert process.poll() is None, log.read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
        if number == 0:
            startup = time.monotonic() - started
        hits.append((kind, what_was_hit(workdir / "checkpoints")))
        said = log.read_text()
        went_on = re.search(r"going on from step (\d+)", said)
        assert "Traceback" not in said and "cannot be read" not in said and "error" not in said, said
        if went_on:  # the newest finished save, and no other
            assert finished and int(went_on[1]) == finished[-1], (went_on, finished)
        elif kind != "starting":
            assert not finished, said
        if kind != "starting" and steps_in(workdir / "checkpoints"):
            # Of what was trained at most the save under way and the one that waits for it are lost.
            lost = losses(workdir)[-1][0] - steps_in(workdir / "checkpoints")[-1]
            assert 0 <= lost <= 2 * EVERY, lost
    newest = steps_in(workdir / "checkpoints")[-1]
    last = newest + 2 * EVERY
    train_to_the_end(workdir, last, workdir.parent / "last.log")
    return workdir, last, hits


def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(killed, tmp_path):
    workdir, last, hits = killed
    print(f"{len(hits)} kills, {last} steps:", {hit: hits.count(hit) for hit in sorted(set(hits))})
    train_to_the_end(tmp_path / "straight", last, tmp_path / "log", **{"training.checkpoint_every": 10**6})
    (step, state), (step2, expected) = final_state(workdir), final_state(tmp_path / "straight")
    assert step == step2 == last
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert losses(workdir) == losses(tmp_path / "straight")


def test_the_kills_hit_saves_and_deletions(killed):
    hits = killed[2]
    assert "a save" in {hit for _, hit in hits}, hits
    assert {hit for kind, hit in hits if kind == "deleting"} == {"a deletion"}, hits


def test_killed_run_is_clean_again(killed):
    workdir = killed[0]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        str(step) for step in steps_in(workdir / "checkpoints")
    ]
    assert len(steps_in(workdir / "checkpoints")) == 2
    assert not (workdir / "lock").exists() and not (workdir / "damaged_checkpoints").exists()
    assert load_run(workdir).step == killed[1]


def test_the_second_training_in_a_workdir_is_refused_and_a_stop_is_told(tmp_path):
    log, workdir = tmp_path / "log", tmp_path / "run"
    with running(workdir, 10**6, log) as process:
        wait_until(lambda: len(steps_in(workdir / "checkpoints")) > 1, process, log)
        second = subprocess.run(command(workdir, 10**6), cwd=ROOT, capture_output=True, text=True, timeout=600)
        process.terminate()
        assert process.wait(600) == 128 + signal.SIGTERM
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"error: {workdir} is in use: process {process.pid} on host ")
    step = re.search(r"stopped by SIGTERM at step (\d+), all is saved", log.read_text())
    assert step and int(step[1]) == steps_in(workdir / "checkpoints")[-1] == losses(workdir)[-1][0]


@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_told_to_one_of_two_processes_saves_a_common_step(tmp_path, told, kind):
    if told == 0 and kind == signal.SIGINT:
        pytest.skip("the other three say enough")
    log, workdir = tmp_path / "log", tmp_path / "run"
    with two_running(workdir, 10**6, log) as processes:
        wait_until(lambda: len(steps_in(workdir / "checkpoints")) > 1, processes[0], log.with_suffix(".0"))
        processes[told].send_signal(kind)
        statuses = [process.wait(600) for process in processes]
    said = log.with_suffix(".0").read_text() + log.with_suffix(".1").read_text()
    assert statuses[told] == 128 + kind and statuses[1 - told] == 128 + signal.SIGTERM, said
    assert "Traceback" not in said, said
    newest = steps_in(workdir / "checkpoints")[-1]
    assert losses(workdir)[-1][0] == newest
    assert not (workdir / "lock").exists()
    train_to_the_end(workdir, newest + 1, log)  # and one process goes on with what two have saved
    assert f"going on from step {newest}" in log.read_text()
    assert [step for step, _ in losses(workdir)] == list(range(1, newest + 2))


def test_a_damaged_checkpoint_costs_no_more_than_its_steps(killed, tmp_path):
    workdir, last, _ = killed
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    newest, before = copy / "checkpoints" / str(last), steps_in(copy / "checkpoints")[0]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    train_to_the_end(copy, last, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert said.count("cannot be read") == 1 and f"going on from step {before}" in said
    assert (copy / "damaged_checkpoints" / f"{last}.0" / largest.relative_to(newest)).read_bytes() == content
    for ours, theirs in zip(jax.tree.leaves(final_state(copy)), jax.tree.leaves(final_state(workdir)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB; where none may be mounted the test is skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_told_in_one_line_and_leaves_the_older_checkpoints(small_disk, tmp_path):
    workdir, log = small_disk / "run", tmp_path / "log"
    keep_all = {"training.keep_checkpoints": 1000}
    with running(workdir, 10**6, log, **keep_all) as process:
        assert process.wait(600) == 1, log.read_text()
    said = log.read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said and len(errors) == 1 and "No space left on device" in errors[0], said
    whole = steps_in(workdir / "checkpoints")
    assert len(whole) > 1 and f"the newest there is that of step {whole[-1]}" in errors[0], (whole, errors)
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    train_to_the_end(workdir, whole[-1] + EVERY, log, **keep_all)
    assert f"going on from step {whole[-1]}" in log.read_text()
