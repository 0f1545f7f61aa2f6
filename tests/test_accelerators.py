"""The training step is known to compile for accelerators that this machine does not have."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jaxdiff.command_line import config_from_flags
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training.sharding import make_mesh
from tests.tiny import tiny_batch

ROOT = pathlib.Path(__file__).parent.parent

COMPILE_FOR_TPU = """
import sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxdiff.command_line import config_from_flags
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training.sharding import BATCH_AXES, make_mesh, make_runner

config, _ = config_from_flags(sys.argv, "")
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(config.sharding, list(devices))
task = DiffusionTask(config).trainable(mesh)
state = jax.eval_shape(task.init, jax.random.key(0))
runner = make_runner(task.make_update, state, mesh, "jit")
b, s, c = config.training.batch_size, config.data.image_size, config.data.channels
batch = {
    "image": jax.ShapeDtypeStruct((b, s, s, c), np.uint8),
    "label": jax.ShapeDtypeStruct((b,), np.int32),
    "index": jax.ShapeDtypeStruct((b,), np.int32),
}
key = jax.eval_shape(lambda: jax.random.key(0))
compiled = runner.step.lower(state, batch, key).compile()
text = compiled.as_text()
print("platform", devices[0].platform, "all-reduce" in text or "reduce-scatter" in text)
print("bytes", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.tpu
def test_digits_step_compiles_for_a_v5e_slice():
    """Ahead of time, by the real TPU compiler, over 4 chips."""
    argv = ["--config=configs/digits.py", "--config.model.num_classes=10"]
    result = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU, *argv], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "platform tpu True" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cifar10_step_lowers(platform, dtype, monkeypatch):
    argv = ["train.py", f"--config={ROOT / 'configs' / 'cifar10.py'}", f"--config.model.dtype={dtype}"]
    monkeypatch.setattr(sys, "argv", argv)
    config, _ = config_from_flags(argv, "")
    mesh = make_mesh(config.sharding, jax.devices()[:1])
    task = DiffusionTask(config).trainable(mesh)
    state = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 35_746_307
    traced = jax.jit(task.make_update(None)).trace(state, tiny_batch(config), jax.random.key(0))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" in text
    assert ("bf16" in text) == (dtype == "bfloat16")
