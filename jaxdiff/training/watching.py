"""How fast a run goes and what holds it up, and a trace of a few of its steps.

Nothing here asks the devices for anything while steps are under way: the loop reads its metrics now and then, which waits for
them, and only then is the time taken.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxdiff.training.chips import chip_of

WARM = 3  # steps before a trace
TRACED = 5  # steps in it


class Watch:
    """The time of the steps since the last report, without what does not belong to them."""

    def __init__(self, devices: list[jax.Device]):
        self._devices = devices
        self.flops: float | None = None  # of a step, over all devices
        self.restart()

    def restart(self) -> None:
        """What has been until now is not counted."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    @property
    def seconds(self) -> float:
        """Since the last report."""
        return time.perf_counter() - self._since

    @property
    def knows_peak(self) -> bool:
        """Whether it is known what the devices can do at best."""
        return chip_of(self._devices[0].device_kind) is not None

    def stepped(self) -> None:
        """A step was begun; when it ends nobody knows yet."""
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The devices may have nothing to do for as long as this takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def report(self, batch_size: int) -> dict[str, float]:
        """What the log says of the steps since the last report, all of which have ended; nothing where there are none.

        `input_wait_seconds`: of a step, in which the loop waited for its batch. `mfu`: operations of the model alone over what
        the devices could do at best in the time, where that is known. `device_memory_gib`: the most that was ever in use on a
        device of this process, where it says so.
        """
        steps, seconds, waited = self._steps, self.seconds, self._waited
        self.restart()
        if not steps:
            return {}
        values = {
            "steps_per_second": steps / seconds,
            "images_per_second": steps * batch_size / seconds,
            "step_seconds": seconds / steps,
            "input_wait_seconds": waited / steps,
        }
        chip = chip_of(self._devices[0].device_kind)
        if chip is not None and self.flops is not None:
            values["mfu"] = self.flops * steps / seconds / (chip.flops * len(self._devices))
        local = [device for device in self._devices if device.process_index == jax.process_index()]
        used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in local]
        if any(used):
            values["device_memory_gib"] = max(used) / 2**30
        return values


def flops_of(update: Callable[..., Any], *args: Any) -> float | None:
    """Operations of one call as XLA counts them before it compiles, of a loop's body once; arguments may be shapes."""
    # As on a TPU, whatever there is: a CPU's convolutions have fewer (`jaxdiff.models.winograd`).
    cost: Any = jax.jit(update).trace(*args).lower(lowering_platforms=("tpu",)).cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost["flops"]) if cost and "flops" in cost else None


class Trace:
    """A trace of a few steps once they run as they always will; of several processes each writes its own.

    Steps come `around`; after the `last` one, when it has ended, `close` writes the trace.
    """

    def __init__(self, folder: pathlib.Path, start: int, end: int):
        self.folder = folder
        self.first = max(start, min(start + WARM, end - TRACED))
        self.last = min(self.first + TRACED, end) - 1
        self._on = False

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Where a step is made; the first traced one begins the trace."""
        if step == self.first:
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step) if self._on else contextlib.nullcontext():
            yield

    def close(self) -> None:
        """End the trace, however far it has come, and say how to open it."""
        if not self._on:
            return
        self._on = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            print(
                f"\ntrace of steps {self.first + 1} to {self.last + 1} in {self.folder}: open its perfetto_trace.json.gz at "
                f"https://ui.perfetto.dev, or: pip install tensorboard xprof && tensorboard --logdir {self.folder}",
                file=sys.stderr,
            )
