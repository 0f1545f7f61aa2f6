"""A run that eight devices saved goes on on fewer, split or whole, and is the same run."""

import shutil

import jax
import numpy as np
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.tasks import train
from jaxdiff.tasks.make import make_task
from jaxdiff.tasks.run import read_config
from jaxdiff.training.checkpoints import Checkpoints, abstract_state
from jaxdiff.training.log import read_metrics
from jaxdiff.training.sharding import fsdp_shardings, make_mesh
from tests.tiny import tiny_config
from tests.training.test_sharding import relative_distance

SAVED, END = 3, 6
PLACES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)]  # devices, fsdp


def go(workdir, steps, devices, fsdp, monkeypatch):
    """Train the workdir's run up to a step on some of the devices; the state that is left, as the loop holds it."""
    config = tiny_config(**{
        "training.num_steps": steps, "training.log_every": 1, "training.sample_every": 0, "sharding.fsdp": fsdp,
        "sampling.steps": 1, "sampling.num_images": 1,
    })  # fmt: skip
    monkeypatch.setattr(train, "make_mesh", lambda sharding: make_mesh(sharding, jax.devices()[:devices]))
    outcome = train.train_run(config, workdir)
    assert outcome.step == steps
    return outcome.state


def losses(workdir):
    return {record["step"]: record["loss"] for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record}


def saved_state(workdir, sharding=ShardingConfig(), devices=1):  # noqa: B008, a frozen dataclass
    """The newest checkpoint, on a mesh."""
    mesh = make_mesh(sharding, jax.devices()[:devices])
    shapes = jax.eval_shape(make_task(read_config(workdir)).trainable(mesh).init, jax.random.key(0))
    return Checkpoints(workdir / "checkpoints").restore_latest(abstract_state(shapes, fsdp_shardings(shapes, mesh)))


def split(state):
    """How many devices hold a part of the array that is split most."""
    leaves = jax.tree.leaves(state.params)
    return max(leaf.size // leaf.addressable_shards[0].data.size for leaf in leaves)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run on one device, and half of it on eight with all that is large split over them."""
    folder = tmp_path_factory.mktemp("elastic")
    with pytest.MonkeyPatch.context() as patch:
        go(folder / "alone", END, 1, 1, patch)
        assert split(go(folder / "eight", SAVED, 8, 8, patch)) == 8
    return folder


@pytest.mark.parametrize(("devices", "fsdp"), PLACES)
def test_what_eight_devices_saved_is_the_same_state_on_fewer(runs, devices, fsdp):
    step, expected = saved_state(runs / "eight", ShardingConfig(fsdp=8), 8)
    again, state = saved_state(runs / "eight", ShardingConfig(fsdp=fsdp), devices)
    assert step == again == SAVED and split(state) == fsdp
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "fsdp"), PLACES)
def test_what_eight_devices_began_goes_on_on_fewer_as_the_same_run(runs, tmp_path, monkeypatch, capsys, devices, fsdp):
    shutil.copytree(runs / "eight", tmp_path / "run")
    state = go(tmp_path / "run", END, devices, fsdp, monkeypatch)
    assert f"going on from step {SAVED}\n" in capsys.readouterr().out and split(state) == fsdp
    ours, theirs = losses(tmp_path / "run"), losses(runs / "alone")
    assert list(ours) == list(theirs) == list(range(1, END + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    assert len(set(theirs.values())) == END, "a loss that never changes would show nothing"
    (_, left), (_, expected) = saved_state(tmp_path / "run"), saved_state(runs / "alone")
    assert relative_distance((left.params, left.ema_params), (expected.params, expected.ema_params)) < 1e-5
