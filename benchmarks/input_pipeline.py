"""Images per second that the input pipeline delivers, against what the training step consumes: one line a source.

    python benchmarks/input_pipeline.py                              # configs/digits.py and configs/mnist.py
    python benchmarks/input_pipeline.py --dir ~/tensorflow_datasets  # and configs/cifar10.py

"first epoch" decodes and resizes; "later" finds the images in memory (as far as the loader's limit lets it). The ratio is that
of the first epoch's speed to the step's, both measured here, one after the other.
"""

import argparse
import itertools
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from jaxdiff.config import Config, to_config
from jaxdiff.data.loader import Loader
from jaxdiff.data.sources import Source, open_source
from jaxdiff.tasks.diffusion import DiffusionTask
from jaxdiff.training.loop import init_sharded
from jaxdiff.training.sharding import make_mesh, make_runner

sys.path.insert(0, str(Path(__file__).parent.parent))  # for configs/


def images_per_second(loader: Loader, start: int, num_batches: int) -> float:
    """Speed of `num_batches` batches from `start` on, threads started and the first batch waited for beforehand."""
    batches = loader.iterate(start)
    next(batches)
    begin = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    seconds = time.perf_counter() - begin
    batches.close()
    return num_batches * loader.batch_size / seconds


def consumption(config: Config, num_steps: int = 3) -> float:
    """Images per second of the config's training step on this machine's devices, data excluded."""
    mesh = make_mesh(config.sharding)
    task = DiffusionTask(config).trainable(mesh)
    key = jax.random.key(0)
    runner = make_runner(task.make_update, jax.eval_shape(task.init, key), mesh, config.sharding.mode)
    state = init_sharded(task.init, key, runner.state_shardings)
    count, size = config.training.batch_size, config.data.image_size
    batch = {
        "image": np.zeros((count, size, size, config.data.channels), np.uint8),
        "label": np.zeros(count, np.int32),
        "index": np.arange(count, dtype=np.int32),
    }
    state, _ = jax.block_until_ready(runner.step(state, runner.put_batch(batch), key))
    begin = time.perf_counter()
    for _ in range(num_steps):
        state, _ = runner.step(state, runner.put_batch(batch), key)
    jax.block_until_ready(state)
    return num_steps * count / (time.perf_counter() - begin)


def report(source: Source, config: Config, batch_size: int, num_threads: int | None) -> None:
    """Print the line of one source at its own image size."""
    assert source.image_shape is not None
    loader = Loader(
        source,
        batch_size,
        seed=0,
        image_size=min(source.image_shape),
        channels=source.channels,
        flip=True,
        num_threads=num_threads,
    )
    epoch = max(1, len(source) // batch_size - loader.num_threads - 2)
    first = images_per_second(loader, 0, epoch)
    for n in range(len(source) // batch_size + 2):  # the rest of the epoch, so that all is in memory
        loader[n]
    later = images_per_second(loader, 10**6, max(200, min(epoch, 400)))
    print(
        f"{source.describe()}: first epoch {first:,.0f} images/s, later {later:,.0f} images/s "
        f"(batch {batch_size}, {loader.num_threads} threads)",
        flush=True,
    )
    step = consumption(config)
    print(
        f"    its training step consumes {step:,.0f} images/s (batch {config.training.batch_size}): ratio {first / step:,.1f}",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="TFDS data_dir with cifar10 prepared in it; without it, cifar10 is left out")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_threads", type=int, default=None, help="threads of the loader (default: its own choice)")
    parser.add_argument("--cifar10_batch", type=int, default=8, help="batch of cifar10's step (default 8: for a CPU)")
    options = parser.parse_args()
    for name in ("digits", "mnist") + (("cifar10",) if options.dir else ()):
        values = config_module(name).get_config()
        if name == "cifar10":
            values.training.batch_size = options.cifar10_batch
        source = open_source(values.data.source, options.dir if name == "cifar10" else None)
        values.model.num_classes = source.num_classes if values.model.num_classes else 0
        report(source, to_config(values), options.batch_size, options.num_threads)


def config_module(name: str) -> ModuleType:
    """The file configs/<name>.py."""
    return import_module(f"configs.{name}")


if __name__ == "__main__":
    main()
