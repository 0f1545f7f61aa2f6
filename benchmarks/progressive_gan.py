"""One step of the progressive GAN (both networks, WGAN-GP, Adam, moving average) against PyTorch, at each resolution.

    pip install -e '.[peer]' && python benchmarks/progressive_gan.py
    python benchmarks/progressive_gan.py --resolutions 4 8 16 32 64 --base 8192 --most 512    # the paper's wide networks
    python benchmarks/progressive_gan.py --together                                           # the order of CIFAR-10's recipe
    python benchmarks/progressive_gan.py --one_step 1024                                      # does the last stage fit?

The peer is written as one writes it in PyTorch: the same networks, the same loss, channels first, nothing but torch's own layers.
Both sides begin with the same parameters, and that they compute the same images, scores, penalty and gradients is checked before
they take turns. float32, the same batch, in the middle of a fade. Printed are thousand images an hour of the fastest round, in
brackets by processor time over the cores, which other programs on the machine disturb less; the ratios come last. Memory is
what XLA plans for our step: both networks, average and moments, the batch, and temporaries; on a GPU also each side's peak.

--one_step compiles the stage of so many pixels of the paper's networks, takes one step with one image, and prints what it took.
"""

import argparse
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxdiff.config import OptimizerConfig, ShardingConfig, default_config, to_config
from jaxdiff.generation.generate import from_uint8
from jaxdiff.host_memory import keep_freed_memory
from jaxdiff.losses import gradient_penalty
from jaxdiff.models.progressive_gan import Discriminator, Generator, stage_of
from jaxdiff.tasks.progressive_gan import ProgressiveGANTask
from jaxdiff.training.gan import GANState, create_gan_state, make_gan_update
from jaxdiff.training.sharding import make_mesh, step_options

ALPHA = 0.5  # in the middle of a fade, where both the old and the new stage are at work
LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.0, 0.99, 1e-8
PENALTY, DRIFT, EMA = 10.0, 1e-3, 0.999
MEGABYTE = 2**20


class Sizes(NamedTuple):
    """Of both networks."""

    resolution: int
    base: int
    most: int
    latent: int
    gamma: float
    together: bool = False  # both take their gradients of the same images before either moves

    def task(self) -> ProgressiveGANTask:
        """Ours, as `train.py` would make it."""
        config = default_config()
        config.update_from_flattened_dict(
            {
                **{"task": "progressive_gan", "data.image_size": self.resolution, "data.channels": 3},
                **{
                    "model.num_classes": 0,
                    "progressive_gan.latent_dim": self.latent,
                    "progressive_gan.gamma": self.gamma,
                    "progressive_gan.together": self.together,
                },
                **{"progressive_gan.channel_base": self.base, "progressive_gan.channel_max": self.most},
            }
        )
        return ProgressiveGANTask(to_config(config))

    def networks(self) -> tuple[Generator, Discriminator]:
        """Ours."""
        task = self.task()
        return task.generator(), task.discriminator()


# Ours -------------------------------------------------------------------------------------------------------------------


def our_step(sizes: Sizes, batch: int) -> tuple[Any, GANState, float]:
    """The compiled update, a state to begin with, and the seconds that compiling took."""
    optimizer = optax.chain(optax.scale_by_adam(BETA1, BETA2, EPSILON), optax.scale(-LEARNING_RATE))
    config = OptimizerConfig(ema_decay=EMA, ema_warmup=False)
    game = sizes.task().game(stage_of(sizes.resolution))
    game = game._replace(alpha=lambda step: jnp.float32(ALPHA), resets=(0,))
    update = make_gan_update(game, optimizer, optimizer, config)
    state = jax.jit(lambda key: create_gan_state(*initial(sizes, key), optimizer, optimizer))(jax.random.key(0))
    images = our_batch(np.zeros((batch, sizes.resolution, sizes.resolution, 3), np.uint8))
    started = time.perf_counter()
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    step = jax.jit(update, donate_argnums=0, compiler_options=step_options(mesh))  # as `train.py` has it
    compiled = step.lower(state, images, jax.random.key(1)).compile()
    return compiled, state, time.perf_counter() - started


