"""What the devices send each other in a training step, seen in the compiled program."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdiff.config import ShardingConfig
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training import step
from jaxdiff.training.collectives import Traffic, collectives, instructions, sent
from jaxdiff.training.sharding import make_mesh, make_runner
from tests.tiny import tiny_batch, tiny_config

# In every notation that XLA prints: plain, asynchronous, of several arrays, with groups written in three ways, inside a loop.
PROGRAM = """HloModule jit_update, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[4,2], /*index=2*/bf16[6])) -> (s32[], f32[4,2]) {
  %state = (s32[], f32[4,2]{1,0}, /*index=2*/bf16[6]{0}) parameter(0)
  %r.7 = (f32[4,2]{1,0:T(8,128)}, /*index=1*/bf16[6]{0}) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%condition (state: (s32[], f32[4,2])) -> pred[] {
  %state = (s32[], f32[4,2]{1,0}) parameter(0)
}

%all-reduce-scatter.3 (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  %all-reduce.9 = f32[16]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[2]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={2}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %gather-start = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %piece.1 = f32[4]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %piece.2 = f32[4]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %gather-done = f32[16]{0} all-gather-done(%gather-start)
  %wide = f32[64]{0} broadcast(%p)
  %scatter = f32[8]{0} reduce-scatter(%wide), replica_groups=mesh['a'=8], device_ids=([2,4]T(1,0)) {'a'}, to_apply=%add
  %fused = f32[2]{0} fusion(%gather-done), kind=kCustom, calls=%all-reduce-scatter.3
  %loop = (s32[], f32[4,2]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %move = (u8[5]{0}, u8[5]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[8]{0} all-reduce-start(%scatter), metadata={op_name="jit(update)/mean all-gather(" source_line=3}
}
"""


def test_a_program_written_by_hand_is_read_right():
    assert collectives(PROGRAM) == {
        "all-reduce": Traffic(3 + 1, 3 * (32 + 12) + 32),
        "all-gather": Traffic(2, 64 + 16),  # of which one is written in two pieces
        "reduce-scatter": Traffic(2, 256 + 64),
        "collective-permute": Traffic(1, 5),
    }
    assert [one.group for one in instructions(PROGRAM)] == [4, 8, 2, 4, 8, 0, 0]
    ring = 3 * 2 * 44 * 3 // 4 + 64 * 7 // 8 + 64 // 2 + 16 * 3 // 4 + 256 * 7 // 8 + 5 + 2 * 32 * 7 // 8
    assert sent(PROGRAM, 8) == ring
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        collectives("HloModule nothing")


def compiled(sharding, **changes):
    """A training step's program of 8 devices, its parameters, and how they are split."""
    config, key = tiny_config(**changes), jax.random.key(1)
    mesh = make_mesh(sharding)
    task = DiffusionTask(config).trainable(mesh)
    shapes = jax.eval_shape(task.init, key)
    runner = make_runner(task.make_update, shapes, mesh, sharding.mode)
    program = runner.step.lower(shapes, runner.put_batch(tiny_batch(config)), key).compile()
    leaves = jax.tree.leaves(shapes.params)
    split = [
        leaf for leaf, s in zip(leaves, jax.tree.leaves(runner.state_shardings.params), strict=True) if s.spec != P()
    ]
    return program.as_text(), leaves, split


def size_of(leaves):
    """Of arrays, in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


SCALARS = 64  # bytes: the loss, and the norm of a gradient that is split


@pytest.mark.parametrize("mode", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_data_parallel_averages_the_gradient_once(mode):
    text, leaves, _ = compiled(ShardingConfig(mode=mode))
    found = collectives(text)
    assert set(found) == {"all-reduce"}
    # Biases that are added to the same sum have the same gradient, which may be averaged once.
    assert 0.99 * size_of(leaves) <= found["all-reduce"].bytes <= 1.01 * size_of(leaves) + SCALARS
    assert all(one.group == 8 for one in instructions(text))


@pytest.mark.slow
def test_accumulation_sends_no_more_than_its_micro_batches():
    """XLA averages inside the loop over micro-batches or after it; never more often."""
    text, leaves, _ = compiled(ShardingConfig(), **{"training.accumulation_steps": 2})
    found = collectives(text)
    assert set(found) == {"all-reduce"}
    assert 0.99 * size_of(leaves) <= found["all-reduce"].bytes <= 2 * (1.01 * size_of(leaves) + SCALARS)


@pytest.mark.parametrize("fsdp", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_fsdp_gathers_each_split_parameter_once_and_nothing_else(fsdp):
    """No activation is gathered or sent around: what travels are parameters on the way in and gradients on the way out."""
    text, leaves, split = compiled(ShardingConfig(fsdp=fsdp))
    found, gathered = collectives(text), [one for one in instructions(text) if one.kind == "all-gather"]
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert sorted(shape for one in gathered for shape in one.shapes) == sorted(leaf.shape for leaf in split)
    assert found["all-gather"].bytes == size_of(split) and {one.group for one in gathered} == {fsdp}
    # The average over `data` is taken of a part only, after that over `fsdp`.
    reduced = sum(found[kind].bytes for kind in ("all-reduce", "reduce-scatter") if kind in found)
    most = size_of(leaves) + (size_of(split) / fsdp if fsdp < 8 else 0)
    assert 0.99 * size_of(leaves) <= reduced <= 1.05 * most + SCALARS


@pytest.mark.slow
def test_the_checks_notice_activations_that_travel(monkeypatch):
    """Without `whole` the compiler sends what is smaller: this is what the test above is for."""
    monkeypatch.setattr(step, "whole", lambda params: params)
    text, _, split = compiled(ShardingConfig(fsdp=8))
    shapes = [shape for one in instructions(text) if one.kind == "all-gather" for shape in one.shapes]
    assert "all-to-all" in collectives(text) and len(shapes) > len(split)
    assert np.any([shape[:1] == (16,) for shape in shapes])  # the batch
