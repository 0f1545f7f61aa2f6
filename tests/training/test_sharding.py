"""The same update on one device, on a mesh, with FSDP, under pmap and with accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError, OptimizerConfig, ShardingConfig
from jaxdiff.tasks import fitting
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.optimizer import learning_rate_schedule, make_optimizer
from jaxdiff.training.sharding import (
    SIDE_BY_SIDE,
    _known,
    bytes_a_device,
    fewest_that_fit,
    fsdp_shardings,
    make_mesh,
    make_runner,
    padded_size,
    step_options,
)
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_update
from tests.tiny import tiny_batch, tiny_config

MODES = {
    "jit": (ShardingConfig(), 8),
    "pmap": (ShardingConfig(mode="pmap"), 8),
    "fsdp": (ShardingConfig(fsdp=4), 8),
}


def states_after(sharding, num_devices, steps, **changes):
    """Parameters and their moving average after some steps, on the host."""
    config = tiny_config(**changes)
    mesh = make_mesh(sharding, jax.devices()[:num_devices])
    task = DiffusionTask(config).trainable(mesh)
    key = jax.random.key(1)
    shapes = jax.eval_shape(task.init, key)
    runner = make_runner(task.make_update, shapes, mesh, sharding.mode)
    state = init_sharded(task.init, key, runner.state_shardings)
    losses = []
    for step in range(steps):
        state, metrics = runner.step(state, runner.put_batch(tiny_batch(config, seed=step)), key)
        losses.append(float(metrics["loss"]))
    return jax.device_get((state.params, state.ema_params)), losses, state


def relative_distance(a, b):
    """|a - b| / |b| over a whole pytree, in float64."""
    difference = sum(
        np.sum((np.float64(x) - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return np.sqrt(difference / sum(np.sum(np.float64(y) ** 2) for y in jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def one_device():
    return states_after(ShardingConfig(), 1, 5)


@pytest.mark.parametrize("mode", MODES)
def test_five_steps_agree_with_one_device(one_device, mode):
    sharding, devices = MODES[mode]
    trees, losses, state = states_after(sharding, devices, 5)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    assert relative_distance(trees, one_device[0]) < 1e-5
    if mode == "fsdp":
        leaves = [x for x in jax.tree.leaves(state.params) if x.size >= 4096]
        assert leaves and all(x.addressable_shards[0].data.size == x.size // 4 for x in leaves)


def test_the_comparison_notices_other_noise(one_device):
    """The bound above means something: other random numbers are far outside it."""
    trees, _, _ = states_after(ShardingConfig(), 1, 5, **{"diffusion.label_dropout": 0.5})
    assert relative_distance(trees, one_device[0]) > 1e-4


def linear_update(accumulation_steps):
    """An update of a linear model, whose gradient is easily averaged by hand."""
    config = OptimizerConfig(clip_norm=0.0)
    optimizer = make_optimizer(config, 1)

    def loss(params, batch, key):
        x = batch["image"].reshape(batch["image"].shape[0], -1).astype(jnp.float32) / 255
        return jnp.mean((x @ params["w"] - batch["label"]) ** 2), {}

    update = make_update(loss, optimizer, config, learning_rate_schedule(config, 1), accumulation_steps)
    return update, create_state({"w": jnp.linspace(-1, 1, 64)}, optimizer)


def test_accumulation_equals_one_large_batch():
    batch, key = tiny_batch(tiny_config()), jax.random.key(0)
    update, state = linear_update(1)
    expected, metrics = update(state, batch, key)
    for steps in (2, 4):
        update, state = linear_update(steps)
        accumulated, accumulated_metrics = jax.jit(update)(state, batch, key)
        np.testing.assert_allclose(accumulated.params["w"], expected.params["w"], rtol=1e-6)
        np.testing.assert_allclose(accumulated_metrics["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(accumulated_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-6)


def test_fsdp_splits_the_largest_divisible_dimension():
    mesh = make_mesh(ShardingConfig(fsdp=4))
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 3, 64, 30), np.float32),
        "bias": jax.ShapeDtypeStruct((64,), np.float32),
    }
    shardings = fsdp_shardings(shapes, mesh)
    assert shardings["kernel"].spec == jax.sharding.PartitionSpec(None, None, "fsdp")
    assert shardings["bias"].spec == jax.sharding.PartitionSpec()


MB = 2**20


def test_as_little_is_split_as_fits():
    """Four copies of 4 MB last; a step adds the gradient, and where they are split the whole parameters, too."""
    used = {"w": jax.ShapeDtypeStruct((1024, 1024), np.float32)}
    kept = [used] * 4
    rooms = {None: 1, 27 * MB: 1, 26 * MB: 2, 20 * MB: 4, 14 * MB: 8}
    assert {room: fewest_that_fit(kept, used, 8, room) for room in rooms} == rooms
    assert fewest_that_fit(kept, used, 2, 26 * MB) == 2
    with pytest.raises(
        ConfigError, match=r"take 0.01 GiB on each device even if split over all 8, .* take more devices"
    ):
        fewest_that_fit(kept, used, 8, 13 * MB)


def test_bytes_a_device_are_those_of_its_shards():
    task = DiffusionTask(tiny_config(**{"model.channels": 32}))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    for fsdp in (1, 2, 8):
        shards = jax.tree.map(lambda x, s: np.prod(s.shard_shape(x.shape)) * 4, shapes, shardings_of(shapes, fsdp))
        assert bytes_a_device(shapes, fsdp) == sum(jax.tree.leaves(shards))


def shardings_of(shapes, fsdp):
    return fsdp_shardings(shapes, make_mesh(ShardingConfig(fsdp=fsdp)))


def test_fsdp_0_looks_at_the_memory_that_there_is(monkeypatch):
    config = tiny_config(**{"sharding.fsdp": 0, "model.channels": 32})
    mesh, task = make_mesh(config.sharding), DiffusionTask(config)
    assert mesh.shape["fsdp"] == 1 and fitting.fitting_mesh(config, mesh, task).shape["fsdp"] == 1
    size = bytes_a_device(jax.eval_shape(task.init, jax.random.key(0)), 1)
    monkeypatch.setattr(fitting, "device_memory", lambda device, sharing: 6 * size)
    fitted = fitting.fitting_mesh(config, mesh, task)
    assert fitted.shape["fsdp"] > 1 and list(fitted.devices.flat) == list(mesh.devices.flat)
    monkeypatch.setattr(fitting, "device_memory", lambda device, sharing: 2 * size)
    with pytest.raises(ConfigError, match=r"config.sharding.fsdp = 0: parameters, gradients"):
        fitting.fitting_mesh(config, mesh, task)
    said = tiny_config(**{"sharding.fsdp": 2})
    assert fitting.fitting_mesh(said, make_mesh(said.sharding), task).shape["fsdp"] == 2


def test_batches_are_filled_up_to_the_next_multiple_of_devices_and_micro_batches():
    mesh = make_mesh(ShardingConfig())
    found = {
        (size, steps): padded_size(size, steps, mesh) for size, steps in ((1, 1), (8, 1), (9, 1), (40, 2), (48, 2))
    }
    assert found == {(1, 1): 8, (8, 1): 8, (9, 1): 16, (40, 2): 48, (48, 2): 48}


def test_impossible_meshes_are_refused():
    with pytest.raises(ConfigError, match="must divide the number of devices, 8"):
        make_mesh(ShardingConfig(fsdp=3))
    with pytest.raises(ConfigError, match="needs config.sharding.fsdp = 1"):
        make_mesh(ShardingConfig(mode="pmap", fsdp=2))


def test_devices_drop_different_activations(monkeypatch):
    """Under pmap every device sees the same key: its dropout masks must differ by the examples that it holds."""
    task, keys = DiffusionTask(tiny_config(**{"model.dropout": 0.1, "training.batch_size": 4})), []

    def network(_self, _params, train=False, dropout_key=None):
        keys.append(jax.random.key_data(dropout_key).tolist())
        return lambda x, time, label: jnp.zeros_like(x)

    monkeypatch.setattr(DiffusionTask, "network", network)
    batch = tiny_batch(task.config)
    for half in (slice(0, 2), slice(2, 4)):
        task.loss({}, {name: value[half] for name, value in batch.items()}, jax.random.key(0))
    assert keys[0] != keys[1]


def test_only_a_cpu_alone_is_compiled_for_running_side_by_side():
    one, four = (make_mesh(ShardingConfig(), jax.devices()[:n]) for n in (1, 4))
    assert step_options(one) == SIDE_BY_SIDE and step_options(four) is None
    assert _known(**SIDE_BY_SIDE) and not _known(xla_cpu_no_such_option=True)  # which is no error, but left out
