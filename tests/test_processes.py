"""Runs of several processes, as a user starts them: over loopback, with simulated CPU devices."""

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

from jaxdiff.command_line import one_line_errors, process_flags
from jaxdiff.config import ConfigError, to_json
from jaxdiff.files import write_text
from jaxdiff.tasks.progressive_gan import resolve_length
from jaxdiff.training import processes
from jaxdiff.training.log import read_metrics
from jaxdiff.training.processes import Place, check_place, launcher
from tests.tasks.test_progressive_gan import GAN
from tests.tiny import tiny_config
from tests.training.test_loop import final_state
from tests.training.test_sharding import relative_distance

ROOT = pathlib.Path(__file__).parent.parent
LAUNCHERS = ("SLURM_", "OMPI_", "TPU_")
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TINY = {
    "model.num_classes": -1,
    "training.num_steps": 6,
    "training.log_every": 1,
    "training.checkpoint_every": 3,
    "training.sample_every": 0,
    "sampling.num_images": 6,
}
FIVE = {"five on four": (2, 2), "five on one": (1, 1)}  # processes, devices of each


@pytest.fixture
def nowhere(monkeypatch):
    """An environment in which nothing has launched this process."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    return monkeypatch


# What may be said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("localhost:1234"), "--coordinator: without --process_id and --num_processes nobody knows"),
        (Place(None, 0, 2), "--process_id and --num_processes: without --coordinator"),
        (Place("localhost:1234", 2, 2), "--process_id 2: must be below --num_processes 2"),
        (Place("localhost:1234", -1, 2), "--process_id -1: processes are numbered from 0"),
        (Place("localhost:1234", 0, 0), "--num_processes 0: must be at least 1"),
        (Place("localhost", 0, 2), "--coordinator localhost: must be the host of process 0 and a free port"),
        (Place("localhost:no", 0, 2), "--coordinator localhost:no: must be"),
        (Place(":1234", 0, 2), "--coordinator :1234: must be"),
        (Place("localhost:123456", 0, 2), "--coordinator localhost:123456: must be"),
    ],
)
def test_a_place_that_cannot_be_is_refused(nowhere, place, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_place(place)


def test_one_process_joins_nobody(nowhere):
    processes.join(Place())
    processes.join(Place("localhost:1234", 0, 1))
    assert not jax.distributed.is_initialized()


def test_launchers_are_told_by_their_variables(nowhere):
    assert launcher() is None
    slurm = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1", "SLURM_NTASKS": "1"}
    for name, value in slurm.items():
        nowhere.setenv(name, value)
    assert launcher() is None, "one task of SLURM's is a single process"
    nowhere.setenv("SLURM_NTASKS", "2")
    assert launcher() == "SLURM"
    check_place(Place())
    nowhere.delenv("SLURM_PROCID")
    nowhere.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert launcher() is None
    with pytest.raises(ConfigError, match="this Open MPI does not say where process 0 is: give --coordinator"):
        processes.join(Place())
    nowhere.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    assert launcher() == "Open MPI"


def test_a_port_that_is_taken_is_refused(nowhere):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--coordinator localhost:{port}: process 0 cannot listen there"):
            processes.join(Place(f"localhost:{port}", 0, 2))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("Number of processes must be defined."), 2),
        (ValueError("UNAVAILABLE: failed to connect to all addresses"), 1),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), 1),
        (ConnectionRefusedError("Connection refused"), 1),
        (KeyError("SLURM_LOCALID"), 1),
    ],
    ids=repr,
)
def test_only_wrong_arguments_are_told_a_supervisor_as_hopeless(nowhere, error, status, capsys):
    def initialize(*_, **__):
        raise error

    nowhere.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        processes.join(Place("localhost:1234", 1, 2))
    told = capsys.readouterr().err
    assert caught.value.code == status
    assert told == f"error: the other processes of the run cannot be joined (localhost:1234): {error}\n"


def test_process_flags_are_taken_out_of_the_others():
    argv = [
        "train.py",
        "--config=x.py",
        "--coordinator",
        "a:1",
        "--config.seed=3",
        "--process_id=1",
        "--num_processes=2",
    ]
    args, rest = process_flags(argv)
    assert (args.coordinator, args.process_id, args.num_processes) == ("a:1", 1, 2)
    assert rest == ["train.py", "--config=x.py", "--config.seed=3"]
    with pytest.raises(ConfigError, match="--process_id: invalid int value: 'one'"):
        process_flags(["train.py", "--process_id=one"])


# Real processes --------------------------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(script, argv, count, devices, log):
    """`count` processes of one command, each with so many devices of a CPU."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": QUICK_TO_COMPILE}
    place = f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"
    found = []
    for number in range(count):
        flags = [*place, f"--process_id={number}"] if count > 1 else []
        with pathlib.Path(f"{log}.{number}").open("w") as file:
            command = [sys.executable, script, *argv, *flags]
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return found


