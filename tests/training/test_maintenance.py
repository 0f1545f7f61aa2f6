"""A notice of maintenance is a SIGTERM: against a metadata server of our own."""

import signal
import time

import pytest

from jaxdiff.training.maintenance import HOST, maintenance_is_sigterm, metadata_host
from tests.metadata_server import metadata_server


@pytest.fixture
def received():
    """The signals that came."""
    signals = []
    old = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    yield signals
    signal.signal(signal.SIGTERM, old)


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name, quiet, notice",
    [("maintenance-event", "NONE", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "FALSE", "TRUE")],
)
def test_a_notice_is_one_sigterm(monkeypatch, received, capfd, name, quiet, notice):
    answers = {name: quiet}
    with metadata_server(answers) as (host, asked):
        monkeypatch.setenv(HOST, host)
        with maintenance_is_sigterm(seconds=0.01):
            wait_until(lambda: asked.count(name) >= 3)
            assert not received
            answers[name] = notice
            wait_until(lambda: received)
            count = len(asked)
            time.sleep(0.1)
        assert received == [signal.SIGTERM] and len(asked) == count
    assert f"announces the end of this machine ({name}: {notice})" in capfd.readouterr().err


def test_a_live_migration_and_a_server_that_fails_are_no_reason_to_stop(monkeypatch, received):
    """Answers with an error, whatever they say, and no answer at all do not count."""
    with metadata_server({"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}) as (host, asked):
        monkeypatch.setenv(HOST, host)
        with maintenance_is_sigterm(seconds=0.01):
            wait_until(lambda: asked.count("preempted") >= 3)
    monkeypatch.setenv(HOST, "localhost:9")
    with maintenance_is_sigterm(seconds=0.01):
        time.sleep(0.1)
    assert not received


def test_nobody_is_asked_after_the_end_nor_elsewhere_than_on_google_cloud(monkeypatch, received, tmp_path):
    monkeypatch.delenv(HOST, raising=False)
    monkeypatch.setattr("jaxdiff.training.maintenance.PRODUCT", tmp_path / "product_name")
    assert metadata_host() is None
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert metadata_host() == "metadata.google.internal"
    with metadata_server({"preempted": "FALSE"}) as (host, asked):
        monkeypatch.setenv(HOST, host)
        with maintenance_is_sigterm(seconds=0.01):
            wait_until(lambda: asked)
        time.sleep(0.1)
        count = len(asked)
        time.sleep(0.1)
        assert len(asked) == count
        del asked[:]
        monkeypatch.delenv(HOST)
        (tmp_path / "product_name").unlink()
        with maintenance_is_sigterm(seconds=0.01):
            time.sleep(0.1)
        assert not asked
