"""What `jaxdiff.host_memory.keep_freed_memory` is worth: steps of a small U-Net on this machine's CPU, with and without it.

    python benchmarks/host_memory.py

malloc cannot be told back, so that each measurement is a process of its own; they take turns. The ratio comes last.
"""

import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from jaxdiff.host_memory import keep_freed_memory
from jaxdiff.models.unet import UNet

STEPS, ROUNDS = 30, 3


def measure(keep: bool) -> tuple[float, float]:
    """Seconds and page faults of a step."""
    if keep and not keep_freed_memory():
        sys.exit("nothing to measure: no glibc, or JAX has an accelerator here")
    network = UNet(3, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(8,))
    x, t = jax.random.normal(jax.random.key(0), (32, 16, 16, 3)), jnp.ones(32)
    params = jax.jit(network.init)(jax.random.key(1), x, t)

    def loss(params: dict) -> jax.Array:
        return jnp.mean((network.apply(params, x, t) - x) ** 2)

    @jax.jit
    def step(params: dict) -> dict:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params))

    params = jax.block_until_ready(step(params))
    faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        params = step(params)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    return seconds / STEPS, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / STEPS


def main() -> None:
    """Command line; with an argument the measurement of one process."""
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1] == "kept"))
        return
    best = {}
    for _ in range(ROUNDS):
        for name in ("given_back", "kept"):
            done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
            seconds, faults = map(float, done.stdout.split())
            print(f"  {name:10}: {1000 * seconds:6.1f} ms and {faults:,.0f} page faults a step")
            best[name] = min(seconds, best.get(name, seconds))
    print(f"speed where freed memory is kept: {best['given_back'] / best['kept']:.2f} times")


if __name__ == "__main__":
    main()