def our_batch(images: np.ndarray) -> dict[str, Array]:
    """As the loader gives it."""
    numbers = jnp.arange(len(images), dtype=jnp.int32)
    return {"image": jnp.asarray(images), "label": jnp.zeros_like(numbers), "index": numbers}


def initial(sizes: Sizes, key: Array) -> tuple[Any, Any]:
    """Parameters of both networks."""
    generator, discriminator = sizes.networks()
    keys, size = jax.random.split(key), sizes.resolution
    g = generator.init(keys[0], jnp.zeros((1, sizes.latent)))["params"]
    return g, discriminator.init(keys[1], jnp.zeros((1, size, size, 3)))["params"]


# PyTorch ----------------------------------------------------------------------------------------------------------------


def peer_networks(sizes: Sizes) -> tuple[Any, Any]:
    """Generator and discriminator at the last stage, with the same names of parameters as ours."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def width(resolution: int) -> int:
        return min(2 * sizes.base // resolution, sizes.most)

    class Conv(nn.Module):
        def __init__(self, before: int, after: int, size: int = 3, gain: float = math.sqrt(2)):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(after, before, size, size))
            self.bias = nn.Parameter(torch.zeros(after))
            self.scale = gain / math.sqrt(before * size * size)

        def forward(self, x: Any) -> Any:
            return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.weight.shape[-1] // 2)

    class Dense(nn.Module):
        def __init__(self, before: int, after: int, gain: float, bias: bool = True):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(after, before))
            self.bias = nn.Parameter(torch.zeros(after)) if bias else None
            self.scale = gain / math.sqrt(before)

        def forward(self, x: Any) -> Any:
            return F.linear(x, self.weight * self.scale, self.bias)

    def leaky(x: Any) -> Any:
        return F.leaky_relu(x, 0.2)

    def norm(x: Any) -> Any:
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-8)

    def double(x: Any) -> Any:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    class PeerGenerator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block_4 = nn.ModuleDict({"dense": Dense(sizes.latent, 16 * width(4), math.sqrt(2) / 4, bias=False)})
            self.block_4["conv"] = Conv(width(4), width(4))
            self.bias = nn.Parameter(torch.zeros(width(4)))
            at = 8
            while at <= sizes.resolution:
                block = nn.ModuleDict({"conv_0": Conv(width(at // 2), width(at)), "conv_1": Conv(width(at), width(at))})
                self.add_module(f"block_{at}", block)
                at *= 2
            for at in {max(4, sizes.resolution // 2), sizes.resolution}:
                self.add_module(f"to_rgb_{at}", Conv(width(at), 3, 1, 1.0))

        def forward(self, z: Any) -> Any:
            x = self.block_4["dense"](norm(z)).view(len(z), -1, 4, 4) + self.bias[None, :, None, None]
            x = norm(leaky(x))
            x, at = norm(leaky(self.block_4["conv"](x))), 4
            before = x
            while at < sizes.resolution:
                at *= 2
                before, x = x, double(x)
                for name in ("conv_0", "conv_1"):
                    x = norm(leaky(self.get_submodule(f"block_{at}")[name](x)))
            image = self.get_submodule(f"to_rgb_{at}")(x)
            if at == 4:
                return image
            return torch.lerp(double(self.get_submodule(f"to_rgb_{at // 2}")(before)), image, ALPHA)

    class PeerDiscriminator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = min(sizes.base, sizes.most)
            self.block_4 = nn.ModuleDict({"conv": Conv(width(4) + 1, width(4)), "out": Dense(wide, 1, 1.0)})
            self.block_4["dense"] = Dense(16 * width(4), wide, math.sqrt(2))
            at = 8
            while at <= sizes.resolution:
                block = {"conv_0": Conv(width(at), width(at)), "conv_1": Conv(width(at), width(at // 2))}
                self.add_module(f"block_{at}", nn.ModuleDict(block))
                at *= 2
            for at in {max(4, sizes.resolution // 2), sizes.resolution}:
                self.add_module(f"from_rgb_{at}", Conv(3, width(at), 1))

        def forward(self, image: Any) -> Any:
            at = sizes.resolution
            x = leaky(self.get_submodule(f"from_rgb_{at}")(image))
            while at > 4:
                for name in ("conv_0", "conv_1"):
                    x = leaky(self.get_submodule(f"block_{at}")[name](x))
                x = F.avg_pool2d(x, 2)
                if at == sizes.resolution:
                    old = leaky(self.get_submodule(f"from_rgb_{at // 2}")(F.avg_pool2d(image, 2)))
                    x = torch.lerp(old, x, ALPHA)
                at //= 2
            groups = x.view(4, -1, *x.shape[1:])
            value = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3)).repeat(4)
            x = torch.cat([x, value[:, None, None, None].expand(-1, 1, 4, 4)], 1)
            x = leaky(self.block_4["conv"](x))
            return self.block_4["out"](leaky(self.block_4["dense"](x.flatten(1))))[:, 0]

    return PeerGenerator(), PeerDiscriminator()


def give_parameters(network: Any, params: Any, generator: bool) -> None:
    """Ours into the peer's network, channels first."""
    import torch

    with torch.no_grad():
        for name, tensor in network.named_parameters():
            path = name.split(".")
            if name == "bias":  # of the first block, whose dense layer has none
                value = params["block_4"]["bias"]
            else:
                leaf = params
                for part in path[:-1]:
                    leaf = leaf[part]
                value = leaf[{"weight": "kernel", "bias": "bias"}[path[-1]]]
            tensor.copy_(torch.from_numpy(_channels_first(np.asarray(value), path, generator)))


