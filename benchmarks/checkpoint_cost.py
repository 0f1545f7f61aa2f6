"""What saving costs the training loop: a save's seconds against those between two saves at the config's interval.

    python benchmarks/checkpoint_cost.py                            # configs/digits.py
    python benchmarks/checkpoint_cost.py --config configs/mnist.py

Rounds of --steps steps without a save and with one at their beginning, in turn, each until everything is on disk; the difference
is what a save costs. Two clocks: that on the wall, and processor time, in which other programs on the machine count for nothing.
Where cores are left over, or an accelerator does the steps, the latter is too strict. "blocked" is how long the loop stands still
for the copy.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from importlib import import_module

import jax
import numpy as np

from jaxdiff.config import Config, to_config
from jaxdiff.data.sources import open_source
from jaxdiff.progress import progress_bar
from jaxdiff.tasks.make import make_task
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.sharding import make_mesh, make_runner

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # for configs/


def measure(config: Config, num_steps: int, rounds: int, folder: pathlib.Path) -> dict[str, list[list[float]]]:
    """Seconds of every round as [wall, processor, blocked], "without" and "with" a save."""
    mesh = make_mesh(config.sharding)
    task = make_task(config).trainable(mesh)
    key = jax.random.key(0)
    runner = make_runner(task.make_update, jax.eval_shape(task.init, key), mesh, config.sharding.mode)
    state = init_sharded(task.init, key, runner.state_shardings)
    count, size = config.training.batch_size, config.data.image_size
    batch = {
        "image": np.zeros((count, size, size, config.data.channels), np.uint8),
        "label": np.zeros(count, np.int32),
        "index": np.arange(count, dtype=np.int32),
    }
    checkpoints = Checkpoints(folder, config.training.keep_checkpoints)
    seconds: dict[str, list[list[float]]] = {"without": [], "with": []}
    bar = progress_bar(0, 2 * (rounds + 2), "rounds")
    for number in range(rounds + 2):
        for name, taken in seconds.items():
            wall, processor, blocked = time.perf_counter(), time.process_time(), 0.0
            if name == "with":
                checkpoints.save(number, state)
                blocked = time.perf_counter() - wall
            for _ in range(num_steps):
                state, _ = runner.step(state, runner.put_batch(batch), key)
            jax.block_until_ready(state)
            checkpoints.wait()
            if number > 1:  # the first ones compile and import
                taken.append([time.perf_counter() - wall, time.process_time() - processor, blocked])
            bar.update()
    bar.close()
    checkpoints.close()
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--steps", type=int, default=40, help="steps of a round (default 40)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    values = import_module(f"configs.{pathlib.Path(options.config).stem}").get_config()
    source = open_source(values.data.source)
    values.model.num_classes = source.num_classes if values.model.num_classes else 0
    config = to_config(values)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(config, options.steps, options.rounds, pathlib.Path(folder) / "checkpoints")
    without, saving = (np.median(np.array(taken), axis=0) for taken in seconds.values())
    interval = config.training.checkpoint_every
    print(
        f"{options.config}: a step takes {without[0] / options.steps * 1e3:.1f} ms ({without[1] / options.steps * 1e3:.1f} ms of "
        f"processors), a save {saving[0] - without[0]:.3f} s more ({saving[1] - without[1]:.3f} s of processors, loop blocked "
        f"{statistics.median(row[2] for row in seconds['with']):.3f} s)"
    )
    ratios = [(saving[i] - without[i]) / (without[i] / options.steps * interval) for i in (0, 1)]
    print(f"saving every {interval} steps costs {ratios[0]:.2%} of the time, {ratios[1]:.2%} of the processors' time")


if __name__ == "__main__":
    main()
