"""What a run says of its own speed, and its trace."""

import gzip
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import OptimizerConfig, ShardingConfig, TrainingConfig
from jaxdiff.training import loop, watching
from jaxdiff.training.chips import CHIPS, Chip, chip_of
from jaxdiff.training.loop import Trainable, train
from jaxdiff.training.optimizer import learning_rate_schedule, make_optimizer
from jaxdiff.training.sharding import make_mesh
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_update
from jaxdiff.training.watching import Trace, Watch, flops_of

SLOW = 0.02  # seconds until a batch comes
TOY = Chip("toy", ("cpu",), flops=1e6, memory=1e9, memory_bandwidth=1e9, link=1e9)


def linear_task():
    """Of so few operations that they can be counted by hand."""
    config = OptimizerConfig(clip_norm=0.0)
    optimizer, rate = make_optimizer(config, 1), learning_rate_schedule(config, 1)

    def loss(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"]) ** 2), {}

    def update(axis_name=None):
        return make_update(loss, optimizer, config, rate, 1, axis_name)

    def init(key):
        return create_state({"w": jnp.ones((32, 8))}, optimizer)

    return Trainable(init, update, lambda state: {}, (), plain=lambda number: update())


def run(workdir, monkeypatch, steps=12, profile=False, devices=2):
    """Train it, and the records of metrics.jsonl."""
    monkeypatch.setattr(watching, "chip_of", lambda kind: TOY)
    config = TrainingConfig(batch_size=16, num_steps=steps, log_every=4, checkpoint_every=100, sample_every=0)

    def batches(start):
        for _ in itertools.count():
            time.sleep(SLOW)
            yield {"x": np.ones((16, 32), np.float32)}

    mesh = make_mesh(ShardingConfig(), jax.devices()[:devices])
    train(linear_task(), batches, config, mesh, "jit", 0, workdir, profile)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_log_says_how_fast_it_goes_and_what_it_waits_for(tmp_path, monkeypatch):
    reads = []
    device_get = jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda tree: reads.append(1) or device_get(tree))
    records = run(tmp_path, monkeypatch)
    assert [record["step"] for record in records] == [4, 8, 12]
    assert len(reads) == 3, "the devices are asked when the log is written, not at every step"
    shapes = jax.eval_shape(linear_task().init, jax.random.key(0))
    flops = flops_of(
        linear_task().plain(0), shapes, {"x": jax.ShapeDtypeStruct((16, 32), np.float32)}, jax.random.key(0)
    )
    assert flops >= 2 * 2 * 16 * 32 * 8  # two products of matrices
    for record in records:
        assert record["grad_norm"] > 0
        assert SLOW <= record["input_wait_seconds"] <= record["step_seconds"]
        np.testing.assert_allclose(record["steps_per_second"] * record["step_seconds"], 1)
        np.testing.assert_allclose(record["images_per_second"], 16 * record["steps_per_second"])
        np.testing.assert_allclose(record["mfu"], flops * record["steps_per_second"] / (2 * TOY.flops))


def test_time_is_counted_without_what_is_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watching.time, "perf_counter", lambda: now[0])
    watch = Watch(jax.devices()[:1])
    assert watch.report(16) == {}, "the first step compiles, and does not count"

    def let_pass(seconds):
        now[0] += seconds

    for _ in range(4):
        with watch.waiting():
            let_pass(1)
        let_pass(2)
        watch.stepped()
        with watch.paused():
            let_pass(100)
    assert watch.report(16) == {
        "steps_per_second": 1 / 3,
        "images_per_second": 16 / 3,
        "step_seconds": 3,
        "input_wait_seconds": 1,
    }, "and of a CPU nobody knows peak or memory"


def test_operations_of_a_product_of_matrices_are_counted():
    shapes = jax.ShapeDtypeStruct((8, 16), np.float32), jax.ShapeDtypeStruct((16, 4), np.float32)
    assert flops_of(jnp.matmul, *shapes) == 2 * 8 * 16 * 4


def test_chips_are_known_by_the_names_that_jax_has_for_them():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "H100"}
    kinds |= {"NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100-SXM4-40GB": "A100 40GB", "NVIDIA H200": "H200"}
    kinds |= {f"NVIDIA {name}": name for name in ("H100 PCIe", "H100 NVL", "H200 NVL")}
    assert {kind: getattr(chip_of(kind), "name", None) for kind in kinds} == kinds
    assert chip_of("cpu") is None
    assert all(chip.flops > 1e14 and chip.link < chip.memory_bandwidth < chip.flops for chip in CHIPS)


def test_profile_writes_a_trace_of_a_few_warm_steps(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, profile=True)
    said = capsys.readouterr().err
    assert "trace of steps 4 to 8" in said and "ui.perfetto.dev" in said
    (trace,) = tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"3", "4", "5", "6", "7"}


@pytest.mark.parametrize(
    ("start", "end", "traced"), [(0, 100, (3, 7)), (0, 6, (1, 5)), (0, 2, (0, 1)), (50, 53, (50, 52))]
)
def test_a_trace_fits_into_the_run(tmp_path, start, end, traced):
    trace = Trace(tmp_path, start, end)
    assert (trace.first, trace.last) == traced