def _channels_first(value: np.ndarray, path: list[str], generator: bool) -> np.ndarray:
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    elif path[:2] == ["block_4", "dense"] and value.ndim == 2:  # where [4 4 c] and [c 4 4] meet a vector
        if generator:
            value = value.reshape(value.shape[0], 4, 4, -1).transpose(3, 1, 2, 0).reshape(-1, value.shape[0])
        else:
            value = value.reshape(4, 4, -1, value.shape[1]).transpose(3, 2, 0, 1).reshape(value.shape[1], -1)
    elif value.ndim == 2:
        value = value.T
    return value.copy()


def peer_penalty(critic: Any, mixed: Any, gamma: float) -> Any:
    """(|grad| - gamma)^2 / gamma^2 of each image."""
    import torch

    mixed = mixed.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) / gamma - 1) ** 2


def peer_step(sizes: Sizes, batch: int, networks: tuple[Any, Any], device: str) -> Callable[[np.ndarray], None]:
    """The same step: discriminator, moving average, generator; or both gradients first."""
    import copy

    import torch
    from torch.nn import functional

    generator, discriminator = networks
    average = copy.deepcopy(generator).requires_grad_(False)
    adam = {"lr": LEARNING_RATE, "betas": (BETA1, BETA2), "eps": EPSILON, "foreach": True}
    g_optimizer = torch.optim.Adam(generator.parameters(), **adam)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), **adam)

    def fakes() -> Any:
        return generator(torch.randn(batch, sizes.latent, device=device))

    def faded(x: Any) -> Any:
        coarse = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        return torch.lerp(coarse, x, ALPHA)

    def learn_generator(x_fake: Any) -> None:
        g_optimizer.zero_grad()
        discriminator.requires_grad_(False)
        (-discriminator(x_fake).mean()).backward()
        discriminator.requires_grad_(True)

    def step(images: np.ndarray) -> None:
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        x = faded(x) if sizes.resolution > 4 else x
        with torch.set_grad_enabled(sizes.together):
            made = fakes()
        x_fake = made.detach()
        weight = torch.rand(batch, 1, 1, 1, device=device)
        penalty = peer_penalty(discriminator, torch.lerp(x, x_fake, weight), sizes.gamma)
        real, fake = discriminator(x), discriminator(x_fake)
        d_optimizer.zero_grad()
        (fake - real + PENALTY * penalty + DRIFT * real**2).mean().backward()
        if sizes.together:
            learn_generator(made)
        d_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), 1 - EMA)
        if not sizes.together:
            learn_generator(fakes())
        g_optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


# The race ---------------------------------------------------------------------------------------------------------------


