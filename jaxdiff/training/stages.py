"""Stages of a run: stretches of steps, each taken by a program of its own, because shapes change or other parts are trained.

Which stage a step belongs to is known beforehand, so the next stage's program is compiled while the present one trains.
"""

import concurrent.futures
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxdiff.training.processes import meet
from jaxdiff.training.sharding import Runner


class Stage(NamedTuple):
    """Steps from `first_step` to the next stage's, with so many images each, over all devices."""

    name: str
    first_step: int
    batch_size: int


def stage_at(stages: Sequence[Stage], step: int) -> int:
    """The number of the stage that step `step` belongs to."""
    return max(number for number, stage in enumerate(stages) if number == 0 or stage.first_step <= step)


class Programs:
    """The compiled update for each step of a run.

    make_runner: of a stage's number its `Runner`. batches(step): generates batches from that step on, to compile for. state:
    its shapes and shardings. key: as the updates will get it. Close it in the end: a compilation cannot be broken off.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        make_runner: Callable[[int], Runner],
        batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]],
        state: Any,
        key: Key[Array, ""],
    ):
        self.stages = stages
        self._make_runner, self._batches, self._state, self._key = make_runner, batches, state, key
        self._number: int | None = None
        self._runner: Runner | None = None
        self._next: concurrent.futures.Future[Runner] | None = None
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jaxdiff-compiler")

    def at(self, step: int) -> Runner:
        """What takes step `step`; waits where that is still being compiled. Steps come one after the other."""
        number = stage_at(self.stages, step)
        if self._runner is None or self._number != number:
            if self._next is not None:
                self._runner = self._next.result()
            elif jax.process_count() > 1:
                self._runner = self._compile(number)
            else:
                self._runner = self._make_runner(number)  # compiles with its first step
            self._number, self._next = number, None
            meet(f"program {number} is compiled")
        elif self._next is None and number + 1 < len(self.stages):  # now that the first step is compiled
            self._next = self._compiler.submit(self._compile, number + 1)
        return self._runner

    def _compile(self, number: int) -> Runner:
        """The runner of a stage, its program compiled for the batches that the stage will have."""
        runner = self._make_runner(number)
        batches = self._batches(self.stages[number].first_step)
        batch = jax.tree.map(_abstract, runner.put_batch(next(batches)))
        batches.close()
        compiled = runner.step.lower(self._state, batch, self._key, *runner.frozen).compile()  # type: ignore[attr-defined]
        return Runner(compiled, runner.put_batch, runner.state_shardings, runner.frozen)

    def close(self) -> None:
        """Let go of the compiler."""
        if self._next is not None and self._next.running():
            print("waiting for the next stage's program, which is being compiled", file=sys.stderr)
        self._compiler.shutdown(wait=True, cancel_futures=True)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
