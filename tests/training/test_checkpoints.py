"""Checkpoints come back bit by bit, onto any mesh; damaged ones are passed over, never deleted, never hidden."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.training.checkpoints import CheckpointError, Checkpoints, abstract_state
from jaxdiff.training.sharding import fsdp_shardings, make_mesh
from jaxdiff.training.state import create_state


def example_state(seed=0):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (64, 128)), "bias": jnp.arange(3.0)}}
    return create_state(params, optax.adam(1e-3))


def target(mesh):
    shapes = jax.eval_shape(example_state)
    return abstract_state(shapes, fsdp_shardings(shapes, mesh))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2, 3, of which two are kept; each holds another state."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, example_state(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_newest_comes_back_bit_identical_on_another_mesh(saved):
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.steps() == [2, 3]
    step, state = checkpoints.restore_latest(target(make_mesh(ShardingConfig(fsdp=4))))
    assert step == 3
    assert_equal(state, example_state(3))
    assert state.params["dense"]["kernel"].addressable_shards[0].data.shape == (64, 32)
    checkpoints.close()


def test_one_item_is_read_alone(saved):
    ema = target(make_mesh(ShardingConfig())).ema_params
    step, items = Checkpoints(saved).restore_items(ema_params=ema)
    assert step == 3
    assert_equal(items["ema_params"], example_state(3).ema_params)


def damage(folder, how):
    """Damage every data file of the items of one checkpoint."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if how == "removed":
        shutil.rmtree(folder / "params")
    elif how == "emptied":
        for path in files:
            path.write_bytes(b"")
    else:
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["truncated", "emptied", "removed"])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(saved, how, capsys):
    damage(saved / "3", how)
    checkpoints = Checkpoints(saved, keep=2)
    step, state = checkpoints.restore_latest(target(make_mesh(ShardingConfig())))
    assert step == 2
    assert_equal(state, example_state(2))
    assert "cannot be read" in capsys.readouterr().err
    assert (saved.parent / "damaged_checkpoints" / "3.0").is_dir()
    checkpoints.save(3, example_state(7))  # the place of the damaged step is free again
    checkpoints.close()
    assert_equal(Checkpoints(saved, keep=2).restore_latest(target(make_mesh(ShardingConfig())))[1], example_state(7))


def test_a_run_never_starts_afresh_over_unreadable_checkpoints(saved):
    damage(saved / "2", "truncated")
    damage(saved / "3", "truncated")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        Checkpoints(saved, keep=2).restore_latest(target(make_mesh(ShardingConfig())))


def test_no_checkpoint_is_not_an_error_for_training_but_one_for_sampling(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", keep=1).restore_latest(target(make_mesh(ShardingConfig()))) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint: train first"):
        Checkpoints(tmp_path / "elsewhere").restore_items(ema_params={})
