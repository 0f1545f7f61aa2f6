"""Several processes of one run, one a host or a GPU: joining them, what the first does alone, and what becomes of a lost one.

JAX's own runtime does the work (`jax.distributed` and XLA's collectives): every process runs the same program on its share of
the devices. Here is what surrounds that.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from jaxdiff.config import ConfigError

Number = TypeVar("Number", bool, int)

HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as lost and JAX ends all the others
MEETING_SECONDS = 3600  # that a process waits until the others have compiled, too
LAST_WORDS_SECONDS = 3  # process 0, which all are connected to, ends last: each can say what it found wrong
LOST_STATUS = 1
SIGNS_OF_A_LOSS = ("Gloo", "NCCL", "heartbeat", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # in errors


class JoinError(RuntimeError):
    """The other processes of a run could not be reached: they may be at another time."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of a run; what is None the launcher knows, or there is one process only."""

    coordinator: str | None = None  # host:port at which process 0 waits for the others
    process_id: int | None = None
    num_processes: int | None = None


def check_place(place: Place) -> None:
    """Raise ConfigError for a place that cannot be."""
    given = {f"--{name}": value for name, value in dataclasses.asdict(place).items()}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given) and not launcher():
        have = " and ".join(name for name in given if name not in missing)
        raise ConfigError(f"{have}: without {' and '.join(missing)} nobody knows which process this is of how many")
    if place.num_processes is not None and place.num_processes < 1:
        raise ConfigError(f"--num_processes {place.num_processes}: must be at least 1")
    if place.process_id is not None and place.process_id < 0:
        raise ConfigError(f"--process_id {place.process_id}: processes are numbered from 0")
    if None not in (place.process_id, place.num_processes) and place.process_id >= place.num_processes:  # type: ignore[operator]
        raise ConfigError(f"--process_id {place.process_id}: must be below --num_processes {place.num_processes}")
    if place.coordinator is not None:
        host, _, port = place.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"--coordinator {place.coordinator}: must be the host of process 0 and a free port there, as in 10.0.0.1:1234"
            )


def launcher() -> str | None:
    """What started several processes that JAX can tell apart by itself; None where there is nothing of the kind."""
    variables = os.environ
    if "SLURM_STEP_NODELIST" in variables and "SLURM_PROCID" in variables and _many("SLURM_NTASKS"):
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in variables and _many("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    return "Cloud TPU" if _on_tpu_slice() else None


def _many(variable: str) -> bool:
    value = os.environ.get(variable, "1")
    return value.isdecimal() and int(value) > 1


def _on_tpu_slice() -> bool:
    """Whether this is a Cloud TPU host that may have others beside it."""
    platforms = jax.config.values["jax_platforms"]
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or importlib.util.find_spec("libtpu") is None or (platforms and "tpu" not in platforms):
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    return hosts is None or "," in hosts  # where no variable says it, JAX asks the metadata server


def join(place: Place, saves: bool = False) -> None:
    """Join the other processes of the run, if there are any. Must come before JAX's first computation.

    From then on only process 0 says what goes on; warnings and errors come from all. `saves`: SIGTERM goes to JAX's preemption
    service, by which training ends with a checkpoint; else it ends the process, as usual. Raises ConfigError, and JoinError.
    """
    check_place(place)
    found = launcher()
    if place.num_processes == 1 or (place.coordinator is None and found is None):
        if place.coordinator is None and _many("OMPI_COMM_WORLD_SIZE"):
            raise ConfigError(
                "this Open MPI does not say where process 0 is: give --coordinator HOST:PORT --process_id "
                "$OMPI_COMM_WORLD_RANK --num_processes $OMPI_COMM_WORLD_SIZE"
            )
        return
    if place.coordinator is not None and place.process_id == 0:
        _check_port(place.coordinator)
    try:
        jax.distributed.initialize(
            place.coordinator, place.num_processes, place.process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        wrong = isinstance(error, ValueError) and not _tells_of_a_loss(error)
        raise (ConfigError if wrong else JoinError)(
            f"the other processes of the run cannot be joined ({found or place.coordinator}): {error}"
        ) from error
    if not saves:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _check_port(coordinator: str) -> None:
    """Raise ConfigError where another program listens: JAX would share the port with it, and wait for ever."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--coordinator {coordinator}: process 0 cannot listen there ({reason})") from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agreed(value: Number) -> Number:
    """What the first process says (of 32 bits); every process must ask. Files and memory may look different from another host."""
    from jax.experimental import multihost_utils

    return type(value)(multihost_utils.broadcast_one_to_all(value)) if jax.process_count() > 1 else value


def meet(name: str) -> None:
    """Wait until all processes have come to the meeting of that name, which there may be once.

    One takes longer to compile than another, and where they then connect for a first collective, a CPU gives up after 30 seconds.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * MEETING_SECONDS)


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
    """Around all that a process does: where it ends by an error, so do the others, now and not when they are tired of waiting.

    A status of 0 is no error.
    """
    try:
        with noticing_a_loss():
            yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or (isinstance(error, SystemExit) and not error.code):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        _leave(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


@contextlib.contextmanager
def noticing_a_loss() -> Iterator[None]:
    """Around what all processes do together: end this one, with a line, when another does not answer.

    Neither steps nor checkpoints can be made without it; what else would be done on the way out would wait for it.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # what XLA says comes as either
        if not jax.distributed.is_initialized() or not _tells_of_a_loss(error):
            raise
        reason = " ".join(str(error).split())[:300]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends, for another one was lost ({reason}): start "
            "all of them again; a training goes on from its last checkpoint",
            file=sys.stderr,
        )
        _leave(LOST_STATUS)


def _tells_of_a_loss(error: Exception) -> bool:
    return any(sign in str(error) for sign in SIGNS_OF_A_LOSS)


def _leave(status: int) -> None:
    """End at once, without the farewell for which all processes would have to be there."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(status)
