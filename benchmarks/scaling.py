"""How training should scale: what a step costs on many chips, on paper; and whether compiled programs send what paper says.

    python benchmarks/scaling.py                          # the tables of docs/scaling.md
    python benchmarks/scaling.py --only gan --utilisation 0.3 --sent_bytes 4
    python benchmarks/scaling.py --check                  # bytes sent: the formula against programs for 8 simulated devices

Parameters and operations are those of abstract shapes: nothing is initialised, and only --check compiles. Any CPU does it. Peaks
are those of jaxdiff/training/chips.py. No time in here was measured.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdiff.config import ConfigError, OptimizerConfig, ShardingConfig, to_config
from jaxdiff.tasks.make import Parts, make_task, plain_update
from jaxdiff.tasks.progressive_gan import resolve_length
from jaxdiff.tasks.stable_diffusion import unet_from_config
from jaxdiff.training.chips import CHIPS, Chip
from jaxdiff.training.collectives import sent
from jaxdiff.training.optimizer import learning_rate_schedule, make_optimizer
from jaxdiff.training.sharding import fewest_that_fit, fsdp_shardings, make_mesh, make_runner
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_update
from jaxdiff.training.watching import flops_of

sys.path.insert(0, str(Path(__file__).parent.parent))  # for configs/ and benchmarks/

MACHINE, NETWORK = 8, 50e9  # H100s in one, and the bytes a second that each can send to other machines (400 Gbit/s)
SLICES = {"v5e": (4, 8, 64, 256), "v6e": (4, 8, 64, 256), "v5p": (4, 8, 64, 512), "H100": (8, 16, 64, 256)}
TORUS = {
    "v5e": 256,
    "v6e": 256,
    "v5p": 64,
}  # chips from which on a slice's rings are closed; before, half its links count
PASSES = 9  # over a float32 copy of the parameters in an update: four copies are read and written, the gradient is read


# Bytes that a number of the gradient has while it travels, and a parameter that is gathered, where the network computes in
# bfloat16. The TPU's compiler sends it as bfloat16 (docs/tpu.md); nobody has looked at what XLA does for GPUs.
SENT_BYTES = {"H100": 4}
SENT_BYTES_TPU = 2


class Work(NamedTuple):
    """A step of one model on one chip."""

    batch: int
    params: Any  # shapes of what is trained
    state: Any  # shapes of all that lasts
    flops: float

    @property
    def bytes(self) -> int:
        """Of the parameters, in float32."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    @property
    def count(self) -> int:
        """Of the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def task_work(name: str, batch: int, **changes: Any) -> Work:
    """Of a file of configs/, in its last stage, with so many images on a chip."""
    config = __import__(f"configs.{name}", fromlist=["get_config"]).get_config()
    config.update_from_flattened_dict({"training.batch_size": batch, "model.dtype": "bfloat16", **changes})
    config = resolve_length(to_config(config))
    mesh, key = make_mesh(ShardingConfig(), jax.devices()[:1]), jax.random.key(0)
    trainable = make_task(config).trainable(mesh)
    state = jax.eval_shape(trainable.init, key)
    size = config.data.image_size
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, size, size, config.data.channels), jnp.uint8),
        **{name: jax.ShapeDtypeStruct((batch,), jnp.int32) for name in ("label", "index")},
    }
    update = plain_update(config, Parts(), mesh, len(trainable.stages) - 1)
    params = [state.params, getattr(state, "discriminator_params", {})]
    return Work(batch, params, state, flops_of(update, state, shapes, key) or math.nan)


def stable_diffusion_work(batch: int) -> Work:
    """Of fine-tuning Stable Diffusion 1.5's whole U-Net at 512x512, in bfloat16; latents and text are encoded before."""
    from benchmarks.stable_diffusion_unet import TEXT, TOKENS, config_of

    network = unet_from_config(config_of(320, 64)).clone(dtype=jnp.bfloat16, attention_implementation="xla")
    optimizer = make_optimizer(OptimizerConfig(), 1)
    inputs = (
        jax.ShapeDtypeStruct((batch, 64, 64, 4), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
        jax.ShapeDtypeStruct((batch, TOKENS, TEXT), jnp.float32),
    )

    def init(key: Any, x: Any, t: Any, context: Any) -> Any:
        return create_state(network.init(key, x, t, None, context)["params"], optimizer)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x, t, context = batch
        return jnp.mean((network.apply({"params": params}, x, t, context=context) - x) ** 2), {}

    key, rate = jax.random.key(0), learning_rate_schedule(OptimizerConfig(), 1)
    state = jax.eval_shape(init, key, *inputs)
    update = make_update(loss, optimizer, OptimizerConfig(), rate)
    return Work(batch, state.params, state, flops_of(update, state, inputs, key) or math.nan)


MODELS: dict[str, tuple[str, Callable[[], Work]]] = {
    "cifar10": ("DDPM CIFAR-10, 128 images a chip", lambda: task_work("cifar10", 128)),
    "sd": ("Stable Diffusion 1.5, whole U-Net, 512x512, 4 images a chip", lambda: stable_diffusion_work(4)),
    "gan": (
        "progressive GAN at 1024x1024, 4 images a chip",
        lambda: task_work("celeba_hq_progressive_gan", 4, **{"progressive_gan.batch_sizes": (4,)}),
    ),
}


def bytes_sent(whole: int, split: int, data: int, fsdp: int, scatters: bool = True) -> float:
    """By each device in a step, by ring algorithms: parameters are gathered, gradients averaged; see docs/scaling.md.

    whole, split: bytes of the parameters that are copied, and of those that are split over `fsdp`. scatters: whether the gradient
    of what is split is scattered as it is added up; XLA's CPU compiler averages it whole, and cuts it then.
    """
    n = data * fsdp
    gather = split * (fsdp - 1) / fsdp
    return gather * (2 if scatters else 3) + 2 * split / fsdp * (data - 1) / data + 2 * whole * (n - 1) / n


def seconds_sending(chip: Chip, size: int, n: int) -> float:
    """Of averaging `size` bytes of gradient over n chips (or of gathering and scattering them, which is as much)."""
    if chip.name == "H100":
        inside, machines = min(n, MACHINE), max(1, n // MACHINE)
        between = bytes_sent(size // inside, 0, machines, 1) / NETWORK  # each sends its part to its like in the others
        return bytes_sent(size, 0, inside, 1) / chip.link + between
    return bytes_sent(size, 0, n, 1) / (chip.link / (1 if n >= TORUS[chip.name] else 2))


def table(work: Work, utilisation: float, sent_bytes: int | None) -> str:
    """Of one model on every slice, as Markdown."""
    lines = [
        "| chips | fsdp | computing, ms | sending, ms | update, ms | images/s | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        size = work.count * (sent_bytes or SENT_BYTES.get(chip.name, SENT_BYTES_TPU))
        for n in SLICES.get(chip.name, ()):
            try:
                fsdp = fewest_that_fit(work.state, work.params, n, int(chip.memory))
            except ConfigError:
                lines.append(f"| {n} {chip.name} | does not fit | | | | | |")
                continue
            computing = work.flops / (chip.flops * utilisation)
            sending = seconds_sending(chip, size, n)
            update = PASSES * work.bytes / fsdp / chip.memory_bandwidth
            alone = computing + PASSES * work.bytes / chip.memory_bandwidth  # one chip, if all fitted
            least, most = computing + update + sending, max(computing, sending) + update
            lines.append(
                f"| {n} {chip.name} | {fsdp} | {computing * 1e3:.1f} | {sending * 1e3:.2f} | {update * 1e3:.2f} | "
                f"{n * work.batch / least:,.0f} to {n * work.batch / most:,.0f} | "
                f"{min(1.0, alone / least):.1%} to {min(1.0, alone / most):.1%} |"
            )
    return "\n".join(lines)


def check() -> str:
    """The formula and the programs of a small model on 8 devices, as Markdown."""
    from tests.tiny import tiny_batch, tiny_config

    config, key = tiny_config(), jax.random.key(1)
    task = make_task(config)
    lines = ["| data x fsdp | formula, bytes | compiled, bytes | ratio |", "|---|---|---|---|"]
    for fsdp in (1, 4, 8):
        mesh = make_mesh(ShardingConfig(fsdp=fsdp))
        trainable = task.trainable(mesh)
        shapes = jax.eval_shape(trainable.init, key)
        runner = make_runner(trainable.make_update, shapes, mesh, "jit")
        text = runner.step.lower(shapes, runner.put_batch(tiny_batch(config)), key).compile().as_text()
        size = {True: 0, False: 0}
        where = jax.tree.leaves(fsdp_shardings(shapes.params, mesh))
        for leaf, sharding in zip(jax.tree.leaves(shapes.params), where, strict=True):
            size[sharding.spec == P()] += leaf.size * leaf.dtype.itemsize
        formula, compiled = bytes_sent(size[True], size[False], 8 // fsdp, fsdp, scatters=False), sent(text, 8)
        lines.append(f"| {8 // fsdp} x {fsdp} | {formula:,.0f} | {compiled:,} | {compiled / formula:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="one model only")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of the chip's peak while computing: a guess")
    parser.add_argument(
        "--sent_bytes", type=int, help="of a number of the gradient while it travels (default: 2 on TPUs, 4 on H100)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare bytes sent with compiled programs, and nothing else"
    )
    args = parser.parse_args()
    if args.check:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        print(check())
        return
    for name, (title, make) in MODELS.items():
        if args.only in (None, name):
            work = make()
            state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(work.state))
            print(f"\n### {title}\n\n{work.count:,} parameters, state {state / 1e9:.2f} GB; ", end="")
            print(
                f"{work.flops / work.batch / 1e9:.1f} GFLOP an image, {work.flops / 1e12:.2f} TFLOP a chip and step\n"
            )
            print(table(work, args.utilisation, args.sent_bytes), flush=True)


if __name__ == "__main__":
    main()
