"""Time one training step (noise MSE, Adam, donated state) of a U-Net, to see how much capacity a millisecond buys.

    python benchmarks/unet_step.py --image 8 --patch 2 --channels 64 --multipliers 1 --blocks 1 --attention 4 --classes 10

Prints one line: parameters, compile seconds, ms/step (the fastest of several rounds), images/s, GFLOP/s. In brackets the
processor time of a step divided by the cores, which other programs on the machine disturb less than the wall clock.

What it showed on 2 cores: the line above, whose feature maps are 4x4, printed 50 GFLOP/s; the same with --patch 4 --attention 2,
on maps of 2x2, 13 GFLOP/s. So fold small images by --patch, and stop at 4x4.
"""

import argparse
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxdiff.models.unet import UNet


class Timing(NamedTuple):
    """What one setting costs."""

    parameters: int
    compile_seconds: float
    step_seconds: float
    cpu_seconds: float  # processor time of a step / number of cores
    images_per_second: float
    gflops: float  # of one step, by XLA's own count

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.3f}M parameters, compile {self.compile_seconds:.1f} s, "
            f"{self.step_seconds * 1e3:.1f} ms/step ({self.cpu_seconds * 1e3:.1f} by processor time), "
            f"{self.images_per_second:.0f} images/s, {self.gflops:.2f} GFLOP/step, "
            f"{self.gflops / self.step_seconds:.0f} GFLOP/s"
        )


def time_step(network: UNet, image_size: int, image_channels: int, batch_size: int, rounds: int, steps: int) -> Timing:
    """Compile one training step of `network` and take the fastest round of `steps` steps (other programs add noise)."""
    shape = (batch_size, image_size, image_size, image_channels)
    label = jnp.zeros(batch_size, jnp.int32) if network.num_classes else None
    optimizer = optax.adam(1e-3)

    def init(key: Array) -> PyTree:
        params = network.init(key, jnp.zeros((1, *shape[1:])), jnp.zeros(1), None if label is None else label[:1])
        return params, optimizer.init(params)

    def update(state: PyTree, x0: Array, key: Array) -> tuple[PyTree, Array]:
        params, moments = state
        noise_key, time_key, dropout_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, x0.shape)
        t = jax.random.uniform(time_key, (batch_size,))
        x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise

        def loss(params: PyTree) -> Array:
            output = network.apply(params, x_t, 1000 * t, label, train=True, rngs={"dropout": dropout_key})
            return jnp.mean(jnp.square(jnp.asarray(output) - noise))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = jax.jit(init)(jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    x0, key = jnp.zeros(shape), jax.random.key(1)
    started = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=0).lower(state, x0, key).compile()
    compile_seconds = time.perf_counter() - started
    gflops = (compiled.cost_analysis() or {}).get("flops", float("nan")) / 1e9

    best = cpu_best = float("inf")
    for _ in range(rounds + 1):  # the first round warms up
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state, value = compiled(state, x0, key)
        value.block_until_ready()
        best = min(best, (time.perf_counter() - started) / steps)
        cpu_best = min(cpu_best, (time.process_time() - cpu_started) / steps / (os.cpu_count() or 1))
    return Timing(parameters, compile_seconds, best, cpu_best, batch_size / best, gflops)


def main() -> None:
    """Read the flags, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=32, help="image height and width")
    parser.add_argument("--image_channels", type=int, default=1)
    parser.add_argument("--patch", type=int, default=1, help="patch size at the U-Net's door")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 2, 2])
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks a level")
    parser.add_argument("--attention", type=int, nargs="*", default=[], help="resolutions with attention")
    parser.add_argument("--head_dim", type=int, default=None)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--classes", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    flags = parser.parse_args()
    network = UNet(
        flags.image_channels,
        channels=flags.channels,
        channel_multipliers=tuple(flags.multipliers),
        num_res_blocks=flags.blocks,
        attention_resolutions=tuple(flags.attention),
        head_dim=flags.head_dim,
        dropout=flags.dropout,
        num_classes=flags.classes,
        patch_size=flags.patch,
        dtype=jnp.dtype(flags.dtype),
        remat=flags.remat,
    )
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {jax.device_count()} x {device.device_kind}")
    print(time_step(network, flags.image, flags.image_channels, flags.batch, flags.rounds, flags.steps))


if __name__ == "__main__":
    main()
