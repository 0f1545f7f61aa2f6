"""One training a workdir: who comes second is told who is there, and the dead hold nothing."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from jaxdiff.config import ConfigError
from jaxdiff.training import lock
from jaxdiff.training.lock import holding


def write_holder(workdir, **changes):
    mine = {"host": socket.gethostname(), "pid": os.getppid(), "boot": lock._boot(), "since": "2026-01-01"}
    workdir.mkdir(exist_ok=True)
    (workdir / "lock").write_text(json.dumps(mine | changes))


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that knows no locks."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0.0)


def test_the_second_is_told_who_is_there(tmp_path):
    workdir = tmp_path / "runs" / "a"
    with holding(workdir):
        here = rf"a is in use: process {os.getpid()} on host {socket.gethostname()} \(since .*\) trains in it"
        with pytest.raises(ConfigError, match=here), holding(workdir):
            pass
        with pytest.raises(ConfigError, match=here), holding(workdir):  # the refused one has not taken the lock away
            pass
        with holding(tmp_path / "runs" / "b"):
            pass
    with holding(workdir):
        pass


def test_it_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), holding(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with holding(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_what_a_dead_process_left_is_taken_over(tmp_path, dead, capsys):
    for name in ("here", "elsewhere"):
        write_holder(tmp_path / name, pid=dead, host=name)  # the lock itself went with the process, wherever it was
        with holding(tmp_path / name):
            assert f"process {dead} on host {name}" in capsys.readouterr().err
            assert json.loads((tmp_path / name / "lock").read_text())["pid"] == os.getpid()


def test_a_record_that_was_not_written_to_its_end_is_no_holder(tmp_path, no_locks):
    (tmp_path / "lock").write_text('{"host": "a", "pi')
    with holding(tmp_path):
        pass


@pytest.mark.parametrize("pid", [10**20, 2**31, 0, -1, "1", None, 1.0])
def test_what_is_no_number_of_a_process_is_no_holder(tmp_path, no_locks, pid):
    write_holder(tmp_path, pid=pid)
    with holding(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_record_that_is_nested_too_deeply_is_no_holder(tmp_path, no_locks):
    (tmp_path / "lock").write_text("[" * 100_000)
    with holding(tmp_path):
        pass


def test_without_locks_the_living_are_respected(tmp_path, no_locks):
    write_holder(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getppid()} on host {socket.gethostname()}"), holding(tmp_path):
        pass


def test_without_locks_another_host_is_respected(tmp_path, no_locks, dead):
    write_holder(tmp_path, host="far-away", pid=dead)
    message = rf"process {dead} on host far-away .* \(if that is certainly over, delete {tmp_path / 'lock'}\)"
    with pytest.raises(ConfigError, match=message), holding(tmp_path):
        pass


def test_without_locks_of_two_that_start_together_one_goes_on(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(
        lock.time, "sleep", lambda seconds: write_holder(tmp_path)
    )  # the other has found nobody, either
    with pytest.raises(ConfigError, match=rf"in use: process {os.getppid()} on host"), holding(tmp_path):
        pass
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getppid(), "the other keeps it"


def test_without_locks_the_dead_are_recognised(tmp_path, no_locks, dead):
    write_holder(tmp_path, pid=dead)
    with holding(tmp_path):
        pass
    write_holder(tmp_path, boot="before the reboot")
    with holding(tmp_path):
        pass
    write_holder(tmp_path, pid=os.getpid())  # in a container that was started anew every number comes again
    with holding(tmp_path):
        pass