def check_agreement(sizes: Sizes, params: tuple[Any, Any], networks: tuple[Any, Any], images: np.ndarray) -> None:
    """The same images, scores, penalties and gradients on both sides, or an error."""
    import torch

    (g, d), (peer_g, peer_d) = params, networks
    generator, discriminator = sizes.networks()
    z = np.random.default_rng(1).standard_normal((len(images), sizes.latent)).astype(np.float32)
    device = next(peer_g.parameters()).device

    def losses(g: Any, d: Any) -> tuple[Array, tuple[Array, Array, Array]]:
        def critic(x: Array) -> Array:
            return discriminator.apply({"params": d}, x, alpha=ALPHA)[0]

        x, x_fake = from_uint8(jnp.asarray(images)), generator.apply({"params": g}, z, alpha=ALPHA)
        penalty = gradient_penalty(critic, (x + x_fake) / 2, sizes.gamma)
        return (critic(x_fake) + PENALTY * penalty).mean(), (x_fake, critic(x), penalty)

    with jax.default_matmul_precision("highest"):
        gradient, ours = jax.jit(jax.grad(losses, argnums=1, has_aux=True))(g, d)
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        x_fake = peer_g(torch.from_numpy(z).to(device))
    penalty = peer_penalty(peer_d, (x + x_fake) / 2, sizes.gamma)
    (peer_d(x_fake) + PENALTY * penalty).mean().backward()
    theirs = (x_fake.permute(0, 2, 3, 1), peer_d(x), penalty)
    for what, our, their in zip(("images", "scores", "penalties"), ours, theirs, strict=True):
        _check_close(what, np.asarray(our), their.detach().cpu().numpy())
    name = f"from_rgb_{sizes.resolution}"
    their_gradient = peer_d.get_submodule(name).weight.grad.permute(2, 3, 1, 0).cpu().numpy()
    _check_close("gradients", np.asarray(gradient[name]["kernel"]), their_gradient)


