"""One training a workdir: a lock that tells who holds it, and that ends with its holder.

The operating system takes its lock (flock) off the file `lock` when the process ends in whatever way, by a kill or a reboot, too.
Where a file system knows no locks, what the holder wrote into the file has to do.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxdiff.config import ConfigError
from jaxdiff.files import parse_json
from jaxdiff.training.processes import is_first

NAME = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say

SETTLING_SECONDS = 1.0  # after which two that started together have both written, where nothing locks


@contextlib.contextmanager
def holding(workdir: pathlib.Path) -> Iterator[None]:
    """Be the only run in a workdir. Raises ConfigError naming host and process of the one that is there already.

    Of several processes of one run the first holds the lock, and either all enter or none does.
    """
    problem, descriptor = "", None
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _acquire(workdir)
        except ConfigError as error:
            problem = str(error)
    if jax.process_count() > 1 and not bool(multihost_utils.broadcast_one_to_all(not problem)):
        problem = problem or "process 0 cannot have the workdir for this run: it says why"
    if problem:
        raise ConfigError(problem)
    try:
        yield
    finally:
        if descriptor is not None:
            (workdir / NAME).unlink(missing_ok=True)  # while it is held, so that it is nobody else's
            os.close(descriptor)
            with contextlib.suppress(OSError):  # unless something was written there
                for folder in new:
                    folder.rmdir()


def _acquire(workdir: pathlib.Path) -> int:
    """The descriptor that holds the lock as long as it is open. Raises ConfigError."""
    path = workdir / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _is_held(descriptor):
            raise _refusal(workdir, descriptor)
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # its holder has removed it between the opening and the locking
    if before := _read(descriptor):
        print(f"note: {_told(before)} ended without a farewell: going on in its place", file=sys.stderr)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "since": time.strftime("%F %T %z")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
    if not _knows_locks(descriptor):  # two that found nobody have both written: who wrote last has it
        os.fsync(descriptor)
        time.sleep(SETTLING_SECONDS)
        again = os.open(path, os.O_RDONLY)
        if _read(again) != mine:
            os.close(descriptor)
            raise _refusal(workdir, again)
        os.close(again)
    return descriptor


def _refusal(workdir: pathlib.Path, descriptor: int) -> ConfigError:
    """What to say to the second one. Closes the file."""
    holder = _read(descriptor)
    os.close(descriptor)
    elsewhere = holder and holder.get("host") != socket.gethostname()
    hint = f" (if that is certainly over, delete {workdir / NAME})" if elsewhere else ""
    return ConfigError(
        f"{workdir} is in use: {_told(holder)} trains in it; wait for it, or give another --workdir{hint}"
    )


def _knows_locks(descriptor: int) -> bool:
    """Whether the lock of an open file that is ours is the system's."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_held(descriptor: int) -> bool:
    """Lock an open file, unless another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return not _is_over(_read(descriptor))
    return False


def _read(descriptor: int) -> dict[str, Any]:
    """Who wrote the file; empty where nobody did, or not to the end, or what is no record of a process."""
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    number = holder.get("pid") if isinstance(holder, dict) else None
    return holder if isinstance(number, int) and 0 < number < 2**31 else {}


def _told(holder: dict[str, Any]) -> str:
    known = f"process {holder.get('pid')} on host {holder.get('host')} (since {holder.get('since')})"
    return known if holder else "another process"


def _is_over(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to have ended; of another host that cannot be seen."""
    if not holder:
        return True
    if holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") != _boot():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # there is one, of another user
        return False
    return holder["pid"] == os.getpid()  # which is not in it now: the number was given anew, as in containers


def _boot() -> str:
    """What is another after every reboot; empty where the system does not tell."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
