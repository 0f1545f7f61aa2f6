"""Programs of a run's stages: each step gets that of its stage, the next is compiled before it is needed."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.training.checkpoints import abstract_state
from jaxdiff.training.sharding import make_mesh, make_runner, state_shardings
from jaxdiff.training.stages import Programs, Stage, stage_at

STAGES = (Stage("small", 0, 8), Stage("large", 3, 16), Stage("last", 5, 8))


def test_a_step_belongs_to_the_last_stage_that_has_begun():
    assert [stage_at(STAGES, step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_every_step_is_taken_by_its_stages_program_and_the_next_is_compiled_beside(mode):
    mesh = make_mesh(ShardingConfig(mode=mode), jax.devices()[:2])
    traced: list[tuple[int, tuple[int, ...], str]] = []

    def make_update(number):
        def build(axis_name):
            def update(state, batch, key):
                traced.append((number, batch["x"].shape, threading.current_thread().name))
                total = batch["x"].sum() if axis_name is None else jax.lax.psum(batch["x"].sum(), axis_name)
                return {"sum": state["sum"] + (number + 1) * total}, {"total": total}

            return update

        return build

    def batches(start):
        for step in range(start, 7):
            yield {"x": np.ones((STAGES[stage_at(STAGES, step)].batch_size, 3), np.float32)}

    state, key = {"sum": jnp.zeros(())}, jax.random.key(0)
    shardings = state_shardings(state, mesh, mode)
    programs = Programs(
        STAGES,
        lambda number: make_runner(make_update(number), state, mesh, mode),
        batches,
        abstract_state(jax.eval_shape(lambda: state), shardings),
        key,
    )
    state = jax.device_put(state, shardings)
    for step, batch in enumerate(batches(0)):
        runner = programs.at(step)
        state, _ = runner.step(state, runner.put_batch(batch), key)
    programs.close()
    assert float(state["sum"]) == 3 * 8 * 3 + 2 * (2 * 16 * 3) + 3 * (2 * 8 * 3)
    assert sorted({number for number, _, _ in traced}) == [0, 1, 2]
    assert len([number for number, _, _ in traced if number]) == 2, "a program that was ready was made again"
    assert all(thread.startswith("jaxdiff-compiler") == (number > 0) for number, _, thread in traced)


def test_what_goes_wrong_in_a_compilation_is_raised_where_its_stage_begins():
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    state, key = {"sum": jnp.zeros(())}, jax.random.key(0)

    def make_update(number):
        def update(state, batch, key):
            if number:
                raise ValueError("no such stage")
            return state, {}

        return lambda axis_name: update

    def batches(start):
        while True:
            yield {"x": np.ones((4, 3), np.float32)}

    target = abstract_state(jax.eval_shape(lambda: state), state_shardings(state, mesh, "jit"))
    programs = Programs(STAGES, lambda n: make_runner(make_update(n), state, mesh, "jit"), batches, target, key)
    for step in range(3):
        programs.at(step)
    with pytest.raises(ValueError, match="no such stage"):
        programs.at(3)
    programs.close()