def _check_close(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not gap < 2e-3:
        sys.exit(f"error: the two sides' {what} differ by {gap:.2g} of the largest")


class Speed(NamedTuple):
    """Of the fastest round."""

    seconds: float  # a step
    cpu_seconds: float  # processor time of a step / number of cores

    def thousands_an_hour(self, batch: int) -> str:
        """As the paper counts."""
        return f"{3.6 * batch / self.seconds:7.4g} ({3.6 * batch / self.cpu_seconds:.4g})"


def race(sides: list[Callable[[], None]], rounds: int, seconds: float) -> list[Speed]:
    """Let the sides take turns, each long enough to be timed."""
    counts = []
    for step in sides:
        step()  # warms up
        started = time.perf_counter()
        step()
        counts.append(max(1, math.ceil(seconds / (time.perf_counter() - started))))
    found = np.full((len(sides), 2), np.inf)
    for _ in range(rounds):
        for side, (step, count) in enumerate(zip(sides, counts, strict=True)):
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(count):
                step()
            spent = np.array([time.perf_counter() - started, (time.process_time() - cpu_started) / _cores()]) / count
            found[side] = np.minimum(found[side], spent)
    return [Speed(*map(float, row)) for row in found]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def planned_memory(compiled: Any) -> str:
    """What XLA plans for a step."""
    plan = compiled.memory_analysis()
    if plan is None:
        return "unknown"
    return f"{(plan.argument_size_in_bytes + plan.temp_size_in_bytes) / MEGABYTE:,.0f} MB"


def device_peak() -> str:
    """The most that was in use on our device since the program began, where it tells; a CPU does not."""
    stats = jax.devices()[0].memory_stats() or {}
    return f", peak {stats['peak_bytes_in_use'] / MEGABYTE:,.0f} MB" if "peak_bytes_in_use" in stats else ""


def compare(sizes: Sizes, batch: int, rounds: int, seconds: float, alone: bool) -> str:
    """Race at one resolution; what is to be said last."""
    images = np.random.default_rng(0).integers(0, 256, (batch, sizes.resolution, sizes.resolution, 3), dtype=np.uint8)
    compiled, state, compile_seconds = our_step(sizes, batch)
    sides, where = [], f"{sizes.resolution}x{sizes.resolution}"
    if not alone:
        import torch

        device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        networks = peer_networks(sizes)
        params = state.params, state.discriminator_params
        for network, tree in zip(networks, params, strict=True):
            give_parameters(network, tree, network is networks[0])
            network.to(device)
        check_agreement(sizes, params, networks, images)
        step = peer_step(sizes, batch, networks, device)
        sides.append(lambda: step(images))
    batches, key = our_batch(images), jax.random.key(1)
    held = [state]

    def ours() -> None:
        held[0], metrics = compiled(held[0], batches, key)
        metrics["loss"].block_until_ready()

    speeds = race([ours, *sides], rounds, seconds)
    memory = f"{planned_memory(compiled)}{device_peak()}, compiled in {compile_seconds:.1f} s"
    print(f"{where}: jaxdiff {speeds[0].thousands_an_hour(batch)} thousand images/hour; {memory}", flush=True)
    if alone:
        return f"{where}: {speeds[0].thousands_an_hour(batch)} thousand images/hour"
    peak = f"; peak {torch.cuda.max_memory_allocated() / MEGABYTE:,.0f} MB" if device == "cuda" else ""
    print(f"{where}: PyTorch {speeds[1].thousands_an_hour(batch)} thousand images/hour{peak}", flush=True)
    ratios = (speeds[1].seconds / speeds[0].seconds, speeds[1].cpu_seconds / speeds[0].cpu_seconds)
    return f"{where}: jaxdiff is {ratios[0]:.2f} ({ratios[1]:.2f}) times as fast"


def one_step(sizes: Sizes) -> None:
    """Compile a stage and take one step with one image."""
    compiled, state, compile_seconds = our_step(sizes, 1)
    print(f"compiled in {compile_seconds:.1f} s; a step plans {planned_memory(compiled)}", flush=True)
    images = our_batch(np.zeros((1, sizes.resolution, sizes.resolution, 3), np.uint8))
    started = time.perf_counter()
    _, metrics = compiled(state, images, jax.random.key(1))
    losses = {name: float(metrics[name]) for name in ("discriminator_loss", "generator_loss", "penalty")}
    seconds, most = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"one step: {seconds:.1f} s, {', '.join(f'{name} {value:.4g}' for name, value in losses.items())}")
    print(f"the process took at most {most / 1024:,.0f} MB{device_peak()}")
    if not all(map(math.isfinite, losses.values())):
        sys.exit("error: the losses are not finite")


def main() -> None:
    """Read the flags, race at each resolution, print."""
    keep_freed_memory()  # as train.py does; PyTorch is in the same process
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--batch", type=int, default=16, help="images, a multiple of 4 (default 16)")
    parser.add_argument("--base", type=int, default=4096, help="channels at a resolution: 2 * base / resolution ...")
    parser.add_argument("--most", type=int, default=128, help="... but no more (default: the paper's for CIFAR-10)")
    parser.add_argument("--latent", type=int, default=128, help="numbers of a latent vector")
    parser.add_argument("--gamma", type=float, default=750.0, help="of the penalty")
    parser.add_argument(
        "--together", action="store_true", help="both gradients before either network moves: CIFAR-10's recipe"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, of a round")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument(
        "--one_step", type=int, metavar="PIXELS", help="one step of the paper's networks, with one image"
    )
    flags = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}, {_cores()} cores")
    if flags.one_step:
        one_step(Sizes(flags.one_step, 8192, 512, 512, 1.0))
        return
    if flags.batch % 4:
        sys.exit(
            f"error: --batch {flags.batch}: must be a multiple of 4, the group of the minibatch standard deviation"
        )
    if not flags.alone:
        try:
            import torch
        except ImportError:
            sys.exit("error: torch is missing: pip install -e '.[peer]', or --alone")
        if flags.threads:
            torch.set_num_threads(flags.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")  # full float32 on both sides
    last = [
        compare(
            Sizes(resolution, flags.base, flags.most, flags.latent, flags.gamma, flags.together),
            flags.batch,
            flags.rounds,
            flags.seconds,
            flags.alone,
        )
        for resolution in flags.resolutions
    ]
    print("\n".join(last))


if __name__ == "__main__":
    main()