def said(log, number=0):
    return pathlib.Path(f"{log}.{number}").read_text()


def run(script, argv, count, devices, log):
    """Run such processes to their end; what each said."""
    started = start(script, argv, count, devices, log)
    try:
        for number, process in enumerate(started):
            assert process.wait(300) == 0, said(log, number)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [said(log, number) for number in range(count)]


def config_file(folder, **changes):
    """A config file as train.py reads it."""
    write_text(folder / "tiny.json", to_json(tiny_config(**TINY | changes)))
    lines = [
        "import json, pathlib",
        "from ml_collections import ConfigDict",
        "def get_config():",
        f"    return ConfigDict(json.loads(pathlib.Path({str(folder / 'tiny.json')!r}).read_text()))",
    ]
    write_text(folder / "tiny.py", "\n".join(lines) + "\n")
    return folder / "tiny.py"


def losses(workdir):
    return [record["loss"] for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]


def train(folder, name, count, devices, *flags):
    """Train the folder's config by the command; the workdir, and what each process said."""
    argv = [f"--config={folder / 'tiny.py'}", f"--workdir={folder / name}", *flags]
    return folder / name, run("train.py", argv, count, devices, folder / f"{name}.log")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Six steps of one process with one device: config and workdir are in the folder."""
    folder = tmp_path_factory.mktemp("processes")
    config_file(folder)
    train(folder, "alone", 1, 1)
    return folder


@pytest.fixture(scope="module")
def two(alone):
    """The same by two processes of two devices each, with parameters that are split over them."""
    return train(alone, "two", 2, 2, "--config.sharding.fsdp=4", "--config.training.sample_every=3")


@pytest.mark.slow
def test_two_processes_with_fsdp_are_the_same_run(alone, two):
    workdir, texts = two
    np.testing.assert_allclose(losses(workdir), losses(alone / "alone"), rtol=1e-5)
    assert [record["step"] for record in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert "4 x cpu (jit, data 1, fsdp 4), 2 processes" in texts[0]
    assert "data   " not in texts[1] and "step/s" not in texts[1], "only the first process says what goes on"
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["step_0000003.png", "step_0000006.png"]
    assert (workdir / "samples/step_0000006.png").read_bytes() == next(
        (alone / "alone" / "samples").glob("*6.png")
    ).read_bytes()
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    steps = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]
    assert sorted(steps) == ["3", "6"]


@pytest.mark.slow
def test_four_processes_are_the_same_run(alone):
    workdir, _ = train(alone, "four", 4, 1)
    np.testing.assert_allclose(losses(workdir), losses(alone / "alone"), rtol=1e-5)


@pytest.mark.slow
def test_processes_that_do_not_divide_the_batch_are_the_same_run(alone):
    """Five images on two processes of two devices: the second has one, and repeats of what the first has."""
    runs = {name: train(alone, name, *where, "--config.training.batch_size=5") for name, where in FIVE.items()}
    np.testing.assert_allclose(losses(runs["five on four"][0]), losses(runs["five on one"][0]), rtol=1e-5)
    assert "6 steps of 5 images (and 3 repeated with weight 0, for all devices" in runs["five on four"][1][0]
    assert "6 steps of 5 images, seed" in runs["five on one"][1][0]


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_devices_and_sharding(alone, two):
    """Two steps by two processes with FSDP, two by one device, two by four processes without FSDP: the same losses."""
    for steps, count, devices, fsdp in ((2, 2, 2, 4), (4, 1, 1, 1), (6, 4, 1, 1)):  # as the other tests: compiled once
        workdir, texts = train(
            alone, "elastic", count, devices, f"--config.training.num_steps={steps}", f"--config.sharding.fsdp={fsdp}"
        )
        assert steps == 2 or f"going on from step {steps - 2}\n" in texts[0]
    np.testing.assert_allclose(losses(workdir), losses(alone / "alone"), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_make_and_score_the_images_of_one(alone, two):
    folder = alone
    for count in (1, 2):
        out = folder / f"images{count}"
        flags = [f"--workdir={folder / 'alone'}", "--num=7", "--seed=3", "--batch_per_device=2"]
        run("sample.py", [*flags, f"--out={out}"], count, 1, folder / "sample.log")
        flags = [f"--workdir={folder / 'alone'}", "--num=9", "--metrics=bpd", "--ode_steps=2"]
        run("evaluate.py", [*flags, f"--out={folder / f'scores{count}'}"], count, 1, folder / "evaluate.log")
    images = [{p.name: p.read_bytes() for p in (folder / f"images{count}").iterdir()} for count in (1, 2)]
    assert images[0] == images[1] and len(images[0]) == 7
    assert (folder / "images1_grid.png").read_bytes() == (folder / "images2_grid.png").read_bytes()
    found = [json.loads((folder / f"scores{count}" / "results.json").read_text()) for count in (1, 2)]
    assert len(found[0]) == len(found[1]) == 1
    values = [{score["name"]: score["value"] for score in entries[0]["scores"]} for entries in found]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and set(values[0]) == {"bpd_bound", "bpd_ode"}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_process_is_killed_the_others_end_and_the_run_goes_on(alone, lost):
    name = f"lost{lost}"
    argv = [f"--config={alone / 'tiny.py'}", f"--workdir={alone / name}", "--config.sharding.fsdp=4"]
    log = alone / f"{name}.log"
    started = start("train.py", [*argv, "--config.training.num_steps=1000000"], 2, 2, log)
    try:
        deadline = time.monotonic() + 240
        while not (alone / name / "checkpoints" / "6").exists():
            assert all(process.poll() is None for process in started), said(log) + said(log, 1)
            assert time.monotonic() < deadline, "no checkpoint ever came"
            time.sleep(0.05)
        started[lost].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        status = started[1 - lost].wait(60)
        assert time.monotonic() - killed < 60
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert status not in (0, 2)
    text = said(log, 1 - lost)
    assert "for another one was lost" in text or "another task died" in text, text
    before = [int(path.name) for path in (alone / name / "checkpoints").iterdir() if path.name.isdecimal()]
    more = max(before) + 2
    _, texts = train(alone, name, 2, 2, "--config.sharding.fsdp=4", f"--config.training.num_steps={more}")
    assert f"going on from step {max(before)}\n" in texts[0]
    assert [record["step"] for record in read_metrics(alone / name / "metrics.jsonl")] == list(range(1, more + 1))
    np.testing.assert_allclose(losses(alone / name)[:6], losses(alone / "alone"), rtol=1e-5)


GROWING = {
    **GAN,
    "progressive_gan.stddev_parts": 8,
    "optimizer.epsilon": 1e-3,  # else a gradient that is nearly 0 makes as large a step as any
}


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """A GAN's config, and its run through a fade by two processes of four devices each."""
    folder = tmp_path_factory.mktemp("growing")
    config_file(folder, **GROWING)
    train(folder, "two", 2, 4)
    return folder


