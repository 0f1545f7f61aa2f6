"""What Google Cloud says of maintenance, turned into the SIGTERM that every other scheduler sends.

A machine that is deleted or preempted is shut down, and its programs get SIGTERM. Of maintenance that it does not survive
running (a TPU or a GPU is not moved while it works) only the metadata server tells, minutes before, as
`instance/maintenance-event`; of a preemption it tells before the shutdown begins, as `instance/preempted`.
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator

HOST = "GCE_METADATA_HOST"  # the variable by which Google's libraries, too, are told of another metadata server
NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
POLL_SECONDS = 5.0
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")


def metadata_host() -> str | None:
    """Host of the metadata server; None on a machine that is not Google's, which has none to be asked."""
    if host := os.environ.get(HOST):
        return host
    try:
        return "metadata.google.internal" if "Google" in PRODUCT.read_text() else None
    except OSError:
        return None


@contextlib.contextmanager
def maintenance_is_sigterm(seconds: float = POLL_SECONDS) -> Iterator[None]:
    """Send this process SIGTERM, once, when the metadata server announces its end. Asks every so many seconds, in a thread.

    Does nothing elsewhere than on Google Cloud, nor outside the main thread, where nobody listens to signals.
    """
    host, over = metadata_host(), threading.Event()
    if host is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    listener = threading.Thread(target=_listen, args=(host, over, seconds), name="maintenance", daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()


def _listen(host: str, over: threading.Event, seconds: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine's own network
    while not over.wait(seconds):
        for name, notice in NOTICES.items():
            said = _ask(opener, f"http://{host}/computeMetadata/v1/instance/{name}", seconds)
            if said == notice and not over.is_set():
                print(f"\nGoogle Cloud announces the end of this machine ({name}: {said})", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _ask(opener: urllib.request.OpenerDirector, url: str, seconds: float) -> str:
    """The server's answer; nothing if it does not answer, which is no reason to stop."""
    try:
        with opener.open(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=seconds) as answer:
            return answer.read(100).decode("ascii", "replace").strip()
    except OSError:
        return ""