def networks(folder, name):
    """Step and networks of a run's last checkpoint."""
    step, state = final_state(resolve_length(tiny_config(**TINY | GROWING)), folder / name)
    return step, (state.params, state.ema_params, state.discriminator_params)


@pytest.mark.slow
def test_two_processes_grow_as_one_does(growing):
    train(growing, "alone", 1, 1)
    (step, two), (alone_step, alone) = networks(growing, "two"), networks(growing, "alone")
    np.testing.assert_allclose(losses(growing / "two"), losses(growing / "alone"), rtol=1e-3, atol=1e-4)
    assert step == alone_step == 14 and relative_distance(two, alone) < 1e-5
    alphas = [record["alpha"] for record in read_metrics(growing / "two" / "metrics.jsonl") if "alpha" in record]
    assert alphas[0] == alphas[-1] == 1 and min(alphas) < 1


@pytest.mark.slow
def test_two_processes_that_stop_in_a_fade_go_on_bit_for_bit(growing):
    train(growing, "stopped", 2, 4, "--config.progressive_gan.total_kimg=0.128")
    alphas = [record["alpha"] for record in read_metrics(growing / "stopped" / "metrics.jsonl") if "alpha" in record]
    assert 0 < alphas[-1] < 1, "this was to be in a fade"
    _, texts = train(growing, "stopped", 2, 4)
    assert "going on from step 8\n" in texts[0]
    (step, resumed), (_, straight) = networks(growing, "stopped"), networks(growing, "two")
    assert step == 14
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.slow
def test_a_mistake_that_all_processes_find_is_a_line_and_status_2(alone):
    argv = [f"--config={alone / 'tiny.py'}", f"--workdir={alone / 'wrong'}", "--config.sharding.fsdp=3"]
    started = start("train.py", argv, 2, 2, alone / "wrong.log")
    assert [process.wait(120) for process in started] == [2, 2], said(alone / "wrong.log", 0) + said(
        alone / "wrong.log", 1
    )
    for number in range(2):
        assert "error: config.sharding.fsdp = 3 must divide the number of devices, 4" in said(
            alone / "wrong.log", number
        )
    assert not (alone / "wrong").exists()
